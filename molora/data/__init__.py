"""Conversations to samples."""
