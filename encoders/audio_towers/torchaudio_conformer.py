"""torchaudio's Conformer blocks, with the leak of its padding closed.

Its attention hides padding, its convolution module does not: the depthwise convolution reads across a clip's end, and
GroupNorm takes its statistics over padding too. Here both see a clip as if it were alone.

Letters: N windows, S frames, C width.
"""

from typing import Any

from torch import Tensor, nn

from molora.encoders.audio_towers.conformer import Conformer, ConformerConfig


class TorchaudioConformer(Conformer):
    """The same subsampling and windows around `torchaudio.models.Conformer` with GroupNorm. Raises ImportError without
    torchaudio, ValueError for an even kernel size."""

    def _add_blocks(self, config: ConformerConfig) -> None:
        try:
            from torchaudio.models import Conformer as Blocks
        except ImportError as error:
            raise ImportError("tower kind torchaudio needs it: pip install 'molora[audio]'") from error
        if config.kernel_size % 2 == 0:
            raise ValueError(f"conformer: torchaudio's kernel_size is odd, got {config.kernel_size}")
        sizes = (config.width, config.heads, config.mlp_width, config.blocks, config.kernel_size)
        self.blocks = Blocks(*sizes, use_group_norm=True)

    def _blocks(self, frames_NSC: Tensor, padding_NS: Tensor) -> Tensor:
        layer: Any
        for layer in self.blocks.conformer_layers:
            frames_NSC = frames_NSC + 0.5 * layer.ffn1(frames_NSC)
            normed_NSC = layer.self_attn_layer_norm(frames_NSC)
            seen_NSC, _ = layer.self_attn(*3 * (normed_NSC.transpose(0, 1),), padding_NS, need_weights=False)
            frames_NSC = frames_NSC + seen_NSC.transpose(0, 1)
            frames_NSC = frames_NSC + _convolve(layer.conv_module, frames_NSC, padding_NS)
            frames_NSC = layer.final_layer_norm(frames_NSC + 0.5 * layer.ffn2(frames_NSC))
        return frames_NSC


def _convolve(module: Any, frames_NSC: Tensor, padding_NS: Tensor) -> Tensor:
    pointwise, gate, depthwise, norm, activation, out, _ = module.sequential
    padding_N1S = padding_NS[:, None]
    frames_NCS = gate(pointwise(module.layer_norm(frames_NSC).transpose(1, 2)))
    frames_NCS = depthwise(frames_NCS.masked_fill(padding_N1S, 0.0))
    return out(activation(_normed(norm, frames_NCS, padding_N1S))).transpose(1, 2)


def _normed(norm: nn.GroupNorm, frames_NCS: Tensor, padding_N1S: Tensor) -> Tensor:
    """GroupNorm of one group, over the frames that are not padding."""
    counts_N11 = (~padding_N1S).sum((1, 2), keepdim=True) * frames_NCS.shape[1]
    mean_N11 = frames_NCS.masked_fill(padding_N1S, 0.0).sum((1, 2), keepdim=True) / counts_N11
    centred_NCS = (frames_NCS - mean_N11).masked_fill(padding_N1S, 0.0)
    variance_N11 = centred_NCS.square().sum((1, 2), keepdim=True) / counts_N11
    return centred_NCS * (variance_N11 + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]
