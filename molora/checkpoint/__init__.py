"""Models on disk, and what opens them."""
