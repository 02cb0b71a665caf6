"""The log-mel front end beside transformers' Phi4MultimodalFeatureExtractor, on 32 clips of 3 to 30 seconds.

Prints the median of alternated rounds and the ratio, ours over theirs: python benchmarks/log_mel.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Phi4MultimodalFeatureExtractor

from molora.encoders.logmel import log_mel

ROUNDS = 9


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    draw = np.random.default_rng(0)
    clips = [(0.1 * draw.standard_normal(int(16_000 * s))).astype(np.float32) for s in np.linspace(3, 30, 32)]
    waves = [torch.from_numpy(clip) for clip in clips]
    extractor = Phi4MultimodalFeatureExtractor()
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        theirs.append(seconds(lambda: extractor(clips, sampling_rate=16_000, return_tensors="pt")))
        ours.append(seconds(lambda: log_mel(waves)))
    mine, others = statistics.median(ours), statistics.median(theirs)
    print(f"{torch.get_num_threads()} threads: {mine * 1e3:.0f} / {others * 1e3:.0f} ms, ratio {mine / others:.3f}")


if __name__ == "__main__":
    main()
