"""Random access to the rows of large files: where they are is found once, and kept."""
