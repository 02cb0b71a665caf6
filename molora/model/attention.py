"""The one attention function: packed samples that never see each other, in training, prefill and decode alike.

The backbone registers it with transformers' attention interface under `NAME`. The samples' query lengths come from the
flow. Keys are packed like the queries (no cache, or prompts that begin), `Segments` (prompts that go on) or `Paged`
(one new token of every sample).

Letters: T query tokens in a pack, H query heads, G key/value heads, Q queries and K keys of one sample, d head width,
N samples, P pages, B tokens in a page, M pages of the sample with the most, S samples that share a page, R = H / G.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from molora.routing import current_flow

NAME = "molora"

# Arguments that models hand on to every attention function and that packing already decides.
_SETTLED = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits"})
_OF_PAGES = frozenset({"enable_gqa", "seqused_k", "block_table", "num_splits"})


class Segments(tuple[Tensor, ...]):
    """Keys or values of a pack, one (1, G, K, d) tensor per sample."""


@dataclass
class Noted:
    """Keys of a forward that finds out which window each layer has."""

    states: Tensor
    window: int | None = None


@dataclass(frozen=True)
class PageGroup:
    """Pages that S samples hold each: 1, or more where prompts are shared. `chosen` are the pages, and neighbours of
    theirs that are given to the first sample, whose results nobody reads. `mask_P11B` is added to scores: 0 on tokens
    that count, -inf on others."""

    chosen: slice | Tensor
    owners_PS: Tensor
    mask_P11B: Tensor


class PageTable:
    """Which pages hold the keys of each sample in a step of decoding, and how many of their tokens: what all layers of
    one window share. Pages are in the order of the tokens, or in that of a ring; attention to one query is the same."""

    def __init__(self, pages: list[list[int]], used: list[int], page_tokens: int, like: Tensor) -> None:
        self._page_tokens = page_tokens
        self._device, self._dtype = like.device, like.dtype
        self.used = used
        self.pages = [held[: -(-count // page_tokens)] for held, count in zip(pages, used, strict=True)]

    def __len__(self) -> int:
        return len(self.used)

    @cached_property
    def alone(self) -> slice | None:
        """The pages of a single sample, if they are neighbours in its order."""
        (pages,) = self.pages if len(self) == 1 else ([],)
        return slice(pages[0], pages[-1] + 1) if pages and pages == [*range(pages[0], pages[-1] + 1)] else None

    @cached_property
    def pages_P(self) -> Tensor:
        """Every sample's pages, one after another."""
        return torch.tensor([page for held in self.pages for page in held], device=self._device)

    @cached_property
    def by_page(self) -> tuple[list[PageGroup], Tensor]:
        """The pages by the number of samples that hold each. And where the results of a sample's pages (N, M) are among
        those of all groups, S of every page: those of its first one for places that it has no page for."""
        size = self._page_tokens
        owners: dict[int, list[int]] = {}
        counts: dict[int, int] = {}
        for owner, held in enumerate(self.pages):
            for place, page in enumerate(held):
                owners.setdefault(page, []).append(owner)
                counts[page] = min(size, self.used[owner] - place * size)
        groups: list[PageGroup] = []
        places: dict[tuple[int, int], int] = {}
        num_results = 0
        for number in sorted({len(its) for its in owners.values()}):
            alike = {page: its for page, its in owners.items() if len(its) == number}
            first, after = min(alike), max(alike) + 1
            # Neighbours are read without a copy, even if some between them are not these.
            close = after - first <= 2 * len(alike)
            pages = [*range(first, after)] if close else [*alike]
            for page in pages:
                places |= {(owner, page): num_results + n for n, owner in enumerate(alike.get(page, ()))}
                num_results += number
            beyond_PB = torch.arange(size) >= torch.tensor([[counts.get(page, size)] for page in pages])
            mask_PB = torch.zeros(beyond_PB.shape, dtype=self._dtype).masked_fill(beyond_PB, -torch.inf)
            chosen = slice(first, after) if close else torch.tensor(pages, device=self._device)
            owners_PS = torch.tensor([alike.get(page, [0] * number) for page in pages], device=self._device)
            groups.append(PageGroup(chosen, owners_PS, mask_PB[:, None, None].to(self._device)))
        return groups, self._filled([[places[owner, page] for page in its] for owner, its in enumerate(self.pages)])

    @cached_property
    def absent_NM11(self) -> Tensor:
        """-inf on places that a sample has no page for, 0 on others."""
        counts_N1 = torch.tensor([[len(held)] for held in self.pages], device=self._device)
        absent_NM = torch.arange(max(map(len, self.pages)), device=self._device) >= counts_N1
        return torch.zeros(absent_NM.shape).masked_fill(absent_NM, -torch.inf)[:, :, None, None]

    @cached_property
    def table_NM(self) -> Tensor:
        """The samples' pages, each filled up with its first."""
        return self._filled(self.pages)

    def _filled(self, rows: list[list[int]]) -> Tensor:
        # With a sample's own: what is no number in another's page would survive a share of 0.
        most = max(map(len, rows))
        return torch.tensor([[*row, *row[:1] * (most - len(row))] for row in rows], device=self._device)

    @cached_property
    def used_N(self) -> Tensor:
        return torch.tensor(self.used, dtype=torch.int32, device=self._device)

    @cached_property
    def starts_N(self) -> Tensor:
        """One query of each sample, as offsets."""
        return torch.arange(len(self) + 1, dtype=torch.int32, device=self._device)

    @cached_property
    def visible_N11K(self) -> Tensor:
        """True on the tokens that count, for the keys of `table_NM`."""
        keys_K = torch.arange(self.table_NM.shape[1] * self._page_tokens, device=self._device)
        return (keys_K < self.used_N[:, None])[:, None, None]


