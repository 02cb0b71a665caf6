"""Rows of files in every common format, as conversations."""
