"""Several answers to each of some prompts that are read once, beside the same answers that each read their prompt.

From the repository root: python -m benchmarks.several_answers [--smollm FOLDER] [--answers 8] [--new-tokens 48]
    [--prompts 8] [--prompt-tokens 100 600] [--repeats 3]

Texts are random tokens for SmolLM2-135M-Instruct, if its folder is given. Pictures are those of `mixed_step.py`, 545
tokens each with 48 of text, and their frames are known. Answers are greedy and have the same tokens on both sides.
Seconds are of processor time, so that neighbours count little.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

import molora
from benchmarks.mixed_step import PICTURE_TOKENS, Molora, make_backbone, make_samples
from molora.inference.generate import GenerationConfig, generate
from molora.model.molora import MoLoRA
from molora.pack import Sample


def make_texts(model: MoLoRA, count: int, tokens: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(tokens)
    most = model.backbone.vocab_size
    return [Sample.of_text(str(n), torch.randint(most, (tokens,), generator=generator).tolist()) for n in range(count)]


def compare(what: str, model: MoLoRA, prompts: Sequence[Sample], answers: int, new_tokens: int, repeats: int) -> None:
    config = GenerationConfig(max_new_tokens=new_tokens, ignore_stop_tokens=True)
    once = [replace(prompt, id=f"{prompt.id}#{n}") for prompt in prompts for n in range(answers)]
    each = [replace(sample, token_ids_T=sample.token_ids_T.clone()) for sample in once]
    times: dict[str, list[float]] = {"once": [], "each": []}
    found: dict[str, list[tuple[str, int]]] = {}
    for _ in range(repeats):
        for side, samples in (("once", once), ("each", each)):
            start = time.process_time()
            steps = list(generate(model, samples, config))
            times[side].append(time.process_time() - start)
            found[side] = sorted((step.id, step.token_id) for step in steps)
    if found["once"] != found["each"]:
        raise SystemExit(f"{what}: the answers differ")
    ratios = [apart / together for together, apart in zip(times["once"], times["each"], strict=True)]
    together, apart = (median(of) for of in times.values())
    told = f"{len(prompts)} prompts of {len(prompts[0])} tokens, {answers} answers of {new_tokens} each"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{what}, {told}: {together:.2f} s; each its own: {apart:.2f} s; ratio {median(ratios):.2f} ({spread})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[100, 600])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.smollm:
        model = molora.load(given.smollm, device="cpu").model
        for tokens in given.prompt_tokens:
            texts = make_texts(model, given.prompts, tokens)
            compare("text", model, texts, given.answers, given.new_tokens, given.repeats)
    pictures = [sample for sample in make_samples() if sample.items]
    shown = Molora(make_backbone("cpu", torch.float32), pictures, "cpu").model
    what = f"a picture of {PICTURE_TOKENS} tokens"
    compare(what, shown, pictures, given.answers, given.new_tokens, given.repeats)


if __name__ == "__main__":
    main()
