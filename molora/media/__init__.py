"""Where the bytes of a content part come from, whatever the medium, and what the caller allows."""

from molora.media.policy import MediaPolicy, policy
from molora.media.sources import Sources, open_file, read_file
from molora.media.urls import fetch

__all__ = ["MediaPolicy", "Sources", "fetch", "open_file", "policy", "read_file"]
