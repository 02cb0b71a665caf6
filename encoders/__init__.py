"""Encoders and the modalities they serve. `MODALITIES` names the built-in plugins."""

if __name__ != "molora.encoders":
    raise ImportError(f"import 'molora.encoders', not {__name__!r}: one file under two names is two modules")

MODALITIES = {"audio": "molora.encoders.audio:Audio", "vision": "molora.encoders.vision:Vision"}
