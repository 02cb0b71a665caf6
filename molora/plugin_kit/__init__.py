"""Plugins: found, begun, tried."""
