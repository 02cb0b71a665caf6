"""What stops code under test that takes too long."""

from __future__ import annotations


class Hung(BaseException):
    """Passes every `except Exception` that makes a refusal of what a decoder raises; pytest reports it as a failure."""
