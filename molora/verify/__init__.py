"""The promises, checked on a model."""
