"""The log-mel front end: waveforms to 80 log-mel bins, a frame every 10 ms.

Letters: L samples, S frames, W samples of a frame, K bins of the Fourier transform, M mel bins.

Source: the speech features of microsoft/Phi-4-multimodal-instruct (processing_phi4mm.py).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from molora.encoders.sound import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ

NUM_MEL_BINS = 80

_FFT_SAMPLES = 512
_PRE_EMPHASIS = 0.97
_FULL_SCALE = 32768.0
_HIGHEST_HZ = 7690.0

# Bounds the memory of one transform; results do not depend on it.
_FRAMES_PER_CALL = 1024


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
    counts = [num_frames(len(wave) * shrink) for wave in waves]
    features_SM = waves[0].new_empty((sum(counts), NUM_MEL_BINS), dtype=torch.float32)
    transform = _Transform(min(_FRAMES_PER_CALL, max(counts)), frame, waves[0].device)
    for wave, clip_SM in zip(waves, features_SM.split(counts), strict=True):
        frames_SW = wave.float().unfold(0, frame, hop)
        for some_SW, some_SM in zip(frames_SW.split(_FRAMES_PER_CALL), clip_SM.split(_FRAMES_PER_CALL), strict=True):
            transform.fill(some_SM, some_SW)
    return features_SM


class _Transform:
    """Frames to features, in memory that every call uses again: fresh memory costs more than the arithmetic."""

    def __init__(self, max_frames: int, frame: int, device: torch.device) -> None:
        fft = _FFT_SAMPLES * frame // FRAME_SAMPLES
        self.window_W = _window_W(frame, device)
        # A frame is followed by zeros up to the transform's length; with half the samples, so is its spectrum.
        self.samples_SW = torch.zeros(max_frames, fft, device=device)
        self.power_SK = torch.zeros(max_frames, _FFT_SAMPLES // 2 + 1, device=device)

    def fill(self, features_SM: Tensor, frames_SW: Tensor) -> None:
        """Pre-emphasis inside the frame, window, power spectrum, mel bins, logarithm. Window and full scale are one
        factor for each sample. A frame's first sample is its own predecessor."""
        count, frame = frames_SW.shape
        emphasised_SW = self.samples_SW[:count, :frame]
        torch.sub(frames_SW[:, 1:], frames_SW[:, :-1], alpha=_PRE_EMPHASIS, out=emphasised_SW[:, 1:])
        torch.mul(frames_SW[:, :1], 1 - _PRE_EMPHASIS, out=emphasised_SW[:, :1])
        emphasised_SW.mul_(self.window_W)
        # Without `out`, into which torch would copy.
        squares_SK2 = torch.view_as_real(torch.fft.rfft(self.samples_SW[:count])).square_()
        if frame < FRAME_SAMPLES:  # the Nyquist bin gives way to the empty half
            squares_SK2 = squares_SK2[:, :-1]
        power_SK = self.power_SK[:count]
        torch.add(squares_SK2[..., 0], squares_SK2[..., 1], out=power_SK[:, : squares_SK2.shape[1]])
        torch.mm(power_SK, _mel_KM(features_SM.device), out=features_SM)
        features_SM.clamp_(min=1.0).log_()


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
