"""Conversations to samples."""

from molora.data.sources import SourceConfig, open_source

__all__ = ["SourceConfig", "open_source"]
