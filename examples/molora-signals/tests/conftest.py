"""The package is tested from its folder, installed or not."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

# Tiny models gain nothing from more threads, and two busy cores would make them wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
