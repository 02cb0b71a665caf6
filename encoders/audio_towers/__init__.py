"""Audio towers: features or waveforms of clips to frames."""
