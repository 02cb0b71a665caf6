"""Vision towers: crops to a grid of frames."""
