"""Where the bytes of a content part come from, whatever the medium, and what the caller allows."""

from molora.media.sources import MediaPolicy, Sources, fetch, policy, read_file

__all__ = ["MediaPolicy", "Sources", "fetch", "policy", "read_file"]
