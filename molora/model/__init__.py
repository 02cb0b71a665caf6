"""The network that runs packs."""
