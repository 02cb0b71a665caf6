"""MoLoRA: a frozen backbone, modalities with their encoders and projectors, adapters, and a router.

Letters: T tokens in a pack, N samples, S frames, C encoder width, D backbone width, K target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from molora.modality import Encoder, Frames, Modality
from molora.model import lora
from molora.model.backbone import Backbone
from molora.model.loss import target_losses, word_losses
from molora.model.pages import Feed
from molora.model.projector import Projector
from molora.model.quantization import num_weights
from molora.model.shared import hidden_at
from molora.pack import Item, Media, Pack
from molora.routing import Flow, Router, Routing
from molora.seeding import seeded


@dataclass(frozen=True)
class Losses:
    """Per sample: the sum of its target losses (fp32, differentiable), the number of its targets, the routing that it
    ran with, and what the router adds to its mean loss."""

    sums_N: Tensor
    num_targets: tuple[int, ...]
    routing: Routing
    router_N: Tensor


class MoLoRA(nn.Module):
    """A mixture-of-LoRAs multimodal model. It knows no modality by name. `modalities` order fixes the modality ids of
    this process (1 + index), as in the processor."""

    def __init__(
        self,
        backbone: Backbone,
        modalities: Mapping[str, Modality],
        adapters: Mapping[str, LoraConfig],
        router: Router,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.modalities = dict(modalities)
        self.adapters = dict(adapters)
        self.router: Router = router.to(backbone.device)  # pyright: ignore[reportAttributeAccessIssue]
        encoders: dict[str, Encoder] = {}
        projectors: dict[str, nn.ModuleDict] = {}
        for name, modality in self.modalities.items():
            # Keyed by name, so that adding a modality does not change how the others start.
            with seeded(seed, "encoder", name):
                encoders[name] = modality.build_encoder()
            with seeded(seed, "projectors", name):
                width = encoders[name].width
                projectors[name] = nn.ModuleDict({k: Projector(width, backbone.width) for k in modality.projectors()})
        self.encoders = nn.ModuleDict(encoders).to(backbone.device)
        self.projectors = nn.ModuleDict(projectors).to(backbone.device)
        for name, config in self.adapters.items():
            with seeded(seed, "adapter", name):
                lora.inject(backbone.model, name, config, where=f"adapter {name!r}")
        # Whether `generate` computes every sample by itself, so that its bits do not depend on the others.
        self.deterministic_batch = False
        self.find_parts()
        self.requires_grad_(False)
        self.train(False)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def train(self, mode: bool = True) -> MoLoRA:
        """Parts that train follow `mode`, and adapter dropout; the backbone and frozen encoders stay in eval."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.train(mode and any(p.requires_grad for p in encoder.parameters()))
        lora.set_dropout(self.backbone.model, mode)
        return self

    def parts(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """The parameters of everything but the backbone, by part. Parts are "encoders.<name>",
        "projectors.<name>.<projector>", "adapters.<name>" and "router"; those without parameters are left out. A
        parameter's full name is the part's name, a dot, and its key."""
        return self._parts

    def find_parts(self) -> None:
        """Finds the parameters of every part; to be called again where others were put in their place."""
        parts = {f"encoders.{name}": dict(encoder.named_parameters()) for name, encoder in self.encoders.items()}
        for name, projectors in self.projectors.items():
            for key, projector in projectors.named_children():
                parts[f"projectors.{name}.{key}"] = dict(projector.named_parameters())
        for name in self.adapters:
            parts[f"adapters.{name}"] = lora.adapter_parameters(self.backbone.model, name)
        parts["router"] = dict(self.router.named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
        self._parts = {name: parameters for name, parameters in parts.items() if parameters}

    def num_backbone_parameters(self) -> int:
        """How many parameters the backbone has without the adapters, which lie in its layers."""
        parts = self.parts().items()
        adapters = {id(p) for name, part in parts if name.startswith("adapters.") for p in part.values()}
        return sum(num_weights(p) for p in self.backbone.parameters() if id(p) not in adapters)

    def router_tensors(self) -> dict[str, Tensor]:
        """What the router has learned; empty for one that does not learn."""
        return self.router.state_dict()  # pyright: ignore[reportAttributeAccessIssue]

    def parts_of(self, modalities: frozenset[str]) -> frozenset[str]:
        """The parts that a sample with these modalities runs through."""
        names = {f"encoders.{name}" for name in modalities}
        names |= {f"projectors.{name}.{self.modalities[name].projector(modalities)}" for name in modalities}
        names |= {f"adapters.{name}" for name in self.router.adapters(modalities)}
        names |= {"router"} if self.router.learns(modalities) else set()
        return frozenset(names & self._parts.keys())

    def training_parts(self) -> frozenset[str]:
        """The parts that have something to train."""
        return frozenset(name for name, part in self.parts().items() if any(p.requires_grad for p in part.values()))

    def trains(self, modalities: frozenset[str]) -> bool:
        """Whether such a sample has anything to train."""
        return bool(self.parts_of(modalities) & self.training_parts())

    def embed(self, pack: Pack) -> Tensor:
        """Token embeddings (T, D) with media tokens spliced in at their positions. Raises ValueError if a projector
        returns another number of tokens than the prompt reserved."""
        embeds_TD = self.backbone.embed(pack.token_ids_T)
        for index, name in enumerate(self.modalities, start=1):
            if name in pack.media:
                media = pack.media[name]
                with self._compute_dtype():
                    tokens_TD = self._media_tokens(name, media) / self.backbone.embed_scale
                if media.reserved != len(tokens_TD):
                    returned = f"the projector returned {len(tokens_TD)} tokens"
                    raise ValueError(f"{name}: prompts reserve {media.reserved} positions, {returned}")
                places_T1 = (pack.modality_ids_T == index)[:, None]
                embeds_TD = embeds_TD.masked_scatter(places_T1, tokens_TD.to(embeds_TD.dtype))
        return embeds_TD

    @torch.no_grad()
    def frames(self, *items: Item) -> Frames:
        """The frames of items of one modality, encoded in one call: of an item alone, the same bits in any pack."""
        name = items[0].modality
        tensors = self.modalities[name].collate([item.prepared for item in items])
        tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        with self._compute_dtype():
            return self.encoders[name](**tensors)

    def _compute_dtype(self) -> torch.autocast:
        """In which encoders and projectors compute in the backbone's dtype: their weights stay as they are stored and
        are cast where they are used; norms and losses stay in fp32."""
        dtype = self.backbone.model.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))

    def _media_tokens(self, name: str, media: Media) -> Tensor:
        """The items of one modality through its encoder and each item's own projector, in reading order."""
        encoder = self.encoders[name]
        with nullcontext() if any(p.requires_grad for p in encoder.parameters()) else torch.no_grad():
            frames: Frames = media.frames or encoder(**media.tensors)
        if frames.lengths != media.num_tokens:
            reserved = media.num_tokens
            item = next((i for i, n in enumerate(reserved) if frames.lengths[i : i + 1] != (n,)), len(reserved))
            raise ValueError(
                f"{name}: item {item} of the pack reserves {reserved[item : item + 1]} tokens, its encoder "
                f"returned {frames.lengths[item : item + 1]}; num_tokens of the plugin's `prepare` must equal what its "
                "encoder gives"
            )
        projectors: Any = self.projectors[name]
        items = frames.frames_SC.split(frames.lengths)
        if len(set(media.projectors)) == 1:
            return projectors[media.projectors[0]](frames.frames_SC)
        tokens: list[Tensor] = [frames.frames_SC] * len(items)
        for key in sorted(set(media.projectors)):
            chosen = [i for i, projector in enumerate(media.projectors) if projector == key]
            projected = projectors[key](torch.cat([items[i] for i in chosen]))
            for i, part in zip(chosen, projected.split([len(items[i]) for i in chosen]), strict=True):
                tokens[i] = part
        return torch.cat(tokens)

    def forward(
        self,
        pack: Pack,
        *,
        embeds_TD: Tensor | None = None,
        routing: Routing | None = None,
        feed: Feed | None = None,
    ) -> Tensor:
        """Final hidden states (T, D): embed and splice, route, run the backbone. `embeds_TD` replaces the pack's own
        when a sample goes on from what `feed` knows; `routing` is given by callers that want to know it."""
        if embeds_TD is None:
            embeds_TD = self.embed(pack)
        if routing is None:
            routing = self.router(pack, embeds_TD)
        if feed is None:
            return self.backbone(embeds_TD, pack.position_ids_T, Flow(pack.lengths, routing))
        return self.backbone(embeds_TD, feed.position_ids_T, Flow(pack.lengths, routing, feed.ends), feed)

    def logits(self, pack: Pack) -> Tensor:
        """Logits (T, V) at every position; for tests and small packs."""
        return self.backbone.head(self(pack))

    def losses(self, pack: Pack) -> Losses:
        """Next-token losses on the pack's target positions."""
        embeds_TD = self.embed(pack)
        routing = self.router(pack, embeds_TD)
        # On the host, where the pack's targets are, so that a device need not be waited for.
        is_target_T = pack.targets_T.clone()
        is_target_T[torch.tensor((0, *pack.lengths[:-1])).cumsum(0)] = False  # nothing precedes a sample's first token
        counts_N = torch.stack([targets.sum() for targets in is_target_T.split(pack.lengths)])
        samples_K = torch.arange(len(pack)).repeat_interleave(counts_N).to(self.device)
        places_K = is_target_T.nonzero().squeeze(1)
        before_KD = hidden_at(self, pack, embeds_TD, routing, places_K - 1)
        targets_K = pack.token_ids_T[places_K.to(self.device)]
        losses_K = target_losses(self.backbone.head, before_KD, targets_K, self.backbone.vocab_size)
        sums_N = torch.zeros(len(pack), device=self.device).index_add(0, samples_K, losses_K)
        router_N = torch.zeros_like(sums_N) if routing.losses_N is None else routing.losses_N
        return Losses(sums_N, tuple(counts_N.tolist()), routing, router_N)

    def word_losses(self, pack: Pack, words: Sequence[Tensor], vocabulary: int | None = None) -> Losses:
        """How far the media tokens of each sample are from the embeddings of its words (K,), in their order: no layer
        of the backbone runs, and no adapter. Words are told apart from the first `vocabulary` tokens, or from all."""
        embeds, is_media = self.embed(pack).split(pack.lengths), (pack.modality_ids_T > 0).split(pack.lengths)
        media = [embeds_TD[media_T.nonzero()[:, 0]] for embeds_TD, media_T in zip(embeds, is_media, strict=True)]
        on_device = [words_K.to(self.device) for words_K in words]
        sums_N = word_losses(media, on_device, self.backbone.embeddings_VD[:vocabulary])
        return Losses(sums_N, tuple(map(len, words)), Routing(()), torch.zeros_like(sums_N))
