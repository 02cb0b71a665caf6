"""Whether a sample's bits depend on its company, and what it costs to compute products so that they cannot.

    python benchmarks/batch_invariance.py [--dtype bfloat16 float32] [--repeats 3]

Eight texts of 5 to 48 tokens in one pack, then one step of decoding of all of them, through the backbone of
mixed_step.py. Every linear layer and the head compute the rows of a pack in one product (as molora does), sample by
sample, or in blocks of a fixed number of rows, the last one filled with zeros. Beside each: how many of the eight
samples have the bits that they have alone, computed the same way, and processor time as a ratio to one product.

Then `deterministic_batch` itself, adapters, projector and sampling included: the samples of mixed_step.py are answered
with and without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from mixed_step import NUM_PICTURES, NUM_TEXTS, VOCAB_SIZE, Molora, make_backbone, make_samples
from torch import Tensor, nn

from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routing import Flow, current_flow

LENGTHS = (5, 8, 12, 16, 20, 24, 32, 48)
NEW_TOKENS = 16
WAYS = ("one product", "by sample", "blocks of 4", "blocks of 16", "blocks of 64")


@contextmanager
def products(model: nn.Module, way: str) -> Iterator[None]:
    """Lets every linear layer compute its rows this way."""

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        flow = current_flow()
        if way == "by sample":
            lengths = flow.lengths if flow is not None else (1,) * len(rows)
            out = torch.cat([F.linear(part, layer.weight, layer.bias) for part in rows.split(lengths)])
        else:
            block = int(way.rpartition(" ")[2])
            filled = F.pad(rows, (0, 0, 0, -len(rows) % block))
            out = torch.cat([F.linear(part, layer.weight, layer.bias) for part in filled.split(block)])[: len(rows)]
        return out.unflatten(0, x.shape[:-1])

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if way != "one product":
        for layer in layers:
            layer.forward = linear.__get__(layer)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def run(backbone: Backbone, samples: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Logits of the last prompt position and of the token after it, sample by sample; seconds of prefill and decode."""
    lengths = tuple(len(sample) for sample in samples)
    positions = torch.cat([torch.arange(length) for length in lengths])
    kept, seconds = backbone.kept_layers(), []
    pool = backbone.page_pool(sum(kept.pages_for(length + 1) for length in lengths), len(lengths))
    pages = [held for length in lengths if (held := pool.admit(length + 1))]

    def timed(work: Callable[[], Tensor]) -> Tensor:
        started = time.process_time()
        made = work()
        seconds.append(time.process_time() - started)
        return made

    ends = torch.tensor(lengths).cumsum(0) - 1
    prompts, tokens = torch.cat(samples), torch.stack([sample[0] for sample in samples])

    def prefill() -> Tensor:
        feed = pool.feed(pages, lengths, lengths)
        return backbone.head(backbone(backbone.embed(prompts), positions, Flow(lengths), feed)[ends])

    def decode() -> Tensor:
        ones = (1,) * len(samples)
        feed = pool.feed(pages, ones, [length + 1 for length in lengths])
        return backbone.head(backbone(backbone.embed(tokens), feed.position_ids_T, Flow(ones), feed))

    first, second = timed(prefill), timed(decode)
    return list(first), list(second), seconds


def answer(model: MoLoRA, samples: list[Sample]) -> tuple[dict[str, list[int]], list[float]]:
    """The answers' tokens; seconds until every sample has its first one, and for all that follow."""
    tokens: dict[str, list[int]] = defaultdict(list)
    clock = [time.process_time()]
    for number, step in enumerate(generate(model, samples, GenerationConfig(max_new_tokens=NEW_TOKENS)), start=1):
        tokens[step.id].append(step.token_id)
        if number in (len(samples), NEW_TOKENS * len(samples)):
            clock.append(time.process_time())
    return tokens, [end - start for start, end in pairwise(clock)]


def show_switch(dtype: torch.dtype, repeats: int) -> None:
    """Prints what `deterministic_batch` costs on the samples of mixed_step.py."""
    samples = make_samples()
    models: list[Any] = [make_backbone("cpu", dtype) for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = None  # every answer has as many tokens
    plain, exact = (Molora(model, samples, "cpu").model for model in models)
    exact.deterministic_batch = True
    ratios: list[list[float]] = []
    for _ in range(1 + repeats):
        (_, off), (tokens, on) = answer(plain, samples), answer(exact, samples)
        ratios.append([exactly / plainly for exactly, plainly in zip(on, off, strict=True)])
    first, later = (statistics.median(side) for side in zip(*ratios[1:], strict=True))
    alone = {sample.id: answer(exact, [sample])[0][sample.id] for sample in samples}
    print(f"deterministic_batch, {NUM_PICTURES} pictures and {NUM_TEXTS} texts: {NEW_TOKENS} tokens each,")
    print(f"{'the same' if tokens == alone else 'NOT the same'} as alone; first {first:.2f}, later {later:.2f}\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, the ways taken in turn (default 3)")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    for dtype in arguments.dtype:
        model: Any = make_backbone("cpu", getattr(torch, dtype))
        backbone = Backbone(model, Identity("random", "", "", "", ""))
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        equal: dict[str, tuple[int, int]] = {}
        for _ in range(1 + arguments.repeats):
            for way in WAYS:
                with products(model, way):
                    prefill, decode, seconds = run(backbone, samples)
                    if way not in equal:
                        alone = [run(backbone, [sample]) for sample in samples]
                        equal[way] = (
                            sum(torch.equal(mine, its[0][0]) for mine, its in zip(prefill, alone, strict=True)),
                            sum(torch.equal(mine, its[1][0]) for mine, its in zip(decode, alone, strict=True)),
                        )
                times[way].append(seconds)
        print(f"{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print("                equal to alone            ratio of processor time")
        print("products        prefill   decode          prefill   decode")
        for way in WAYS:
            ratios = [
                statistics.median(
                    mine[moment] / base[moment]
                    for mine, base in zip(times[way][1:], times["one product"][1:], strict=True)
                )
                for moment in (0, 1)
            ]
            told = [f"{count} of {len(samples)}" for count in equal[way]]
            print(f"{way:<16}{told[0]:<10}{told[1]:<16}{ratios[0]:<10.2f}{ratios[1]:.2f}")
        show_switch(getattr(torch, dtype), arguments.repeats)


if __name__ == "__main__":
    main()
