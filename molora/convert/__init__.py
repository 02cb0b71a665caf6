"""Foreign layouts in and out."""
