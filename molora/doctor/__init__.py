"""The machine and its memory."""
