"""What moved between two models: the files that they share, and the logits of what both can run.

Letters: T tokens of a sample, D backbone width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from molora.checkpoint.modality_folder import files_in
from molora.checkpoint.opening import Layout, locate
from molora.convert.release import converted
from molora.inference.load import LoadedModel, load
from molora.model.identity import weights_hash
from molora.pack import Sample, collate
from molora.received import file_hash
from molora.routing import name_of
from molora.terminal import Finding
from molora.verify.promises import examples, routed, show

NUM_SAMPLES = 200
_SAMPLES_PER_PACK = 8
_NAMES_SHOWN = 4


def compare_models(
    old: str | Path, model: str | Path, modalities: Sequence[str | Path] = (), trust: Sequence[str] = ()
) -> bool:
    """Prints what of `old` is still as it was in `model`; each is a run, or a backbone, here with modality folders.
    First come the files of the backbone and of each modality, then the logits of samples that both can run. Returns
    whether all that they share is equal to the bit. `trust` is for both, as in `load`. Raises what `load` raises."""
    old, model = converted(old), converted(model)
    before, after = locate(old), locate(model, modalities)
    same_files = show("files", compare_files(before, after))
    was = load(old, trust=trust)
    # Folders alone name no dtype, and in another one every logit would differ.
    dtype = None if after.run else str(was.model.backbone.model.dtype).removeprefix("torch.")
    now = load(model, modalities, dtype=dtype, trust=trust)
    now.model.backbone.identity.check(asdict(was.model.backbone.identity), str(old))
    return show("logits", compare_logits(was, now)) and same_files


def compare_files(old: Layout, new: Layout) -> Iterator[Finding]:
    """Whether each file of OLD's backbone and modalities is in MODEL, byte by byte; what only one has is named."""
    before, after = Path(old.backbone), Path(new.backbone)
    if before.is_dir() and after.is_dir():
        yield _compare_folders("backbone", before, after)
        if old.run:
            recorded = weights_hash(after) == old.run.backbone["weights"]
            yield Finding("backbone", "weights have the hash that OLD recorded", recorded)
    else:
        yield Finding("backbone", f"{old.backbone} and {new.backbone} are not two folders", None)
    for name, folder in sorted(old.folders.items()):
        if name in new.folders:
            yield _compare_folders(name, folder, new.folders[name])
        else:
            yield Finding(name, f"removed: {len(files_in(folder))} files of OLD alone", None)
    for name in sorted(new.folders.keys() - old.folders.keys()):
        yield Finding(name, f"added: {len(files_in(new.folders[name]))} files of MODEL alone", None)


def _compare_folders(what: str, before: Path, after: Path) -> Finding:
    names = [path.name for path in files_in(before)]
    if before.resolve() == after.resolve():
        return Finding(what, f"{len(names)} files, which OLD and MODEL share", True)
    moved = [n for n in names if not (after / n).is_file() or file_hash(before / n) != file_hash(after / n)]
    found = f"{len(names) - len(moved)} of {len(names)} files are equal to the byte"
    return Finding(what, f"{found}, not {', '.join(moved)}" if moved else found, not moved)


@torch.no_grad()
def compare_logits(old: LoadedModel, new: LoadedModel, num_samples: int = NUM_SAMPLES) -> Iterator[Finding]:
    """Whether samples made from the modalities' examples have equal logits in equal packs, set by set of modalities.
    `num_samples` are spread evenly over the sets that the routers of both models take; a set that only OLD's takes is
    named."""
    shared = old.model.modalities.keys() & new.model.modalities.keys()
    taken = set(routed(new, shared))
    asked = list(routed(old, shared))
    sets = [modalities for modalities in asked if modalities in taken][:num_samples]
    differences: dict[frozenset[str], list[float]] = {modalities: [] for modalities in sets}
    pairs = examples([old, new], sets, num_samples)
    while some := list(islice(pairs, _SAMPLES_PER_PACK)):
        before = _hidden(old, old, [theirs for _, (theirs, _) in some])
        after = _hidden(new, old, [ours for _, (_, ours) in some])
        for modalities, (sample, _) in some:
            reference_TV = old.model.backbone.head(before[sample.id])
            logits_TV = new.model.backbone.head(after[sample.id])
            equal = torch.equal(logits_TV, reference_TV)
            differences[modalities].append(0.0 if equal else float((logits_TV - reference_TV).abs().max()))
    for modalities, found in differences.items():
        differing = torch.tensor([difference for difference in found if difference != 0])
        said = f"{len(found) - len(differing)} of {len(found)} samples are equal to the bit"
        if len(differing):
            said += f", largest difference {float(differing.max()):.1e}"
        yield Finding(name_of(modalities), said, not len(differing) if found else None)
    if refused := [name_of(modalities) for modalities in asked if modalities not in taken]:
        more = f" and {len(refused) - _NAMES_SHOWN} more" if len(refused) > _NAMES_SHOWN else ""
        yield Finding("other sets", f"no rule in MODEL for {', '.join(refused[:_NAMES_SHOWN])}{more}", None)


def _hidden(loaded: LoadedModel, ordering: LoadedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Final hidden states (T, D) by sample; `ordering` is the model whose router orders the pack."""
    model = loaded.model
    pack = collate(samples, model.modalities, ordering.model.router.order).to(model.device)
    return pack.by_sample(model(pack))
