"""Time series and pen strokes as modalities of molora."""
