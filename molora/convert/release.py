"""Released checkpoints of Phi-4-multimodal to runs, tensor by tensor, and runs to checkpoints again.

What the model never runs (the tower's last layer, its norm and its pooling head) and what only describes the release
are kept beside the backbone, so that a run can be written in either layout.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
)

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.format import check_format, tensor_hash
from molora.checkpoint.modality_folder import describe_modality, files_in, read_blueprint
from molora.checkpoint.pretrained import fetch, identify
from molora.checkpoint.run_folder import read_run, write_run
from molora.checkpoint.stock import damage_named
from molora.config import ConfigError
from molora.convert.phi4mm import (
    ADAPTERS,
    TARGETS,
    UNUSED_FILE,
    Layout,
    Place,
    Release,
    adapters_to_hub,
    from_hub,
    to_hub,
)
from molora.hub import HubError, fetch_file
from molora.model import lora
from molora.received import SHARD_INDEX, Entry, TensorFile, copy_file, read_json, read_tensors, shard_names, stamps
from molora.storage import (
    check_shapes,
    made_once,
    save_tensors,
    write_atomically,
    write_folder,
    write_json,
    write_tensors,
    write_text,
)
from molora.terminal import say

FORMAT_VERSION = "1.0"
_MODEL_TYPES: dict[str, Layout] = {"phi4mm": "hub", "phi4_multimodal": "native"}
# A picture beside a clip takes the vision adapter; the two are never summed. Source: `InputMode` of modeling_phi4mm.py.
_RULES = {"audio+vision": "vision"}
# The vision encoder keeps the colours that it normalises with; the release leaves them to its processor.
_COLOURS = {f"modalities/vision/encoder.safetensors:{name}": (3, 1, 1) for name in ("mean_C11", "std_C11")}
_SLOTS = {"image_token": 200010, "audio_token": 200011}
# Kept in the backbone's folder: what the release held besides.
_KEPT, _ABOUT, _FILES = Path(UNUSED_FILE).parent.name, "about.json", "files"
# Files that belong to the backbone alone; the others of a release describe the whole.
_BACKBONE_FILE = re.compile(
    r"(tokenizer.*\.json|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|generation_config\.json)$"
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_MAX_SHARD_BYTES = 2 * 10**9
# Source: processing_phi4mm.py.
_MAX_CROPS = 36


class _Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, read one by one. Each file has a prefix for its names. Raises
    ValueError for a file that is not whole, and for a name that two files hold."""

    def __init__(self, files: Mapping[Path, str]) -> None:
        self._found: dict[str, tuple[TensorFile, str]] = {}
        for path, prefix in files.items():
            file = TensorFile(path)
            for name in file.entries:
                if f"{prefix}{name}" in self._found:
                    raise ValueError(f"{path}: tensor {name} is in another file too; copy the folder again")
                self._found[f"{prefix}{name}"] = file, name

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def entry(self, key: str) -> Entry:
        file, name = self._found[key]
        return file.entries[name]

    def __getitem__(self, key: str) -> Tensor:
        file, name = self._found[key]
        return file.tensor(name)

    def check(self, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises ValueError listing what is unknown, missing, of another shape, or no float."""
        check_shapes({key: self.entry(key).shape for key in self}, expected, where)
        if foreign := sorted(key for key in self if self.entry(key).dtype not in _DTYPES):
            stored = f"{foreign[0]} is stored as {self.entry(foreign[0]).dtype}, expected one of {', '.join(_DTYPES)}"
            told = f"{where}: {stored}, and so for {len(foreign)} tensors in all"
            raise ValueError(f"{told}; take the checkpoint as it was released")


def layout_of(source: str | Path) -> Layout | None:
    """In which layout a folder, or what the hub has under an id, holds Phi-4-multimodal; None if it is another."""
    path = Path(source) / "config.json"
    if not path.is_file():
        if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
            return None
        try:
            path = fetch_file(str(source), path.name)
        except HubError:
            return None  # whoever opens it as a backbone says what is wrong
    kind = read_json(path).get("model_type", "")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: model_type is {kind!r:.80}, expected a text; copy it again")
    return _MODEL_TYPES.get(kind)


def converted(source: str | Path) -> str | Path:
    """A released checkpoint as the run that it was converted to, once, in the cache; anything else as it is."""
    if layout_of(source) is None:
        return source
    folder = fetch(str(source))
    folders = [folder, *(folder / adapter for adapter, _ in ADAPTERS.values())]
    read = [path for place in folders if place.is_dir() for path in files_in(place.resolve())]
    key = hashlib.sha256(json.dumps([stamps(read), FORMAT_VERSION]).encode()).hexdigest()

    def convert(run: Path) -> None:
        say(f"converting {source}, this once, to {run}")
        import_release(source, run)

    return made_once(_KEPT, key, lambda folder: (folder / "molora.json").is_file(), convert)


def import_release(source: str | Path, run: Path) -> None:
    """Converts a released checkpoint (a folder or hub id) to a run, tensor by tensor, each with its bytes and dtype.
    Raises: ConfigError or ValueError for what is no such checkpoint, has settings that our modules lack, or holds
    tensors that are unknown, missing or of another shape; nothing is written then."""
    layout = layout_of(source)
    if layout is None:
        told = f"{source}: not Phi-4-multimodal (its config.json has none of the model types {', '.join(_MODEL_TYPES)})"
        raise ConfigError(f"{told}; name a folder or hub id with the released checkpoint")
    check_new(run, source, known=("backbone", "modalities"))  # what a conversion that was killed left
    folder = fetch(str(source))
    tensors, release = _read_release(folder, layout)
    with damage_named(str(folder / "config.json")):
        places = release.places()
    tensors.check({place.named(layout): place.released_shape for place in places}, str(folder))

    for file, group in itertools.groupby(sorted(places, key=lambda place: place.file), key=lambda place: place.file):
        here = {place.name: place for place in group}
        if file == "backbone":
            stored = {name: tensors.entry(place.named(layout)) for name, place in here.items()}
            sizes = {name: entry.stop - entry.start for name, entry in stored.items()}
            _write_shards(run / file, sizes, lambda name, here=here: tensors[here[name].named(layout)])
        elif layout == "native" and all(place.of_adapter for place in here.values()):
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                adapter = folder / ADAPTERS[Path(file).parent.name][0] / name
                write_atomically((run / file).with_name(name), partial(copy_file, adapter, folder=folder))
        else:
            values = {name: tensors[place.named(layout)].reshape(place.shape) for name, place in here.items()}
            added = {key.partition(":")[2]: shape for key, shape in _COLOURS.items() if key.startswith(f"{file}:")}
            write_tensors(run / file, values | {name: torch.full(shape, 0.5) for name, shape in added.items()})

    backbone = run / "backbone"
    write_text(backbone / "config.json", release.backbone_config().to_json_string())
    for path in files_in(folder):
        if path.suffix != ".safetensors" and path.name != SHARD_INDEX:
            there = backbone if _BACKBONE_FILE.match(path.name) else backbone / _KEPT / _FILES
            write_atomically(there / path.name, partial(copy_file, path, folder=folder))
    write_json(
        backbone / _KEPT / _ABOUT,
        {
            "format_version": FORMAT_VERSION,
            "layout": layout,
            "config": json.loads(release.config.to_json_string(use_diff=False)),
            "max_crops": release.max_crops,
            "dtypes": {place.native: tensors.entry(place.named(layout)).dtype for place in places},
        },
    )
    _describe_run(run, release, layout, str(source))


def _describe_run(run: Path, release: Release, layout: Layout, source: str) -> None:
    """Writes what makes the folders modalities, and all of it a run."""
    identity = identify(run / "backbone", str(run / "backbone"))
    for name, plan in release.blueprints().items():
        assert plan.modality is not None, "both have media"
        folder = run / "modalities" / name
        if layout == "hub":
            write_text(folder / "adapter_config.json", lora.adapter_json(release.adapters[name], source))
        encoder = read_tensors(folder / "encoder.safetensors", folder)
        frames = release.config.vision_config if name == "vision" else release.config.audio_config
        widths = (frames.hidden_size, release.config.hidden_size)
        files = ["encoder.safetensors", "projector.safetensors", "adapter_model.safetensors", "adapter_config.json"]
        options = asdict(plan.modality.config)
        describe_modality(folder, name, plan, options, widths, identity, tensor_hash(encoder), None, files)
    write_run(run, identity, list(ADAPTERS), RouterConfig(options={"rules": _RULES}))


def _read_release(folder: Path, layout: Layout) -> tuple[_Tensors, Release]:
    """The tensors of a release and what they are. Raises ConfigError for settings that our modules lack."""
    path = folder / "config.json"
    values = read_json(path)
    files = {folder / name: "" for name in sorted(shard_names(folder))}
    if layout == "native":
        files |= {folder / f / "adapter_model.safetensors": f"{f}/" for f, _ in ADAPTERS.values()}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing; copy the whole release, in which it holds part of the weights")
    tensors = _Tensors(files)
    adapters = {}
    for name, (subfolder, _) in ADAPTERS.items() if layout == "native" else ():
        adapters[name] = lora.read_adapter(folder / subfolder)
    with damage_named(str(path)):
        for name, (_, theirs) in ADAPTERS.items() if layout == "hub" else ():
            given = values[f"{theirs}_lora"]
            options = {"r": given["r"], "lora_alpha": given["lora_alpha"], "lora_dropout": given["dp"]}
            adapters[name] = lora.lora_config({**options, "target_modules": TARGETS}, f"{path}: {theirs}_lora")
        shapes = {key: tensors.entry(key).shape for key in tensors}
        config = from_hub(values, shapes) if layout == "hub" else Phi4MultimodalConfig.from_dict(values)
        release = Release(config, adapters, _max_crops(folder))
    release.check_settings(path)
    return tensors, release


def _max_crops(folder: Path) -> int:
    """The most crops of a picture, from the processor's settings, which either layout may leave out."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            if "dynamic_hd" in values:
                return int(values["dynamic_hd"])
    return _MAX_CROPS


def _write_shards(folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
    """Writes tensors of `sizes` bytes in files of limited size, with an index if there are several."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and size + sum(sizes[n] for n in shards[-1]) > _MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    count, weight_map = len(shards), {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        values = {name: read(name).contiguous() for name in names}
        write_atomically(folder / file, partial(save_tensors, values, metadata={"format": "pt"}))
        del values
    if count > 1:
        write_json(folder / SHARD_INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def is_imported(backbone: Path) -> bool:
    """Whether a backbone's folder was written by `import_release`."""
    return (backbone / _KEPT / _ABOUT).is_file()


@dataclass(frozen=True)
class ReleasedRun:
    """A run of the imported model, trained further or not: its backbone's folder, its modalities, the layout that it
    came in, what it holds in the release's words, and where every tensor lies, with the dtype that it had."""

    backbone: Path
    folders: Mapping[str, Path]
    layout: Layout
    release: Release
    places: list[Place]
    tensors: "_Tensors"
    kinds: Mapping[str, str]

    def write_weights(self, folder: Path, layout: Layout, *, with_adapters: bool) -> None:
        """Writes the weights with a layout's names, in the dtypes that the release had."""
        written = {place.named(layout): place for place in self.places if with_adapters or not place.of_adapter}
        dtypes = {name: _DTYPES[self.kinds[place.native]] for name, place in written.items()}

        def read(name: str) -> Tensor:
            place = written[name]
            return self.tensors[place.key].reshape(place.released_shape).to(dtypes[name])

        sizes = {name: math.prod(place.shape) * dtypes[name].itemsize for name, place in written.items()}
        _write_shards(folder, sizes, read)

    def write_adapters(self, folder: Path) -> None:
        """Writes each adapter as a folder that PEFT reads, byte by byte."""
        for name, path in self.folders.items():
            copy_adapter(path, folder / ADAPTERS[name][0])

    def backbone_files(self) -> list[Path]:
        """Tokenizer and what else belongs to the backbone alone."""
        return [path for path in files_in(self.backbone) if _BACKBONE_FILE.match(path.name)]


def copy_adapter(source: Path, folder: Path) -> None:
    """Copies a modality's adapter, byte by byte."""
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        write_atomically(folder / file, partial(copy_file, source / file, folder=source))


def export_release(run: Path, folder: Path, layout: Layout | None = None) -> None:
    """Writes a run of the imported model, trained further or not, as a checkpoint in either layout; None: its own.

    Tensors get the dtypes that the release had. Adapters also become folders that PEFT reads, in both layouts.

    Raises: ConfigError or ValueError for a run that the released model cannot be.
    """
    router = read_run(run).router
    if router.plugin != "table" or router.options.get("rules", {}) != _RULES:
        raise ConfigError(
            f"{run}: routes by {router.plugin} {router.options}; the released model always routes "
            f"by the table with rules {_RULES}, and would answer otherwise"
        )
    given = open_released_run(run)
    check_new(folder, run)
    own, layout = given.layout, layout or given.layout
    with write_folder(folder) as draft:
        given.write_weights(draft, layout, with_adapters=layout == "hub")
        given.write_adapters(draft)
        for path in given.backbone_files() + (files_in(given.backbone / _KEPT / _FILES) if layout == own else []):
            write_atomically(draft / path.name, partial(copy_file, path, folder=given.backbone))
        if layout != own:
            _describe_release(draft, given.release, layout)
        if layout == "hub":
            write_json(draft / "config.json", adapters_to_hub(given.release, read_json(draft / "config.json")))


def check_new(folder: Path, source: str | Path, known: Collection[str] = ()) -> None:
    """Raises ConfigError for a folder to write that is a file, holds other than `known` names, or lies in the folder
    that is its source."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder that is not there")
    if folder.exists() and not {path.name for path in folder.iterdir()} <= {*known}:
        raise ConfigError(f"{folder}: is there already and not empty; name another folder")
    if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"{folder}: lies in {source}, which is only read; name a folder outside")


def open_released_run(run: Path) -> ReleasedRun:
    """Opens a run of the imported model, whatever its router. Raises ConfigError or ValueError for one that the
    released model cannot be."""
    about_run = read_run(run)
    backbone, folders = Path(about_run.backbone_source()), about_run.modality_folders()
    kept = backbone / _KEPT
    if not is_imported(backbone):
        told = f"{run}: its backbone {backbone} was not imported (no {_KEPT}/{_ABOUT} there)"
        raise ConfigError(f"{told}; only runs on a backbone from `molora convert phi4mm` can be written as a release")
    if set(folders) != set(ADAPTERS):
        raise ConfigError(
            f"{run}: has the modalities {', '.join(sorted(folders))}; the released model holds exactly "
            f"{', '.join(sorted(ADAPTERS))}: make a run of these, with the others by `path:`"
        )
    identity = identify(backbone, str(backbone))
    adapters = {}
    for name, path in folders.items():
        plan, _ = read_blueprint(path, identity, name)
        if plan.adapter is None or not (path / "encoder.safetensors").is_file():
            raise ConfigError(f"{path}: has no adapter or no encoder of its own, which a release holds")
        adapters[name] = plan.adapter
    about = read_json(kept / _ABOUT)
    check_format(about, kept / _ABOUT)
    with damage_named(str(kept / _ABOUT)):
        own: Layout = about["layout"]
        release = Release(Phi4MultimodalConfig.from_dict(about["config"]), adapters, int(about["max_crops"]))
        kinds = {name: str(about["dtypes"][name]) for name in about["dtypes"]}
        places = release.places()
    missing = {place.native for place in places} - kinds.keys()
    if own not in get_args(Layout) or missing or not _DTYPES.keys() >= {*kinds.values()}:
        raise ConfigError(f"{kept / _ABOUT}: its layout or dtypes are no release's; convert the release anew")
    files = dict.fromkeys(sorted(backbone.glob("*.safetensors")), "backbone:")
    unused = {place.file for place in places if _KEPT in place.file}
    files |= {backbone / file.removeprefix("backbone/"): f"{file}:" for file in unused}
    for name, path in folders.items():
        for file in ("encoder", "projector", "adapter_model"):
            files[path / f"{file}.safetensors"] = f"modalities/{name}/{file}.safetensors:"
    tensors = _Tensors(files)
    tensors.check({place.key: place.shape for place in places} | _COLOURS, str(run))
    return ReleasedRun(backbone, folders, own, release, places, tensors, kinds)


def write_processor(folder: Path, release: Release, chat_template: str | None = None) -> None:
    """Writes transformers' processor beside the tokenizer in a folder, with a chat template; None: the tokenizer's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    slots = {name: tokenizer.convert_ids_to_tokens(id) for name, id in _SLOTS.items()}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=slots, trust_remote_code=False)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    image_processor = Phi4MultimodalImageProcessor(dynamic_hd=release.max_crops)
    processor = Phi4MultimodalProcessor(image_processor, Phi4MultimodalFeatureExtractor(), tokenizer)
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(folder)


def _describe_release(folder: Path, release: Release, layout: Layout) -> None:
    """Config and processor of a layout that the model did not come in, as its own tools write them."""
    config = release.config
    if layout == "native":
        config.architectures = [Phi4MultimodalForCausalLM.__name__]
        config.save_pretrained(folder)
        write_processor(folder, release)
    else:
        write_json(folder / "config.json", to_hub(release))
        write_json(folder / "preprocessor_config.json", {"dynamic_hd": release.max_crops})
