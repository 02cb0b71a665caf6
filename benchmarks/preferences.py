"""A step of preferences about pictures whose prompts run once for both answers, beside the same step without that.

From the repository root: python -m benchmarks.preferences [--answer-tokens 48] [--repeats 5]

The backbone, the pictures and their frames are those of `mixed_step.py`; of each prompt 545 tokens are a picture and 16
are text. The reference and the policy are measured, then what trains runs once more with its graph.
"""

import argparse
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.mixed_step import VOCAB_SIZE, WARMUPS, Molora, make_backbone, make_samples, milliseconds
from molora.pack import Sample
from molora.train.preference import Reference, preference_step
from molora.train.preference_losses import PreferenceConfig

TEXT_TOKENS, TOKENS_PER_PACK = 16, 4096


def make_pairs(answer_tokens: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def answered(prompt: Sample) -> Sample:
        answer = torch.randint(VOCAB_SIZE, (answer_tokens,), generator=generator)
        whole = prompt.followed_by(answer.tolist())
        return replace(whole, targets_T=torch.arange(len(whole)) >= len(prompt))

    pairs = []
    for sample in (each for each in make_samples() if each.items):
        length = int(sample.modality_ids_T.sum()) + TEXT_TOKENS
        prompt = replace(sample, token_ids_T=sample.token_ids_T[:length], modality_ids_T=sample.modality_ids_T[:length])
        rejected = replace(answered(prompt), id=f"{sample.id}, rejected")
        pairs.append(replace(answered(prompt), rejected=rejected))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    pairs = make_pairs(given.answer_tokens)
    molora = Molora(make_backbone("cpu", torch.float32), pairs, "cpu")
    reference = Reference(molora.model)

    def step() -> None:
        preference_step(
            *(molora.model, molora.processor, pairs, TOKENS_PER_PACK, molora.optimizers, PreferenceConfig(), reference)
        )

    def apart() -> None:
        with patch("molora.train.preference.shared_prompts", lambda model, samples, prompts: ((0, 0),) * len(samples)):
            step()

    times: dict[str, list[float]] = {"once": [], "for each answer": []}
    for turn in range(WARMUPS + given.repeats):
        for name, one in zip(times, (step, apart), strict=True):
            took = milliseconds(one, "cpu")
            if turn >= WARMUPS:
                times[name].append(took)
    once, each = (median(of) for of in times.values())
    prompt = len(pairs[0]) - given.answer_tokens
    print(f"{len(pairs)} pairs, {prompt} tokens of prompt and {given.answer_tokens} of each answer")
    print(f"the prompt runs once: {once:,.0f} ms a step; for each answer: {each:,.0f} ms; ratio {each / once:.2f}")


if __name__ == "__main__":
    main()
