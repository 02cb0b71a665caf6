"""Data that models make."""