@dataclass(frozen=True)
class Paged:
    """Keys or values of all samples in one layer's pages (P, B, G, d), and where each sample's are."""

    pages: Tensor
    table: PageTable

    def gathered(self) -> Tensor:
        """The keys of every sample, (N, G, K, d), without a copy for one sample in neighbouring pages."""
        if len(self.table) > 1:
            chosen_NKGd = self.pages[self.table.table_NM].flatten(1, 2)
        else:
            alone = self.table.alone
            its = self.pages[self.table.pages_P] if alone is None else self.pages[alone]
            chosen_NKGd = its.flatten(0, 1)[None, : self.table.used[0]]
        return chosen_NKGd.transpose(1, 2)


@dataclass(frozen=True)
class _Scoring:
    """How a layer turns queries and keys into weights."""

    scaling: float | None
    window: int | None
    softcap: float | None
    s_aux: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.s_aux is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Segments | Noted | Paged,
    value: Tensor | Segments | Paged,
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

    if isinstance(key, Noted):
        key.window, key = sliding_window, key.states
    scoring = _Scoring(scaling, sliding_window, softcap, s_aux)
    if isinstance(key, Paged):
        assert isinstance(value, Paged)
        return _paged(module, query, key, value, scoring), None
    queries = query.split(flow.lengths, dim=2)
    keys = key if isinstance(key, Segments) else key.split(flow.lengths, dim=2)
    assert not isinstance(value, Paged)
    values = value if isinstance(value, Segments) else value.split(flow.lengths, dim=2)
    if _in_half_on_cuda(query) and scoring.is_plain:
        return _varlen(query, keys, values, flow.lengths, scoring), None
    outputs = []
    for query_HQd, key_GKd, value_GKd in zip(queries, keys, values, strict=True):
        mask_QK = _mask(query_HQd.shape[2], key_GKd.shape[2], sliding_window, query.device)
        if scoring.is_plain:
            out, _ = sdpa_attention_forward(module, query_HQd, key_GKd, value_GKd, mask_QK, scaling=scaling)
        else:
            out = _explicit(query_HQd, key_GKd, value_GKd, mask_QK, scoring)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


@cache
def _kernel_reads_pages() -> bool:
    """Whether this torch's kernel finds pages by a table, as that of torch 2.13 does."""
    return inspect.signature(varlen_attn).parameters.keys() >= _OF_PAGES


