"""molora beside transformers and PEFT: the same weights, the same samples, taken in turns in one process."""
