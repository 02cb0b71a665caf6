"""Small backbones made from text."""
