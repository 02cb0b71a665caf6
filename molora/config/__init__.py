"""Recipes and options: YAML files read into plain dataclasses."""

from molora.config.reading import (
    ALLOWED_VARIABLES,
    ConfigError,
    build,
    dump,
    environment_in,
    options,
    plain,
    read,
    require,
)

__all__ = [
    "ALLOWED_VARIABLES",
    "ConfigError",
    "build",
    "dump",
    "environment_in",
    "options",
    "plain",
    "read",
    "require",
]
