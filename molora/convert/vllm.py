"""Runs as folders that vLLM opens: Phi-4-multimodal under the names of vLLM's own class of it, or a text backbone, with
the adapters in PEFT's folders beside.

Source: vllm/model_executor/models/phi4mm.py and vllm/lora/, of vLLM 0.33.
"""

import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoTokenizer

from molora.checkpoint.modality_folder import files_in, read_blueprint
from molora.checkpoint.pretrained import fetch, identify
from molora.checkpoint.run_folder import read_run
from molora.config import ConfigError
from molora.convert.phi4mm import ADAPTERS, Release, to_hub
from molora.convert.release import check_new, copy_adapter, is_imported, open_released_run, write_processor
from molora.received import copy_file, read_json
from molora.storage import write_atomically, write_folder, write_json
from molora.terminal import warn

# What vLLM takes as --max-lora-rank. Source: vllm/config/lora.py.
_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BACKBONE_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_PROCESSOR_FILE, _PROCESSOR_CLASS = "processing_phi4mm.py", "Phi4MMProcessor"
# Before the model's own template, which reads texts: parts become text, with vLLM's word for each picture and sound.
_PARTS_TO_TEXT = """\
{%- set shown = namespace(messages=[], image=0, audio=0) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is none -%}
    {%- set shown.messages = shown.messages + [message] -%}
  {%- else -%}
    {%- set said = namespace(text='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set shown.image = shown.image + 1 -%}
        {%- set said.text = said.text ~ '<|image_' ~ shown.image ~ '|>' -%}
      {%- elif part['type'] == 'audio' -%}
        {%- set shown.audio = shown.audio + 1 -%}
        {%- set said.text = said.text ~ '<|audio_' ~ shown.audio ~ '|>' -%}
      {%- else -%}
        {%- set said.text = said.text ~ part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set shown.messages = shown.messages + [dict(message, content=said.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = shown.messages -%}
"""


def export_vllm(run: Path, folder: Path) -> str:
    """Writes a run as a folder that vLLM opens, and returns the command that serves it. The router's rules are not part
    of it; `molora serve RUN --upstream` keeps them.

    Raises: ConfigError or ValueError for a run that vLLM has no place for.
    """
    about = read_run(run)
    if about.router.plugin != "table":
        told = f"{run / 'molora.json'}: the router is {about.router.plugin!r}, and vLLM runs a request with one adapter"
        raise ConfigError(f"{told}, in full; only a run whose router is 'table' can be written for it")
    check_new(folder, run)
    backbone = fetch(about.backbone_source(), about.backbone["revision"])
    identity = identify(backbone, about.backbone_source())
    for warning in identity.check(about.backbone, str(run / "molora.json")):
        warn(f"{run / 'molora.json'}: {warning}")
    adapters: dict[str, LoraConfig] = {}
    media = []
    for name, path in about.modality_folders().items():
        plan, _ = read_blueprint(path, identity, name)
        if plan.adapter is not None:
            adapters[name] = plan.adapter
        if plan.modality is not None:
            media.append(f"{name} ({plan.plugin})")
    max_rank = _max_rank(run, adapters)
    if media and not is_imported(backbone):
        told = (
            f"{run}: has the modalities {', '.join(media)}, and vLLM has a place for encoders of Phi-4-multimodal only"
        )
        raise ConfigError(f"{told}; without these, a run of adapters for text can be written")
    with write_folder(folder) as draft:
        if media:
            _write_phi4mm(run, draft)
        else:
            _write_text(backbone, {name: run / "modalities" / name for name in adapters}, draft)
    places = {name: folder / (ADAPTERS[name][0] if media else name) for name in adapters}
    return _command(folder, places, max_rank, bool(media))


def _max_rank(run: Path, adapters: Mapping[str, LoraConfig]) -> int:
    """What vLLM has to allow. Raises ConfigError for a run without adapters, and for a rank that it does not take."""
    if not adapters:
        raise ConfigError(f"{run}: has no adapter, so vLLM can serve its backbone as it is")
    ranks = {name: max([config.r, *(config.rank_pattern or {}).values()]) for name, config in adapters.items()}
    name = max(ranks, key=lambda name: ranks[name])
    fitting = [rank for rank in _MAX_RANKS if rank >= ranks[name]]
    if not fitting:
        told = (
            f"{run / 'modalities' / name}: its adapter has rank {ranks[name]}, and vLLM takes at most {_MAX_RANKS[-1]}"
        )
        raise ConfigError(f"{told}; train one of a lower rank")
    return fitting[0]


def _write_text(backbone: Path, adapters: Mapping[str, Path], folder: Path) -> None:
    for path in files_in(backbone):
        if path.suffix in _BACKBONE_FILES:
            real = path.resolve()  # of a backbone, links lead anywhere
            write_atomically(folder / path.name, partial(copy_file, real, folder=real.parent))
    for name, path in adapters.items():
        copy_adapter(path, folder / name)


def _write_phi4mm(run: Path, folder: Path) -> None:
    given = open_released_run(run)
    given.write_weights(folder, "hub", with_adapters=False)
    given.write_adapters(folder)
    for path in given.backbone_files():
        write_atomically(folder / path.name, partial(copy_file, path, folder=given.backbone))
    write_json(folder / "config.json", _config(given.release))
    tokenizer: Any = AutoTokenizer.from_pretrained(given.backbone, trust_remote_code=False)
    write_processor(folder, given.release, _PARTS_TO_TEXT + tokenizer.get_chat_template())
    code = Path(__file__).with_name("vllm_processor.py")
    write_atomically(folder / _PROCESSOR_FILE, partial(copy_file, code, folder=code.parent))
    path = folder / "processor_config.json"
    its_place = {"AutoProcessor": f"{Path(_PROCESSOR_FILE).stem}.{_PROCESSOR_CLASS}"}
    write_json(path, {**read_json(path), "processor_class": _PROCESSOR_CLASS, "auto_map": its_place})


def _config(release: Release) -> dict[str, Any]:
    """The backbone's config, which transformers knows, with what vLLM's class reads beside it."""
    backbone = json.loads(release.backbone_config().to_json_string())
    beside = {key: to_hub(release)[key] for key in ("embd_layer", "audio_processor")}
    return {**backbone, **beside, "img_processor": None, "architectures": ["Phi4MMForCausalLM"]}


def _command(folder: Path, adapters: Mapping[str, Path], max_rank: int, has_code: bool) -> str:
    modules = [f"{name}={path}" for name, path in adapters.items()]
    bare = "bare-backbone" if "backbone" in adapters else "backbone"  # no two models have one name
    words = ["vllm", "serve", str(folder), "--served-model-name", bare]
    words += ["--trust-remote-code"] if has_code else []
    words += ["--enable-lora", "--max-lora-rank", str(max_rank), "--max-loras", str(len(modules))]
    return shlex.join([*words, "--lora-modules", *modules])
