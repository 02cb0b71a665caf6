"""The backbone: a frozen causal LM from transformers that runs packs.

Letters: T tokens in a pack, K positions, D backbone width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Cache, PreTrainedModel, PreTrainedTokenizerBase

from molora.memory import free_bytes
from molora.model import attention
from molora.model.identity import Identity
from molora.model.pages import KeptLayers, PagePool, Surveyor
from molora.model.probe import compare, decoder, decoder_layers, run_stock
from molora.model.rotary import wrap_rotary
from molora.model.sharding import Steps
from molora.ranks import Ranks
from molora.routing import Flow, current_flow, flowing


class Backbone(nn.Module):
    """A frozen causal LM that runs packs. Always in eval mode, whatever `train` is told. Raises BackboneRefused if the
    model cannot run packed samples exactly. `shards` are the ranks over which the layers of the model lie, if they do;
    what is said of passes matters then only."""

    def __init__(
        self,
        model: PreTrainedModel,
        identity: Identity,
        *,
        probe: dict[str, Any] | None = None,
        shards: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.identity = identity
        self.folder = Path(identity.source)
        self.revision: str | None = None
        self.model = model.requires_grad_(False).eval()
        self._steps = None if shards is None else Steps(shards, self._idle_pass)
        stock = run_stock(model) if probe is None else None
        AttentionInterface.register(attention.NAME, attention.packed_attention)
        model.set_attn_implementation(attention.NAME)
        self.rotary = wrap_rotary(model)
        self.activation_checkpointing = False
        # Renamed in transformers 5.24.
        parameters = inspect.signature(decoder(model).forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        for layer in decoder_layers(model):
            layer.forward = self._checkpointed(layer.forward)
        self.probe = compare(model, stock, self._packed, self.head) if stock else probe or {}
        self.embed_scale: float = self.probe["embed_scale"]
        self.turn_ends: frozenset[int] = frozenset()
        self._kept: dict[torch.dtype, KeptLayers] = {}

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def embeddings_VD(self) -> Tensor:
        """The model's own input embeddings of all token ids."""
        weight: Any = self.model.get_input_embeddings().weight
        return weight

    @property
    def num_embeddings(self) -> int:
        """Token ids that have an embedding; some tokenizers know more."""
        return len(self.embeddings_VD)

    @property
    def max_tokens(self) -> int:
        """The context length in tokens; dynamic RoPE stretches the one it was trained with."""
        return int(self.config.max_position_embeddings * max([1.0, *(rotary.stretch for rotary in self.rotary)]))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def free_bytes(self) -> int:
        """What its device has left for keys and values, and all else."""
        return free_bytes(self.device)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the generation config's and `turn_ends`, those of the chat template."""
        return self.configured_stop_ids | self.turn_ends

    @property
    def configured_stop_ids(self) -> frozenset[int]:
        """The generation config's, which know more than the model config's."""
        generation = self.model.generation_config
        eos = generation.eos_token_id if generation is not None else self.config.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    def stop_at(self, turn_ends: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Stops answers at these tokens too; returns warnings where the generation config says otherwise."""
        self.turn_ends = turn_ends

        def named(ids: frozenset[int]) -> str:
            known = {id: tokenizer.convert_ids_to_tokens(id) for id in sorted(ids)}
            return ", ".join(f"{token} ({id})" for id, token in known.items()) or "nothing"

        warnings = []
        configured = self.configured_stop_ids
        if not turn_ends <= configured:
            warnings.append(
                f"backbone {self.identity.source}: its generation config stops at {named(configured)}, but its chat "
                f"template ends turns with {named(turn_ends)}; answers end at either"
            )
        if unknown := {id for id in configured if not 0 <= id < self.vocab_size}:
            unheld = f"{sorted(unknown)}, which its {self.vocab_size} tokens do not have"
            warnings.append(f"backbone {self.identity.source}: its generation config stops at {unheld}")
        return warnings

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode."""
        return super().train(False)

    def regime(self, length: int) -> tuple[int, ...]:
        """Changes exactly when a sample growing to `length` tokens changes its rotary frequencies."""
        return tuple(number for rotary in self.rotary for number in rotary.regimes(length))

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """The model's own input embeddings, (T, D)."""
        return self.model.get_input_embeddings()(token_ids_T)

    def forward(self, embeds_TD: Tensor, position_ids_T: Tensor, flow: Flow, cache: Cache | None = None) -> Tensor:
        """Final hidden states (T, D) of a pack of embeddings."""
        if self._steps is None:
            return self._hidden(embeds_TD, position_ids_T, flow, cache)
        return self._steps.run(self._hidden, embeds_TD, position_ids_T, flow, cache)

    @property
    def is_sharded(self) -> bool:
        """Whether its layers lie in shards over several ranks, which then have to make the same passes."""
        return self._steps is not None

    def catch_up(self, passes: int, *, backward: bool) -> None:
        """To be called by every rank before the `passes` that it makes, forward, and with True backward too."""
        if self._steps is not None:
            self._steps.catch_up(passes, backward=backward)

    def passes_at_will(self) -> AbstractContextManager[None]:
        """While entered, ranks make as many passes as each likes, forward alone. Raises RuntimeError for an error
        inside the layers, after which no rank can go on."""
        return nullcontext() if self._steps is None else self._steps.at_will()

    def _idle_pass(self, backward: bool) -> None:
        """A pass through all layers of which nothing comes."""
        with torch.set_grad_enabled(backward):
            embeds_1D = torch.zeros(1, self.width, device=self.device, dtype=self.model.dtype, requires_grad=backward)
            position_1 = torch.zeros(1, dtype=torch.long, device=self.device)
            hidden_1D = self._hidden(embeds_1D, position_1, Flow((1,)), None)
            if backward:
                hidden_1D.sum().backward()

    def _hidden(self, embeds_TD: Tensor, position_ids_T: Tensor, flow: Flow, cache: Cache | None) -> Tensor:
        with flowing(flow):
            output = decoder(self.model)(
                inputs_embeds=embeds_TD[None],
                position_ids=position_ids_T[None],
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            )
        return output.last_hidden_state[0]

    @torch.no_grad()
    def kept_layers(self) -> KeptLayers:
        """What every layer keeps of a token, as a forward of one token shows."""
        dtype = self.model.dtype
        if dtype not in self._kept:
            surveyor = Surveyor()
            token = torch.zeros(1, dtype=torch.long, device=self.device)
            self(self.embed(token), token, Flow((1,)), surveyor)
            self._kept[dtype] = surveyor.kept()
        return self._kept[dtype]

    def page_pool(self, num_pages: int, num_samples: int) -> PagePool:
        """A pool for samples that run with this backbone."""
        return PagePool(self.kept_layers(), num_pages, num_samples, self.embeddings_VD)

    def head(self, hidden_KD: Tensor) -> Tensor:
        """Logits (K, V)."""
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal LM has a head"
        logits = head(hidden_KD)
        # What the classes of Cohere, Granite and Gemma do after their head; the probe finds any other habit.
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(self.config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _packed(self, samples: Sequence[Tensor]) -> Tensor:
        """Final hidden states (T, D) of samples end to end, given as token ids."""
        lengths = tuple(len(ids) for ids in samples)
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        return self(self.embed(torch.cat([*samples])), positions_T, Flow(lengths))

    def _checkpointed(self, forward: Any) -> Any:
        # transformers checkpoints only in training mode, which a frozen backbone never is.
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self.activation_checkpointing and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            flow = current_flow()

            def again(*args: Any, **kwargs: Any) -> Any:
                with flowing(flow):
                    return forward(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, **kwargs)

        return run
