"""The one attention function: packed samples that never see each other, in training, prefill and decode alike.

The backbone registers it with transformers' attention interface under `NAME`. The samples' query lengths come from the
flow, keys either packed like the queries (no cache) or as `Segments`, one tensor per sample (from `PackedCache`).

Letters: T query tokens in a pack, H query heads, G key/value heads, Q queries and K keys of one sample, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from molora.routing import current_flow

NAME = "molora"

# Arguments that models hand on to every attention function and that packing already decides.
_SETTLED = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits"})


class Segments(tuple[Tensor, ...]):
    """Keys or values of a pack, one (1, G, K, d) tensor per sample."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Segments,
    value: Tensor | Segments,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a pack; query (1, H, T, d) to output (1, T, H, d). The last query of a
    sample sees its last key, so a sample may hold more keys than queries (decode). `s_aux` (H,) are attention sinks;
    `softcap` bounds the scores."""
    flow = current_flow()
    if flow is None:
        raise RuntimeError("packed attention ran outside a molora forward: the pack's sample lengths are unknown")
    name = type(module).__name__
    if unknown := sorted(key for key, given in kwargs.items() if key not in _SETTLED and given is not None):
        raise NotImplementedError(f"{name} passes attention arguments molora does not honour: {unknown}")
    if attention_mask is not None:
        raise NotImplementedError(f"{name} passes an attention mask; packed attention takes none")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"{name} asks for attention that is not causal")
    if dropout:
        raise NotImplementedError(f"{name} asks for attention dropout {dropout}; the backbone is frozen")

    queries = query.split(flow.lengths, dim=2)
    keys = key if isinstance(key, Segments) else key.split(flow.lengths, dim=2)
    values = value if isinstance(value, Segments) else value.split(flow.lengths, dim=2)
    plain = softcap is None and s_aux is None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and plain:
        return _varlen(module, query, keys, values, flow.lengths, scaling, sliding_window), None
    outputs = []
    for query_HQd, key_GKd, value_GKd in zip(queries, keys, values, strict=True):
        if query_HQd.shape[2] == 1 and sliding_window is not None:
            key_GKd, value_GKd = key_GKd[:, :, -sliding_window:], value_GKd[:, :, -sliding_window:]
        mask_QK = _mask(query_HQd.shape[2], key_GKd.shape[2], sliding_window, query.device)
        if plain:
            out, _ = sdpa_attention_forward(module, query_HQd, key_GKd, value_GKd, mask_QK, scaling=scaling)
        else:
            out = _explicit(module, query_HQd, key_GKd, value_GKd, mask_QK, scaling, softcap, s_aux)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where query q may see key k; None where plain causal attention (or a single query) says the same."""
    if num_queries == 1 or (num_queries == num_keys and (window is None or num_keys <= window)):
        return None
    query_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_1K = torch.arange(num_keys, device=device)[None, :]
    visible = key_1K <= query_Q1
    if window is not None:
        visible &= key_1K > query_Q1 - window
    return visible[None, None]


def _explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_QK: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention written out, for the score caps and sinks that fused kernels do not take."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask_QK is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask_QK = visible.tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask_QK, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(1, -1, query.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2)


def _varlen(
    module: nn.Module,
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same attention in one fused kernel call (CUDA, half precision)."""
    groups = query.shape[1] // keys[0].shape[1]
    key_THd, value_THd = (
        repeat_kv(torch.cat(segments, dim=2), groups)[0].transpose(0, 1).contiguous() for segments in (keys, values)
    )
    num_keys = tuple(key.shape[2] for key in keys)
    out_THd = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key_THd,
        value_THd,
        _offsets(lengths, query.device),
        _offsets(num_keys, query.device),
        max(lengths),
        max(num_keys),
        scale=scaling,
        # (-1, 0) is plain causal; a window counts the query's own position.
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )
    assert isinstance(out_THd, Tensor)
    return out_THd[None]


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
