"""The log-mel front end: waveforms to 80 log-mel bins, a frame every 10 ms.

Letters: L samples, S frames, W samples of a frame, K bins of the Fourier transform, M mel bins.

Source: the speech features of microsoft/Phi-4-multimodal-instruct (processing_phi4mm.py).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.encoders.sound import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ

NUM_MEL_BINS = 80

_FFT_SAMPLES = 512
_PRE_EMPHASIS = 0.97
_FULL_SCALE = 32768.0
_HIGHEST_HZ = 7690.0

# Bounds the memory of one transform, and keeps it in a CPU's cache; results do not depend on it.
_FRAMES_PER_CALL = 2000


def num_frames(num_samples: int) -> int:
    """Frames of a clip at 16 kHz: whole ones only, nothing is padded."""
    return max(0, (num_samples - FRAME_SAMPLES) // HOP_SAMPLES + 1)


def log_mel(waves: Sequence[Tensor], *, narrowband: bool = False) -> Tensor:
    """Log-mel features (S, M) in fp32 of clips, packed end to end; silence is exactly 0.

    Clips are waveforms in [-1, 1] at 16 kHz, each of at least one frame. Every clip has `num_frames` of its length, and
    none depends on another clip. With `narrowband` clips are at 8 kHz, and the upper half of the spectrum is taken for
    empty, as the reference does; frames are as long and as frequent.
    """
    shrink = 2 if narrowband else 1
    frame, hop = FRAME_SAMPLES // shrink, HOP_SAMPLES // shrink
    # One row, in which every clip begins at a multiple of the hop; frames that lie across two clips are dropped.
    row_L = torch.cat([F.pad(wave.float(), (0, -len(wave) % hop)) for wave in waves])
    steps = [-(-len(wave) // hop) for wave in waves]
    row_L = F.pad(row_L, (0, frame))
    features = [
        _features(row_L[start * hop : (stop - 1) * hop + frame], frame, hop, _FFT_SAMPLES // shrink)
        for start in range(0, sum(steps), _FRAMES_PER_CALL)
        for stop in [min(start + _FRAMES_PER_CALL, sum(steps))]
    ]
    clips = torch.cat(features).split(steps)
    return torch.cat([clip[: num_frames(len(wave) * shrink)] for clip, wave in zip(clips, waves, strict=True)])


def _features(row_L: Tensor, frame: int, hop: int, fft: int) -> Tensor:
    """Pre-emphasis inside the frame, window, power spectrum, mel bins, logarithm; returns (S, M). Window and full scale
    are one factor for each sample. A frame's first sample is its own predecessor."""
    frames_SW = row_L.unfold(0, frame, hop)
    window_W = _window_W(frame, row_L.device)
    emphasised_SW = frames_SW * window_W
    emphasised_SW[:, 1:] -= frames_SW[:, :-1] * (_PRE_EMPHASIS * window_W[1:])
    emphasised_SW[:, :1] *= 1 - _PRE_EMPHASIS
    spectrum_SK = torch.fft.rfft(emphasised_SW, n=fft)
    power_SK = spectrum_SK.real.square() + spectrum_SK.imag.square()
    if fft < _FFT_SAMPLES:  # the Nyquist bin gives way to the empty half
        power_SK = F.pad(power_SK[:, :-1], (0, _FFT_SAMPLES // 2 + 1 - fft // 2))
    return torch.log((power_SK @ _mel_KM(row_L.device)).clamp(min=1.0))


@lru_cache
def _window_W(samples: int, device: torch.device) -> Tensor:
    return (torch.hamming_window(samples, periodic=False, dtype=torch.float64) * _FULL_SCALE).float().to(device)


@lru_cache
def _mel_KM(device: torch.device) -> Tensor:
    """Triangles that are linear in mel. The highest one ends a bin early, as in the reference."""
    bins_hz_K = torch.arange(_FFT_SAMPLES // 2 + 1, dtype=torch.float64) * SAMPLE_RATE_HZ / _FFT_SAMPLES
    mels_K = 1127.0 * torch.log1p(bins_hz_K / 700.0)
    top = 1127.0 * torch.log1p(torch.tensor(_HIGHEST_HZ / 700.0, dtype=torch.float64))
    edges = torch.linspace(0.0, float(top), NUM_MEL_BINS + 2, dtype=torch.float64)
    low_M, centre_M, high_M = edges[:-2], edges[1:-1], edges[2:]
    rising_KM = (mels_K[:, None] - low_M) / (centre_M - low_M)
    falling_KM = (high_M - mels_K[:, None]) / (high_M - centre_M)
    weights_KM = torch.minimum(rising_KM, falling_KM).clamp(min=0.0)
    weights_KM[int(_HIGHEST_HZ * _FFT_SAMPLES / SAMPLE_RATE_HZ) :] = 0.0
    return weights_KM.float().to(device)
