"""Settings for every test."""

import os

import torch

# Tiny models gain nothing from more threads, and two busy cores would make them wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
