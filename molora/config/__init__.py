"""Recipes and options: YAML files read into plain dataclasses."""

from molora.config.interpolation import ALLOWED_VARIABLES
from molora.config.reading import ConfigError, build, did_you_mean, dump, environment_in, options, plain, read, require

__all__ = [
    "ALLOWED_VARIABLES",
    "ConfigError",
    "build",
    "did_you_mean",
    "dump",
    "environment_in",
    "options",
    "plain",
    "read",
    "require",
]
