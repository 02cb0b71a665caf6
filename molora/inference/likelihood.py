"""Likelihoods: how probable the model finds texts that are given, whatever the mix of their modalities.

Letters: T tokens in a sample, K target positions, D backbone width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molora.inference.frames import FrameMemory
from molora.inference.generate import Failed, NotFinite, faults
from molora.model.loss import LOGITS_PER_CHUNK
from molora.model.molora import MoLoRA
from molora.model.shared import hidden_at, shared_prompts
from molora.pack import Sample, collate

# What a pack holds, if no sample of it is longer: enough for large products, and little beside a model.
TOKENS_PER_PACK = 4096


@dataclass(frozen=True)
class Likelihood:
    """How probable a continuation is: the natural logarithm of its probability, the number of its tokens, and whether
    greedy decoding would have given it."""

    log_probability: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Scored:
    """The likelihood of a sample's targets, or the error that stands in its place."""

    id: str
    likelihood: Likelihood | None
    error: Exception | None = None


def continued(id: str, context: Sequence[int], continuation: Sequence[int]) -> Sample:
    """Text by its token ids, of which the continuation is scored. Raises ValueError if either has no token."""
    for what, ids in (("context", context), ("continuation", continuation)):
        if not ids:
            raise ValueError(f"sample {id}: its {what} has no token; the first token of a text has no likelihood")
    sample = Sample.of_text(id, [*context, *continuation])
    return replace(sample, targets_T=torch.arange(len(sample)) >= len(context))


@torch.no_grad()
def score(
    model: MoLoRA,
    samples: Iterable[Sample | Failed],
    *,
    tokens_per_pack: int = TOKENS_PER_PACK,
    keep_going: bool = False,
    frames: FrameMemory | None = None,
) -> Iterator[Scored]:
    """The likelihoods of the targets of samples, in their order; a sample longer than a pack is a pack of its own. A
    prompt of several neighbours runs once. `frames` remembers those of media that appear again.

    With `keep_going` a sample that fails (could not be made, collated or encoded, or has logits that are no numbers) is
    scored with its error, and the others as if it had never been there. Else its error is raised.

    Raises SampleFailed for a sample that cannot be collated or encoded, NotFinite for one whose logits are NaN or
    infinite, and the error of one that could not be made.
    """
    model.eval()
    for group in _groups(samples, 1 if model.deterministic_batch else tokens_per_pack):
        if len({each.id for each in group}) < len(group):
            raise ValueError(
                f"two of the samples {', '.join(each.id for each in group)} have one id; give each its own"
            )
        found = _score_group(model, [each for each in group if isinstance(each, Sample)], frames)
        for each in group:
            result = Scored(each.id, None, each.error) if isinstance(each, Failed) else found[each.id]
            if result.error is not None and not keep_going:
                raise result.error
            yield result


def _groups(samples: Iterable[Sample | Failed], tokens_per_pack: int) -> Iterator[list[Sample | Failed]]:
    """Neighbours of so many tokens together at most, or one sample that has more."""
    group: list[Sample | Failed] = []
    num_tokens = 0
    for sample in samples:
        more = len(sample) if isinstance(sample, Sample) else 0
        if group and num_tokens + more > tokens_per_pack:
            yield group
            group, num_tokens = [], 0
        group.append(sample)
        num_tokens += more
    if group:
        yield group


def _score_group(model: MoLoRA, samples: Sequence[Sample], frames: FrameMemory | None) -> dict[str, Scored]:
    """What is found of the samples of a pack, by id. Those that fail on their own are left out of the pack."""
    found: dict[str, Scored] = {}
    while samples:
        try:
            return found | _score_pack(model, samples if frames is None else frames.fill(samples))
        except Exception:
            failed = faults(model, samples)
            if not failed:
                raise
            found |= {id: Scored(id, None, error) for id, error in failed.items()}
            samples = [sample for sample in samples if sample.id not in failed]
    return found


def _score_pack(model: MoLoRA, samples: Sequence[Sample]) -> dict[str, Scored]:
    wanted = {sample.id: sample.token_ids_T[1:][sample.targets_T[1:]] for sample in samples}
    samples = sorted(map(_predicting, samples), key=lambda sample: model.router.order(sample.modalities))
    pack = collate(samples, model.modalities).to(model.device)
    prompts = [int(sample.targets_T.nonzero()[0]) + 1 for sample in samples]
    pack = replace(pack, shared=shared_prompts(model, samples, prompts))
    embeds_TD = model.embed(pack)
    places_K = pack.targets_T.nonzero().squeeze(1)
    hidden_KD = hidden_at(model, pack, embeds_TD, model.router(pack, embeds_TD), places_K)
    log_probabilities_K, greedy_K = _chosen(
        model.backbone.head,
        hidden_KD,
        torch.cat([wanted[id] for id in pack.ids]).to(model.device),
        model.backbone.vocab_size,
    )
    counts = [len(wanted[id]) for id in pack.ids]
    of_samples = zip(pack.ids, log_probabilities_K.split(counts), greedy_K.split(counts), strict=True)
    return {id: _scored(id, of_tokens, is_greedy) for id, of_tokens, is_greedy in of_samples}


def _predicting(sample: Sample) -> Sample:
    """The sample up to the token before its last target, which is the last that a likelihood needs, or up to its last
    medium; its `targets_T` are the positions before targets."""
    needed_T = torch.nn.functional.pad(sample.targets_T[1:], (0, 1))
    stop = int((needed_T | (sample.modality_ids_T > 0)).nonzero().max()) + 1
    return replace(
        sample,
        token_ids_T=sample.token_ids_T[:stop],
        modality_ids_T=sample.modality_ids_T[:stop],
        targets_T=needed_T[:stop],
    )


def _scored(id: str, log_probabilities_K: Tensor, greedy_K: Tensor) -> Scored:
    total = float(log_probabilities_K.sum())
    if not math.isfinite(total):
        advice = "look at its media, and at the weights it runs with"
        return Scored(id, None, NotFinite(f"sample {id}: its log-probability is not finite ({total}); {advice}"))
    return Scored(id, Likelihood(total, len(log_probabilities_K), bool(greedy_K.all())))


def _chosen(
    head: Callable[[Tensor], Tensor], hidden_KD: Tensor, targets_K: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """On the CPU, the log-probability of each target (K,) in fp64, and whether it is the likeliest token; computed
    chunk by chunk, so that the logits of a large vocabulary never stand in memory together."""
    log_probabilities, greedy = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    rows = max(1, LOGITS_PER_CHUNK // vocab_size)
    for hidden, targets in zip(hidden_KD.split(rows), targets_K.split(rows), strict=True):
        logits_KV = head(hidden).float()
        at_target_K = logits_KV.gather(1, targets[:, None]).squeeze(1)
        log_probabilities.append((at_target_K - logits_KV.logsumexp(1)).cpu())
        greedy.append((logits_KV.argmax(1) == targets).cpu())
    return torch.cat(log_probabilities).double(), torch.cat(greedy)