def _in_half_on_cuda(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where query q may see key k; None where plain causal attention (or a single query) says the same."""
    if (num_queries == 1 or num_queries == num_keys) and (window is None or num_keys <= window):
        return None
    query_Q1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_1K = torch.arange(num_keys, device=device)[None, :]
    visible = key_1K <= query_Q1
    if window is not None:
        visible &= key_1K > query_Q1 - window
    return visible[None, None]


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: _Scoring) -> Tensor:
    """Attention written out, for the score caps and sinks that fused kernels do not take."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = visible.tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if scoring.s_aux is not None:
        sink = scoring.s_aux.reshape(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2)


def _varlen(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], lengths: tuple[int, ...], scoring: _Scoring
) -> Tensor:
    """The same attention in one fused kernel call (CUDA, half precision)."""
    groups = query.shape[1] // keys[0].shape[1]
    key_THd, value_THd = (
        repeat_kv(torch.cat(segments, dim=2), groups)[0].transpose(0, 1).contiguous() for segments in (keys, values)
    )
    num_keys = tuple(key.shape[2] for key in keys)
    window = scoring.window
    out_THd = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key_THd,
        value_THd,
        _offsets(lengths, query.device),
        _offsets(num_keys, query.device),
        max(lengths),
        max(num_keys),
        scale=scoring.scaling,
        # (-1, 0) is plain causal; a window counts the query's own position.
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )
    assert isinstance(out_THd, Tensor)
    return out_THd[None]


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def _paged(module: nn.Module, query: Tensor, key: Paged, value: Paged, scoring: _Scoring) -> Tensor:
    """One query of every sample, (1, H, N, d), to output (1, N, H, d), in a few calls whatever the number of samples.
    Every key that counts is visible: a layer with a window keeps no others."""
    table, (_, heads, _, width) = key.table, query.shape
    groups, value_width = key.pages.shape[2], value.pages.shape[3]
    if _in_half_on_cuda(query) and scoring.is_plain and _kernel_reads_pages():
        return _by_table(query, key, value, scoring)
    query_NHd = query[0].transpose(0, 1)
    if not scoring.is_plain:
        visible = table.visible_N11K if len(table) > 1 else None
        out = _explicit(query_NHd[:, :, None], key.gathered(), value.gathered(), visible, scoring)
        return out.transpose(0, 1)
    # The query heads that share keys are rows of one matrix, so keys need not be repeated.
    query_NGRd = query_NHd.reshape(len(table), groups, heads // groups, width)
    if len(table) > 1 and query.device.type == "cpu" and width == value_width:
        out = _by_page(query_NGRd, key.pages, value.pages, table, scoring)
    else:
        visible = table.visible_N11K if len(table) > 1 else None
        out = F.scaled_dot_product_attention(
            query_NGRd, key.gathered(), value.gathered(), attn_mask=visible, scale=scoring.scaling
        )
    return out.reshape(1, len(table), heads, value_width)


def _by_page(query_NGRd: Tensor, keys_PBGd: Tensor, values_PBGd: Tensor, table: PageTable, scoring: _Scoring) -> Tensor:
    """Attention to each page on its own, in one call for all that as many samples share, then the pages of each sample
    put together by their share of the sample's softmax. Source: "Flash-Decoding for long-context inference", Dao,
    Haziza, Massa and Sizov, 2023."""
    groups, places_NM = table.by_page
    outs, logsumexps = [], []
    for group in groups:
        # The queries of samples that share a page are rows of one matrix, as heads are that share keys.
        query_PSGRd = query_NGRd[group.owners_PS]
        both = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_PSGRd.transpose(1, 2).flatten(2, 3),
            keys_PBGd[group.chosen].transpose(1, 2),
            values_PBGd[group.chosen].transpose(1, 2),
            attn_mask=group.mask_P11B,
            scale=scoring.scaling,
        )
        for each, found in zip(both, (outs, logsumexps), strict=True):
            found.append(each.unflatten(2, (query_PSGRd.shape[1], -1)).transpose(1, 2).flatten(0, 1))
    out, logsumexp = (found[0] if len(groups) == 1 else torch.cat(found) for found in (outs, logsumexps))
    if places_NM.shape[1] == 1:
        return out[places_NM[:, 0]]
    shares_NMGR = (logsumexp[places_NM] + table.absent_NM11).softmax(1)
    return (shares_NMGR[..., None] * out[places_NM]).sum(1).to(query_NGRd.dtype)


def _by_table(query: Tensor, key: Paged, value: Paged, scoring: _Scoring) -> Tensor:
    """One call of a kernel that finds the pages itself (CUDA, half precision)."""
    table = key.table
    out_NHd: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key.pages,
        value.pages,
        table.starts_N,
        F.pad(table.used_N.cumsum(0, dtype=torch.int32), (1, 0)),
        1,
        max(table.used),
        scale=scoring.scaling,
        enable_gqa=True,  # pyright: ignore[reportCallIssue]
        seqused_k=table.used_N,  # pyright: ignore[reportCallIssue]
        block_table=table.table_NM.int(),  # pyright: ignore[reportCallIssue]
        num_splits=1,  # pyright: ignore[reportCallIssue]
    )
    return out_NHd[None]
