"""Opening models: what one is made of, read from folders before anything is loaded, and then the model itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from molora.checkpoint.assembly import BackboneConfig, Blueprint, RouterConfig, RouterPlan, assemble, router_plan
from molora.checkpoint.modality_folder import check_encoder, check_modality, load_modality, read_about, read_plan
from molora.checkpoint.pretrained import fetch, identify, load_backbone
from molora.checkpoint.run_folder import RunAbout, load_router, read_run
from molora.config import ConfigError
from molora.data.processor import Processor
from molora.media import MediaPolicy
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization
from molora.ranks import Ranks
from molora.received import file_hash
from molora.routing import TEXT
from molora.terminal import warn


@dataclass(frozen=True)
class Layout:
    """Where the parts of a model lie: its backbone (a folder, or a hub id with the commit that a run was trained on),
    its modality folders by name, and what the molora.json of a run says. Other folders are not part of the run."""

    backbone: str
    folders: dict[str, Path]
    run: RunAbout | None

    @property
    def revision(self) -> str | None:
        return None if self.run is None else self.run.backbone["revision"]


@dataclass(frozen=True)
class ModelPlan:
    """A model before its weights: its backbone, its modalities by name, and its router, which is written in `where`.
    `folders` hold the weights of modalities that were saved, `learned` is the run whose router has learned, and `run`
    the one that recorded what its backbone was. What was not saved is drawn from `seed`."""

    backbone: BackboneConfig
    modalities: dict[str, Blueprint]
    router: RouterPlan
    where: str = "router"
    folders: Mapping[str, Path] = field(default_factory=dict)
    learned: Path | None = None
    run: RunAbout | None = None
    seed: int = 0
    media_policy: MediaPolicy | None = None


def locate(source: str | Path, modalities: Sequence[str | Path] = ()) -> Layout:
    """Finds the parts of a run folder, or of a backbone with modality folders, without loading them. Raises ConfigError
    or ValueError naming the file that is missing or wrong."""
    path = Path(source)
    if (path / "molora.json").is_file():
        run = read_run(path)
        backbone, folders = run.backbone_source(), run.modality_folders()
    else:
        if path.is_dir() and not (path / "config.json").is_file():
            told = f"{path}: neither a run (no molora.json) nor a backbone (no config.json)"
            raise ConfigError(f"{told}; name one of these, and modality folders beside a backbone")
        backbone, folders, run = str(source), {}, None
    for folder in map(Path, modalities):
        name: str = read_about(folder)["name"]
        if name in folders:
            told = f"{folder}: its modality {name!r} is already loaded from {folders[name]}"
            raise ConfigError(f'{told}; leave one out, or give one another "name" in its modality.json')
        folders[name] = folder
    return Layout(backbone, folders, run)


def model_hashes(layout: Layout) -> dict[str, str]:
    """What tells one state of a model from another: the hash of each file that has the hashes of the others, and for a
    bare backbone that of its weights."""
    hashes = {name: file_hash(folder / "modality.json") for name, folder in sorted(layout.folders.items())}
    if layout.run is not None:
        return {"molora.json": file_hash(layout.run.folder / "molora.json"), **hashes}
    return hashes or {"backbone": identify(fetch(layout.backbone), layout.backbone).weights}


def plan_model(
    source: str | Path,
    modalities: Sequence[str | Path] = (),
    *,
    router: RouterConfig | None = None,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    media_policy: MediaPolicy | None = None,
    trust: Sequence[str] = (),
) -> ModelPlan:
    """The plan of a run folder, or of a backbone with modality folders, with another `router`, `dtype` or
    `quantization` if given. Raises ConfigError or ValueError naming the file that is missing or wrong, Untrusted for
    code that `trust` does not name."""
    layout = locate(source, modalities)
    run = layout.run
    plans = {name: read_plan(folder, name, trust) for name, folder in layout.folders.items()}
    if run is None or router is not None:
        chosen, where, learned = router_plan(router or RouterConfig()), "router", None
    else:
        chosen, where, learned = run.router_plan(trust), str(run.folder / "molora.json"), run.folder
    dtype = dtype or (None if run is None else run.backbone["dtype"])
    recorded: Quantization = "none" if run is None else run.backbone["quantization"]
    backbone = BackboneConfig(
        path=layout.backbone, dtype=dtype, revision=layout.revision, quantization=quantization or recorded
    )
    return ModelPlan(backbone, plans, chosen, where, layout.folders, learned, run, media_policy=media_policy)


def open_model(plan: ModelPlan, device: torch.device | str, shards: Ranks | None = None) -> tuple[MoLoRA, Processor]:
    """The model of a plan with its processor; with `shards` the backbone's layers lie in shards over these ranks.
    Raises ConfigError or ValueError naming the file that does not fit; BackboneRefused for a backbone that cannot run.
    """
    given = plan.backbone
    backbone, tokenizer = load_backbone(
        given.path,
        dtype=given.dtype,
        revision=given.revision,
        quantization=given.quantization,
        device=device,
        shards=shards,
    )
    found: dict[str, list[str]] = {}  # a difference in several files is told once
    if plan.run is not None:
        path = str(plan.run.folder / "molora.json")
        found = {difference: [path] for difference in backbone.identity.check(plan.run.backbone, path)}
    for name, folder in plan.folders.items():
        for difference in check_modality(folder, backbone.identity):
            found.setdefault(difference, []).append(str(folder / "modality.json"))
        check_encoder(plan.modalities[name], folder)
    model, processor = assemble(
        backbone, tokenizer, plan.modalities, plan.router, seed=plan.seed, where=plan.where, policy=plan.media_policy
    )
    of_text = {name for name, each in plan.modalities.items() if each.modality is None}
    warnings = [f"{', '.join(paths)}: {difference}" for difference, paths in found.items()]
    for name in sorted(of_text - model.router.adapters(frozenset())):
        warnings.append(f"{name}: is an adapter for text, which runs without it; the rule {TEXT}={name} would use it")
    for warning in warnings:
        warn(warning)
    for name, folder in plan.folders.items():
        load_modality(model, name, folder)
    if plan.learned is not None:
        load_router(model, plan.learned)
    return model, processor
