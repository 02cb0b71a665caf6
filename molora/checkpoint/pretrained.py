"""Opening a backbone and its tokenizer: from a folder, an installed package or the hub, frozen, hashed and probed."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from molora.checkpoint.gguf import PACKAGE, package_folder
from molora.checkpoint.stock import (
    check_bounds,
    check_code,
    check_folder,
    check_kinds,
    load_tokenizer,
    open_stock,
    read_config,
    read_dtype,
)
from molora.data.prompt import ChatTemplate
from molora.hub import HubError, fetch_snapshot
from molora.model.backbone import Backbone
from molora.model.identity import Identity, describe, remember, weight_stamps
from molora.model.quantization import Quantization, library_version
from molora.model.sharding import shard
from molora.ranks import Ranks
from molora.received import read_json
from molora.terminal import warn

# What is fetched of a model on the hub; no pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_backbone(
    source: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: Quantization = "none",
    device: torch.device | str = "cpu",
    shards: Ranks | None = None,
) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """Opens a causal LM and its tokenizer from a folder, an installed package or the hub, frozen, hashed and probed.

    `dtype` such as "bfloat16" casts the weights; by default they keep their stored dtype. They are hashed before either
    this or `quantization`. With `shards` its layers lie in shards over these ranks, all of which call this.

    Raises FileNotFoundError, ValueError for what cannot be read, BackboneRefused for what cannot be run.
    """
    folder = fetch(source, revision)
    before = weight_stamps(folder)
    tokenizer = load_tokenizer(folder)
    identity, remembered = describe(folder, source, tokenizer, read_config(folder))
    transformers.logging.disable_progress_bar()  # the hub's bar for downloads has been shown; loading is quick
    # A device need not have room for a whole backbone that will lie in shards.
    first = device if shards is None else "cpu"
    model = open_stock(folder, "auto" if dtype is None else read_dtype(dtype), quantization, first)
    if weight_stamps(folder) != before:
        raise ValueError(f"backbone {folder}: was written to while it was opened; let what writes it finish")
    identity = replace(identity, quantization=quantization)
    key = f"{transformers.__version__} {torch.__version__} {model.dtype} {torch.device(device).type}"
    if quantization != "none":
        key += f" {quantization} {library_version(quantization)}"
    probes = remembered["probes"]
    probe = probes.get(key)
    if shards is not None:
        shard(model, shards)
        if not all(shards.gather([probe is not None])):  # such as machines that do not share a cache
            probe = None
    backbone = Backbone(model, identity, probe=probe, shards=shards)
    backbone.folder = folder
    # The hub's cache names a folder by its commit.
    backbone.revision = None if Path(source).is_dir() or source.startswith(PACKAGE) else folder.name
    for warning in backbone.stop_at(ChatTemplate(tokenizer).turn_ends(), tokenizer):
        warn(warning)
    if key not in probes:
        probes[key] = backbone.probe
        remember(folder, remembered)
    return backbone, tokenizer


def fetch(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: `source` itself, that of an installed package (`package:NAME`), or what the hub has under
    that id, with its `weights` or without. Raises FileNotFoundError, and ValueError for a folder that is not as it
    should be."""
    folder = package_folder(source) if source.startswith(PACKAGE) else Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"backbone {source!r}: no such folder")
        wanted = [pattern for pattern in _FILES if weights or pattern != "*.safetensors"]
        try:
            folder = fetch_snapshot(source, revision, wanted)
        except HubError as error:
            raise FileNotFoundError(
                f"backbone {source!r}: no such folder in {Path.cwd()}, and the hub gives none under that id ({error}); "
                "check the name and the network, or give a local folder"
            ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"backbone {folder}: no config.json; expected a folder that transformers can open")
    check_folder(folder)
    path = folder / "config.json"
    config = read_json(path)
    check_code(config, f"backbone {folder}: config.json")
    check_bounds(config, path)
    check_kinds(config, path)
    return folder


def identify(folder: Path, source: str) -> Identity:
    """What the backbone in a folder is, without loading its weights. Raises ValueError for what cannot be read."""
    return describe(folder, source, load_tokenizer(folder), read_config(folder))[0]
