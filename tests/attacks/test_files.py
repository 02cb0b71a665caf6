"""Attacks through the files of a received run, modality or backbone: links, names, headers, patterns, numbers, and
files that change. Each is refused with its reason, and writes nothing elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, SiglipVisionConfig, SiglipVisionModel

import molora
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.format import tensor_hash
from molora.checkpoint.modality_folder import copy_modality, load_modality, read_blueprint, save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.checkpoint.run_folder import write_run
from molora.checkpoint.stock import read_config
from molora.config import ConfigError
from molora.doctor.dry_run import on_meta
from molora.encoders.audio import AudioConfig
from molora.encoders.pretrained_files import weight_files
from molora.encoders.vision import VisionConfig
from molora.received import TensorFile, read_json
from molora.storage import cache_folder, hold, write_text
from molora.testing import save_backbone

OPTIONS = {
    "crop_pixels": 64,
    "max_crops": 0,
    "pool": 4,
    "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}},
}
ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a run on it with a modality."""
    home = tmp_path_factory.mktemp("files")
    save_backbone(home / "backbone")
    backbone, tokenizer = load_backbone(str(home / "backbone"))
    plans = {"vision": blueprint("vision", "vision", OPTIONS, ADAPTER, "vision")}
    model, _ = assemble(backbone, tokenizer, plans, RouterConfig())
    save_modality(model, "vision", plans["vision"], home / "run" / "modalities" / "vision", {"vision": ""})
    write_run(home / "run", backbone.identity, ["vision"], RouterConfig())
    molora.load(home / "run", device="cpu")  # as it is, it opens
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the run, on the same backbone."""
    shutil.copytree(home / "run", tmp_path / "run")
    change(tmp_path / "run" / "molora.json", lambda about: about["backbone"].update(folder=str(home / "backbone")))
    return tmp_path / "run"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))


def listed(folder: Path, *files: str) -> None:
    """Writes the hashes that the files have now into modality.json, as a stranger can."""
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
    change(folder / "modality.json", lambda about: about["files"].update(hashes))


def refused(run: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        molora.load(run, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


# Links, and what is no file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["modality.json", "adapter_config.json", "adapter_model.safetensors", "projector.safetensors"]
)
@pytest.mark.parametrize("absolute", [True, False])
def test_links_out_of_a_received_folder_are_not_followed(run: Path, file: str, absolute: bool) -> None:
    folder = run / "modalities" / "vision"
    secret = run.parent / "secret"
    shutil.move(folder / file, secret)  # of the right hash, even
    (folder / file).symlink_to(secret if absolute else "../../../secret")
    refused(run, f"{file}: leads out of .*vision, to .*secret, and is not followed")


def test_a_link_to_a_device_is_not_read(run: Path) -> None:
    (run / "modalities" / "vision" / "encoder.safetensors").unlink()
    (run / "modalities" / "vision" / "encoder.safetensors").symlink_to("/dev/zero")
    refused(run, "leads out of .*, to /dev/zero")


@pytest.mark.parametrize("file", ["modalities/vision/encoder.safetensors", "modalities/vision/modality.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(run: Path, file: str) -> None:
    (run / file).unlink()
    os.mkfifo(run / file)
    refused(run, "is no regular file|no modality.json")


def test_a_link_among_blobs_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "0"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("{}")
    (tmp_path / "blobs").symlink_to("elsewhere")
    (folder / "modality.json").symlink_to("../../blobs/secret")
    with pytest.raises(ValueError, match="leads out of"):
        read_json(folder / "modality.json", folder)


# Names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "..",
    ".",
    "",
    ".hidden",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "x" * 5000,
    7,
    ["x"],
    None,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_is_refused_in_every_list(run: Path, name: Any) -> None:
    folder = run / "modalities" / "vision"
    if isinstance(name, str):
        (run.parent / "x").write_text("")
        about = (folder / "modality.json").read_text()
        change(folder / "modality.json", lambda about: about["files"].update({name: "0" * 64}))
        refused(run, 'modality.json: "files": .* is no name')
        (folder / "modality.json").write_text(about)
    change(run / "molora.json", lambda about: about.update(modalities=[name]))
    refused(run, 'molora.json: "modalities": .* is no name')


@pytest.mark.parametrize("name", ["a.b", "keys", "train", "items", "forward", "__class__", "_modules"])
def test_a_name_that_torch_has_for_itself_is_refused(run: Path, name: str) -> None:
    (run / "modalities" / "vision").rename(run / "modalities" / name)
    change(run / "modalities" / name / "modality.json", lambda about: about.update(name=name))
    change(run / "molora.json", lambda about: about.update(modalities=[name]))
    refused(run, f"modality.json: '{name}' cannot name a modality or a projector: torch allows no dot")
    with pytest.raises(ConfigError, match=f"modalities.{name}: '{name}' cannot name"):
        blueprint(name, "vision", OPTIONS, ADAPTER, f"modalities.{name}")


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_a_projector_or_a_gate_of_a_name_that_torch_has_for_itself_is_refused(run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"audio.options.beside.vision: '{name}' cannot name"):
        blueprint("audio", "audio", {"beside": {"vision": name}}, ADAPTER, "audio")
    options = {"modalities": ["vision", name]}
    change(run / "molora.json", lambda about: about.update(router={"plugin": "learned", "options": options}))
    refused(run, f"molora.json: options: '{name}' cannot name")


def test_a_modality_folder_cannot_call_itself_a_path(run: Path, home: Path) -> None:
    folder = run / "modalities" / "vision"
    change(folder / "modality.json", lambda about: about.update(name="../../x"))
    with pytest.raises(ValueError, match="modality.json: \"name\": '../../x' is no name"):
        molora.load(home / "backbone", [folder], device="cpu")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda about: about["router"].update(path="/elsewhere"), "router.path is '/elsewhere'"),
        (lambda about: about["backbone"].update(folder=["x"]), "folder is .* expected a text"),
        (lambda about: about["backbone"].update(source={"a": 1}), "source is .* expected a text"),
        (lambda about: about.update(modalities=["vision", "vision"]), "lists one twice"),
        (lambda about: about.update(modalities={"vision": 1}), "modalities is .* expected a list"),
        (lambda about: about.update(files={"router.safetensors": "x"}), "has no SHA-256 but 'x'"),
        (lambda about: about.update(router="table"), "router is 'table', expected values by name"),
    ],
)
def test_a_run_of_another_form_is_one_paragraph(run: Path, edit: Callable[[Any], object], said: str) -> None:
    change(run / "molora.json", edit)
    refused(run, said)


# What is listed, and what changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["projector.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_loaded_is_listed(run: Path, file: str) -> None:
    change(run / "modalities" / "vision" / "modality.json", lambda about: about["files"].pop(file))
    refused(run, f'"files" lacks {file}')


def test_a_file_beside_the_list_is_named(run: Path) -> None:
    change(run / "modalities" / "vision" / "modality.json", lambda about: about["files"].pop("encoder.safetensors"))
    refused(run, "encoder.safetensors: is there, but .* does not list it")


@pytest.mark.parametrize("file", ["projector.safetensors", "encoder.safetensors", "adapter_model.safetensors"])
def test_what_was_swapped_after_it_was_hashed_is_not_loaded(run: Path, home: Path, file: str) -> None:
    folder = run / "modalities" / "vision"
    backbone, tokenizer = load_backbone(str(home / "backbone"))
    plan, _ = read_blueprint(folder, backbone.identity, "vision")
    model, _ = assemble(backbone, tokenizer, {"vision": plan}, RouterConfig())
    save_file({name: tensor + 1 for name, tensor in load_file(folder / file).items()}, folder / file)
    with pytest.raises(ValueError, match=f"{file}: does not have the hash in .*modality.json"):
        load_modality(model, "vision", folder)


def test_only_listed_files_are_copied(run: Path, tmp_path: Path) -> None:
    folder = run / "modalities" / "vision"
    (tmp_path / "secret").write_text("mine")
    (folder / "notes").symlink_to(tmp_path / "secret")
    (folder / "more.bin").write_text("")
    copy_modality(folder, tmp_path / "copy")
    files = json.loads((folder / "modality.json").read_text())["files"]
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*files, "modality.json"}


def test_a_listed_link_out_is_not_copied(run: Path, tmp_path: Path) -> None:
    folder = run / "modalities" / "vision"
    (tmp_path / "secret").write_text("mine")
    (folder / "notes").symlink_to(tmp_path / "secret")
    listed(folder, "notes")
    with pytest.raises(ValueError, match="notes: leads out of"):
        copy_modality(folder, tmp_path / "copy")
    assert not (tmp_path / "copy" / "notes").exists()


def test_what_changes_while_it_is_copied_is_not_kept(run: Path, tmp_path: Path) -> None:
    folder = run / "modalities" / "vision"
    save_file({"x": torch.ones(1)}, folder / "encoder.safetensors")
    with pytest.raises(ValueError, match="encoder.safetensors: does not have the hash"):
        copy_modality(folder, tmp_path / "copy")
    assert not (tmp_path / "copy" / "encoder.safetensors").exists()
    assert not [path for path in (tmp_path / "copy").iterdir() if path.name.endswith(".tmp")]


# Tensors -----------------------------------------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6), "'b' begins at byte 2, .* ends at 4"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(4), "begins at byte 0"),
    "gap": ({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12), "'b' begins at byte 8"),
    "behind the start": ({"a": entry(offsets=(4, 8))}, bytes(8), "'a' begins at byte 4"),
    "backwards": ({"a": entry(offsets=(4, 0))}, bytes(4), "its offsets give -4"),
    "negative": ({"a": entry(offsets=(-4, 0))}, bytes(4), "has no dtype, shape and data_offsets"),
    "far away": ({"a": entry(shape=(2**60,), offsets=(0, 2**62))}, bytes(4), "was its download interrupted"),
    "overflow": ({"a": entry(shape=(2**62, 4), offsets=(0, 0))}, b"", "needs .* bytes, its offsets give 0"),
    "more than a float": ({"a": entry(shape=[2**62] * 60)}, bytes(4), r"needs 2.71421e\+1120 bytes, its"),
    "many axes": ({"a": entry(shape=[2] * 10**6)}, bytes(4), "has no dtype, shape"),
    "shape of numbers with points": ({"a": entry(shape=(1.0,))}, bytes(4), "has no dtype, shape"),
    "shape of booleans": ({"a": entry(shape=(True,))}, bytes(4), "has no dtype, shape"),
    "no offsets": ({"a": {"dtype": "F32"}}, bytes(4), "has no dtype, shape"),
    "unknown dtype": ({"a": entry("X" * 10**6)}, bytes(4), "has dtype 'XXXX.*; known are"),
    "list as dtype": ({"a": entry(["F32"])}, bytes(4), "has dtype"),
    "another size": ({"a": entry("F64")}, bytes(4), "needs 8 bytes, its offsets give 4"),
    "more bytes than tensors": ({"a": entry()}, bytes(400), "396 bytes after its last tensor"),
    "metadata of another form": ({"__metadata__": {"a": [1]}}, b"", "__metadata__"),
    "no object": ([], b"", "expected a JSON object"),
    "a million tensors": (None, b"", "a header of .* bytes, allowed 16777216"),
    "deep": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b"", "nested deeper than 100"),
    "deep in lists": (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", b"", "nested deeper than 100"),
    "one name twice": (b'{"a": {}, "a": {}}', b"", "the key 'a' stands twice"),
    "the last of many names twice": (
        b"{" + b"".join(b'"%d": {},' % number for number in range(10**6)) + b'"999999": {}}',
        b"",
        "the key '999999' stands twice",
    ),
    "no UTF-8": (b'{"\xff": 1}', b"", "not JSON but binary"),
    "NaN": (b'{"a": NaN}', b"", "NaN is no number"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(what: str, tmp_path: Path) -> None:
    header, data, said = HEADERS[what]
    if header is None:
        header = {f"tensor.{number}": entry(shape=(0,), offsets=(0, 0)) for number in range(10**6 // 4)}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{said}") as caught, TensorFile(path):
        pass
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**24 + 1, 1000])
def test_a_header_that_is_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="allowed 16777216|interrupted"), TensorFile(path):
        pass


@pytest.mark.parametrize("seed", range(4))
def test_mutated_tensors_are_refused_or_read_and_never_have_the_hash(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    whole = path.read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(data))
            kind = generator.randrange(4)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                data[at : at + 1] = generator.choice([b"0", b"9", b"-", b'"', b"{", b"]", b",", b"1e9", b"null"])
            elif kind == 2:
                del data[at : at + generator.randint(1, 30)]
            else:
                data[at:at] = data[at : at + generator.randint(1, 30)]
        path.write_bytes(data)
        try:
            with TensorFile(path) as file:
                found = dict(file.tensors())
            assert sum(tensor.numel() * tensor.element_size() for tensor in found.values()) <= len(data)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        if data != whole:
            with pytest.raises(ValueError), TensorFile(path) as file:
                dict(file.tensors(sha256))
    assert 100 < refused < 500  # bytes of a tensor may be any


@pytest.mark.parametrize("seed", range(2))
def test_mutated_descriptions_are_refused_in_one_paragraph_or_open(run: Path, seed: int) -> None:
    generator = random.Random(seed)
    values = [None, 7, -1, 2**70, 1e308, True, "", "../x", "\0", [], {}, [[]], {"a": {"b": 1}}, "x" * 500]
    for path in (run / "molora.json", run / "modalities" / "vision" / "modality.json"):
        whole = json.loads(path.read_text())
        for _ in range(60):
            about = json.loads(json.dumps(whole))
            place = about
            while True:
                key = generator.choice(sorted(place))
                if not isinstance(place[key], dict) or not place[key] or generator.random() < 0.3:
                    break
                place = place[key]
            place[key] = generator.choice(values)
            path.write_text(json.dumps(about))
            try:
                molora.load(run, device="cpu")
            except (ValueError, OSError) as error:
                assert len(str(error)) < 2000, str(error)[:300]
        path.write_text(json.dumps(whole))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["projector.safetensors", "adapter_model.safetensors"])
def test_numbers_that_are_none_are_told_at_load(run: Path, file: str, value: float) -> None:
    folder = run / "modalities" / "vision"
    tensors = load_file(folder / file)
    name = max(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file)
    listed(folder, file)
    refused(run, f"{file}: {name} holds 1 numbers of .* NaN or infinite")


@pytest.mark.parametrize("file", ["projector.safetensors", "adapter_model.safetensors", "encoder.safetensors"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_of_another_kind_is_not_cast(run: Path, file: str, dtype: torch.dtype) -> None:
    folder = run / "modalities" / "vision"
    tensors = load_file(folder / file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / file)
    listed(folder, file)
    refused(run, f"{file}: {name} is stored as [A-Z0-9_]*, expected F32 or BF16 or F16 or F64; get the file")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tensors_of_another_precision_are_read(run: Path, dtype: torch.dtype) -> None:
    folder = run / "modalities" / "vision"
    for file in ("projector.safetensors", "adapter_model.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / file).items()}, folder / file)
        listed(folder, file)
    molora.load(run, device="cpu")


def test_a_name_of_a_tensor_writes_nothing_on_the_terminal(run: Path) -> None:
    folder = run / "modalities" / "vision"
    save_file({"\x1b[2J\n": torch.ones(1)}, folder / "projector.safetensors")
    listed(folder, "projector.safetensors")
    refused(run, r"'\\x1b\[2J\\n' is no name of a tensor")


def test_a_folder_in_place_of_a_file_is_named(run: Path) -> None:
    (run / "modalities" / "vision" / "projector.safetensors").unlink()
    (run / "modalities" / "vision" / "projector.safetensors").mkdir()
    refused(run, "projector.safetensors: is no regular file")


MODALITY_EDITS: list[tuple[Callable[[Any], object], str]] = [
    (lambda about: about.update(options=None), "options is None"),
    (lambda about: about["options"].update({"tower.kind": "x"}), "tower.kind: no such key"),
    (lambda about: about["options"].update(crop_pixels=-64), "a crop of -64 pixels"),
    (lambda about: about["options"].update(pool=0), "cannot be pooled by 0"),
    (lambda about: about["options"].update(max_pixels=-1), "max_pixels from 1"),
    (lambda about: about["options"].update(crop_pixels="${oc.env:HOME}"), "expected int, got '\\${oc.env:HOME}'"),
    (lambda about: about["options"]["tower"].update(kind="other"), "kind: expected one of"),
    (lambda about: about["options"]["tower"]["convit"].update(heads=0), "convit: every size is at least 1"),
    (lambda about: about["options"]["tower"]["convit"].update(depth=0), "convit: every size is at least 1"),
    (lambda about: about.update(part_type="text"), "part_type was 'text', is 'image'"),
    (lambda about: about.update(frame_width=16.0), "frame_width is 16.0, expected a whole number"),
    (lambda about: about.update(projectors=[["default"]]), "projectors was"),
    (lambda about: about["backbone"].update(weights=[1] * 10**5), "trained with other backbone weights"),
    (lambda about: about["backbone"].update(weights="", source="\x1b[2J\n" * 10**5), "trained with other backbone"),
    (lambda about: about.update(backbone={}), "trained with other backbone weights"),
    (lambda about: about["files"].update({"modality.json": "0" * 64}), "does not have the hash"),
    (lambda about: about.pop("format_version"), "format version 'None'"),
    (lambda about: about.update(name="\ud800"), "is no name"),
    (lambda about: about.update(plugin="\ud800"), "no modality is called"),
    (lambda about: about.update(plugin="molora.encoders.vision:"), "has no ''"),
    (lambda about: about.update(plugin="molora...:x"), "importing 'molora...' failed"),
    (lambda about: about.update(plugin="molora.encoders.vision:Vision.load"), "has no 'Vision.load'"),
    (lambda about: about.update(plugin_sha256=[1]), "no plugin's; copy the folder again"),
]
RUN_EDITS: list[tuple[Callable[[Any], object], str]] = [
    (lambda about: about["backbone"].update(folder="a\0b"), "folder is .*, expected a text"),
    (lambda about: about["backbone"].update(folder="\ud800"), "folder is .*, expected a text"),
    (lambda about: about["backbone"].update(folder="molora.json"), "its backbone is not in"),
    (lambda about: about["backbone"].update(folder=None, source="a b\n"), "source is .*, expected a text"),
    (lambda about: about["backbone"].update(dtype="\x1b[2J"), "dtype is .*, expected a text"),
    (lambda about: about["backbone"].update(dtype="int8"), "dtype 'int8' is none"),
    (lambda about: about["router"].update(options={"rules": {"vision": "other"}}), "names adapter 'other'"),
    (lambda about: about["router"].update(options={"rules": {"+": "vision"}}), "'\\+' names no modality"),
    (lambda about: about["router"].update(options={"rules": {"text": "vision"}}), "which are for media"),
    (
        lambda about: about.update(router={"plugin": "learned", "options": {"modalities": ["vision"] * 20000}}),
        "made for 20000 modalities, allowed 1000",
    ),
    (lambda about: about.update(router_sha256={"a": 1}), "no plugin's; copy the folder again"),
]
ADAPTER_EDITS: list[tuple[Callable[[Any], object], str]] = [
    (lambda about: about.update(target_modules=None), "target_modules: missing"),
    (lambda about: about.update(target_modules=["lm_head"]), "lm_head is the output head"),
    (lambda about: about.update(target_modules=[["o_proj"]]), "target_modules: .* is refused"),
    (lambda about: about.update(layers_to_transform=[-1]), "hits nothing"),
    (lambda about: about.update(exclude_modules=["o_proj"]), "hits nothing"),
    (lambda about: about.update(r=True), "r: True is refused"),
    (lambda about: about.update(peft_type=None), "peft_type is None, expected LORA"),
]


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        *(("modalities/vision/modality.json", *edited) for edited in MODALITY_EDITS),
        *(("molora.json", *edited) for edited in RUN_EDITS),
        *(("modalities/vision/adapter_config.json", *edited) for edited in ADAPTER_EDITS),
    ],
)
def test_an_edit_of_a_received_run_is_one_clear_error(
    run: Path, file: str, edit: Callable[[Any], object], said: str
) -> None:
    change(run / file, edit)
    if file.endswith("adapter_config.json"):
        listed(run / "modalities" / "vision", "adapter_config.json")
    refused(run, said)


def test_a_tensor_too_many_is_named_before_it_is_read(run: Path) -> None:
    folder = run / "modalities" / "vision"
    save_file({**load_file(folder / "projector.safetensors"), "more": torch.ones(1)}, folder / "projector.safetensors")
    listed(folder, "projector.safetensors")
    refused(run, "projector.safetensors: the tensors do not fit: unexpected more")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b'{"weight_map": {"a": "../../x"}}', "weight_map: '../../x' is no name"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "weight_map: '/etc/passwd' is no name"),
        (b'{"weight_map": {"a": ["x"]}}', "weight_map: .* is no name"),
        (b'{"weight_map": ["a"]}', '"weight_map" is no list of files by tensor'),
        (b"{}", '"weight_map" is no list of files by tensor'),
        (b"[]", "expected a JSON object, found list"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "the key 'a' stands twice"),
        (b'{"weight_map": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 100 levels"),
        (b'{"a": "' + b" " * 2**24 + b'"}', "allowed 16777216"),
        (b"\xff", "not JSON but binary"),
    ],
    ids=["above", "elsewhere", "list", "lists", "empty", "no object", "twice", "deep", "huge", "binary"],
)
def test_an_index_of_an_encoders_weights_names_files_of_its_folder(tmp_path: Path, index: bytes, said: str) -> None:
    (tmp_path / "encoder.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=f"encoder.safetensors.index.json: .*({said})"):
        weight_files(tmp_path, "encoder.safetensors")


def test_a_setting_of_a_long_name_is_looked_at_once(tmp_path: Path) -> None:
    save_backbone(tmp_path / "backbone")
    change(tmp_path / "backbone" / "config.json", lambda about: about.update({"dropout" * 200_000 + "\n": 0.5}))
    load_backbone(str(tmp_path / "backbone"))


# What an encoder's options say ------------------------------------------------------------------------------------


def tower(**options: Any) -> dict[str, Any]:
    return {**OPTIONS, "tower": {"layer": -1, **options}}


def ear(**options: Any) -> dict[str, Any]:
    return {"tower": {"kind": "pretrained", "pretrained": {"architecture": "whisper", **options}}}


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMM = {"kind": "timm", "name": "test_vit", "pretrained": False, "patch_pixels": 16}
SIGLIP = {"kind": "transformers", "pretrained": False}
SCRATCH_EAR = {"pretrained": False, "arguments": {"d_model": 16}}
# The modality, its options, and why it is refused. PICKLE is a file that runs code when it is unpickled.
OPTIONS_OF_STRANGERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a checkpoint": ("vision", tower(**TIMM, arguments={"checkpoint_path": "PICKLE"}), "takes no 'checkpoint_path'"),
    "a cache": ("vision", tower(**TIMM, arguments={"cache_dir": "PICKLE"}), "takes no 'cache_dir'"),
    "a config": (
        "vision",
        tower(**TIMM, arguments={"pretrained_cfg": {"file": "PICKLE"}}),
        "takes no 'pretrained_cfg'",
    ),
    "a part that is none": ("vision", tower(**TIMM, arguments={"act_layer": {"a": 1}}), "act_layer is .* expected"),
    "a file of weights": ("vision", tower(kind="timm", name="test_vit", path="PICKLE"), "name the path .*PICKLE"),
    "a file of none": ("vision", tower(**{**TIMM, "path": "PICKLE"}), "name the path .*PICKLE"),
    "a folder": ("vision", tower(kind="transformers", path="/etc"), "name the path '/etc'"),
    "a folder of sound": ("audio", ear(path="/etc"), "name the path '/etc'"),
    "the hub": ("vision", tower(kind="transformers", name="a/b"), "name 'a/b' on the hub at revision None"),
    "the hub's timm": ("vision", tower(kind="timm", name="test_vit.r160_in1k"), "on the hub at revision None"),
    "the hub's sizes": ("vision", tower(**{**TIMM, "name": "a/b"}), "name 'a/b' on the hub"),
    "the hub's sizes without slash": ("vision", tower(**SIGLIP, name="gpt2"), "name 'gpt2' on the hub"),
    "a branch": ("vision", tower(kind="transformers", name="a/b", revision="main"), "at revision 'main'"),
    "another commit": ("audio", ear(name="a/b", revision=COMMIT), f"at revision '{COMMIT}', expected the commit"),
    "a wide tower": ("vision", {**OPTIONS, "tower": {**OPTIONS["tower"], "convit": {"width": 60_000}}}, "do not fit"),
    "a wider one": (
        "vision",
        {**OPTIONS, "tower": {**OPTIONS["tower"], "convit": {"width": 2**40}}},
        "width is 1.*most",
    ),
    "a deep tower": (
        "vision",
        {**OPTIONS, "tower": {**OPTIONS["tower"], "convit": {"depth": 10**9}}},
        "depth is 1.*most",
    ),
    "a deep timm": ("vision", tower(**TIMM, arguments={"depth": 10**9}), "depth is 1000000000, allowed 1000"),
    "a long list": ("vision", tower(**TIMM, arguments={"depths": [9] * 10**5}), "depths is .*16 of them"),
    "a deep SigLIP": ("vision", tower(**SIGLIP, arguments={"num_hidden_layers": 10**9}), "num_hidden_layers is 1"),
    "a huge crop": ("vision", {**OPTIONS, "crop_pixels": 2**30}, "crop_pixels is at most 8192"),
    "many crops": ("vision", {**OPTIONS, "max_crops": 2**30}, "max_crops 1024"),
    "a wide ear": ("audio", {"tower": {"conformer": {"width": 60_000, "heads": 1}}}, "do not fit"),
    "a deep ear": ("audio", {"tower": {"conformer": {"blocks": 10**9}}}, "blocks is 1000000000, allowed 1000"),
    "a deep Whisper": ("audio", ear(pretrained=False, arguments={"encoder_layers": 10**9}), "encoder_layers is 1"),
    "filters of sound": ("audio", ear(**SCRATCH_EAR, features={"n_fft": 2**30}), "n_fft is 1073741824, expected"),
    "windows of years": ("audio", ear(**SCRATCH_EAR, features={"chunk_length": 10**9}), "chunk_length is .* to 120"),
}


@pytest.mark.parametrize("what", OPTIONS_OF_STRANGERS)
def test_options_that_read_fetch_or_take_too_much_are_refused(
    run: Path, what: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, options, said = OPTIONS_OF_STRANGERS[what]
    pickle = run.parent / "PICKLE"
    torch.save(Surprise(canary), pickle)
    options = json.loads(json.dumps(options).replace('"PICKLE"', json.dumps(str(pickle))))
    change(run / "modalities" / "vision" / "modality.json", lambda about: about.update(plugin=plugin, options=options))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    refused(run, said)


class Surprise:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({}, "hash is None"),
        ({"hash": 7, "origin": None}, "hash is 7"),
        ({"hash": "0" * 64, "origin": "x"}, "origin 'x'"),
        ({"hash": "0" * 64, "origin": None}, 'files" lacks encoder.safetensors, and .* no origin'),
        ({"hash": "0" * 64, "origin": {"source": "a", "revision": COMMIT}}, "neither in encoder.safetensors nor named"),
    ],
)
def test_an_encoder_that_is_nowhere_is_not_built(run: Path, encoder: Any, said: str) -> None:
    folder = run / "modalities" / "vision"
    (folder / "encoder.safetensors").unlink()
    change(folder / "modality.json", lambda about: about["files"].pop("encoder.safetensors"))
    change(folder / "modality.json", lambda about: about.update(encoder=encoder))
    refused(run, said)


def test_an_encoder_that_was_pinned_opens_from_the_hub_and_no_other_does(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(
        repository / "snapshots" / COMMIT
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"crop_pixels": 56, "tower": {"kind": "transformers", "name": "someone/tiny", "revision": COMMIT}}
    backbone, tokenizer = load_backbone(str(home / "backbone"))
    plans = {"vision": blueprint("vision", "vision", options, ADAPTER, "vision")}
    model, _ = assemble(backbone, tokenizer, plans, RouterConfig())
    folder = tmp_path / "vision"
    pristine = {"vision": tensor_hash(model.encoders["vision"].state_dict())}
    save_modality(model, "vision", plans["vision"], folder, pristine)
    assert not (folder / "encoder.safetensors").exists()
    molora.load(home / "backbone", [folder], device="cpu")
    path = repository / "snapshots" / COMMIT / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="whose tensors now have another hash"):
        molora.load(home / "backbone", [folder], device="cpu")


def test_limits_of_a_received_folder_have_a_most() -> None:
    with pytest.raises(ValueError, match="max_pixels from 1 to 178956970"):
        VisionConfig(max_pixels=10**12)
    for seconds in (0, 14_401, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"max_seconds is above 0 and at most 14400, got {seconds}"):
            AudioConfig(max_seconds=seconds)


# JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["molora.json", "modalities/vision/modality.json"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a":' * 10**6, "nested deeper than 100 levels|not valid JSON"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 100 levels"),
        (b'{"a": "' + b" " * 2**24 + b'"}', "has 16777225 bytes, allowed 16777216"),
        (b'{"format_version": "1.0", "format_version": "1.1"}', "the key 'format_version' stands twice"),
        (b'{"a": 1' + b"0" * 10**5 + b"}", "not valid JSON"),
        (os.urandom(64), "not JSON but binary|not valid JSON"),
        (b'{"format_version": "' + b"9" * 10**6 + b'"}', "format version"),
    ],
    ids=["deep and cut", "deep", "huge", "twice", "a long number", "binary", "a long version"],
)
def test_json_has_bounds(run: Path, file: str, data: bytes, said: str) -> None:
    (run / file).write_bytes(data)
    refused(run, f"{Path(file).name}: .*({said})")


# Adapters ----------------------------------------------------------------------------------------------------------

SLOW = r"(([a-z0-9._]+)+)+!"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**6}, r"rank 1000000 at .*o_proj, allowed 1024 there"),
    "rank by pattern": ({"rank_pattern": {"o_proj": 10**9}}, r"rank 1000000000 at .*o_proj, allowed 1024"),
    "rank of nothing": ({"r": 0}, "r: 0 is refused"),
    "negative rank": ({"r": -1}, "r: -1 is refused"),
    "rank as text": ({"r": "8"}, "r: '8' is refused"),
    "rank as a boolean": ({"r": True}, "r: True is refused"),
    "alpha without end": ({"lora_alpha": float("inf")}, "lora_alpha: inf is refused"),
    "alpha beyond a float": ({"lora_alpha": 10**400}, "lora_alpha: 1000+ is refused; write a finite number"),
    "alpha of one layer beyond a float": ({"alpha_pattern": {"o_proj": 10**400}}, "alpha_pattern: .* is refused"),
    "alpha that is no number": ({"lora_alpha": float("nan")}, "NaN is no number"),
    "alpha by pattern": ({"alpha_pattern": {"o_proj": float("inf")}}, "alpha_pattern: .* is refused"),
    "dropout of all": ({"lora_dropout": 1.0}, "lora_dropout: 1.0 is refused; write a number from 0 to below 1"),
    "a slow pattern": ({"target_modules": SLOW}, "matching the backbone's layers takes over 2 s"),
    "a slow exclusion": ({"exclude_modules": SLOW}, "matching the backbone's layers takes over 2 s"),
    "a slow name of ranks": ({"rank_pattern": {SLOW: 4}}, "matching the backbone's layers takes over 2 s"),
    "a slow name of alphas": ({"alpha_pattern": {r"(.*.*.*)*\d!": 4}}, "matching the backbone's layers takes over 2 s"),
    "a pattern that is none": ({"target_modules": "("}, "is no regular expression"),
    "brackets without end": ({"target_modules": "(" * 4000}, "is no regular expression"),
    "a pattern in layers": (
        {"layers_pattern": "(a+)+", "layers_to_transform": [0]},
        r"layers_pattern: '\(a\+\)\+' is refused",
    ),
    "a long pattern": ({"target_modules": "a" * 10**6}, "target_modules: 'aaaa.* is refused"),
    "many targets": ({"target_modules": [f"x{i}" for i in range(10**5)]}, "target_modules: .* is refused"),
    "targets of another kind": ({"target_modules": {"o_proj": 1}}, "target_modules: .* is refused"),
    "many layers": ({"layers_to_transform": [0] * 10**6}, "layers_to_transform: .* is refused"),
    "another kind": ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', expected LORA"),
    "no kind": ({"peft_type": ["LORA"]}, "peft_type is .*, expected LORA"),
    "an unknown setting": ({"from_the_future": {"a": 1}}, "from_the_future: this PEFT's LoraConfig has no such option"),
    "a variant": ({"use_dora": True}, "use_dora: this LoRA variant has no routed form"),
    "frozen layers": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: .* is refused"),
    "another start": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is refused"),
    "a module": ({"megatron_config": {"a": 1}, "megatron_core": "surprise"}, "megatron_config: .* names a module"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_an_adapter_that_asks_for_too_much_is_refused(
    run: Path, what: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent / "surprise.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(run.parent)
    folder = run / "modalities" / "vision"
    changes, said = CONFIGS[what]
    change(folder / "adapter_config.json", lambda about: about.update(changes))
    listed(folder, "adapter_config.json")
    refused(run, said)


# Backbones ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(home: Path, run: Path) -> Path:
    """A copy of the backbone, which the run names."""
    shutil.copytree(home / "backbone", run / "backbone")
    change(run / "molora.json", lambda about: about["backbone"].update(folder="backbone"))
    return run / "backbone"


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 0.5), ("hidden_act", "relu"), ("num_attention_heads", 8), ("head_dim", 2)]
)
def test_an_edited_setting_is_another_backbone(run: Path, backbone: Path, key: str, value: Any) -> None:
    change(backbone / "config.json", lambda config: config.update({key: value}))
    refused(run, f"{key} was .*, is |transformers cannot open it")


def test_a_backbone_does_not_lead_to_another_model(run: Path, backbone: Path, home: Path) -> None:
    (backbone / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(home / "backbone")})
    )
    refused(run, "holds adapter_config.json, so transformers would open the model that it names")


def test_weights_that_are_not_hashed_are_not_loaded(run: Path, backbone: Path) -> None:
    change(backbone / "config.json", lambda config: config.update(transformers_weights="other.bin"))
    refused(run, "transformers_weights in config.json names 'other.bin'")


def test_a_model_type_of_another_kind_is_told(run: Path, backbone: Path) -> None:
    change(backbone / "config.json", lambda config: config.update(model_type=[]))
    with pytest.raises(ValueError, match=r"config.json: model_type is \[\], expected a text"):
        molora.load(backbone, device="cpu")


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(hidden_size="x"),
        lambda config: config.update(num_attention_heads=0),
        lambda config: config.update(rope_scaling=[1]),
        lambda config: config.update(num_hidden_layers=[]),
    ],
)
def test_counting_the_memory_of_a_damaged_backbone_is_no_traceback(
    backbone: Path, edit: Callable[[Any], object]
) -> None:
    change(backbone / "config.json", edit)
    with pytest.raises((ValueError, OSError)):
        on_meta(backbone, dtype="float32")


ODD = {
    "sliding_window": ["abc", -3, 2**70, 1.5],
    "logit_scale": ["x", [], True, 2**70],
    "logits_scaling": ["64", {}],
    "final_logit_softcapping": ["x", float("inf")],
    "attn_logit_softcapping": ["x"],
    "max_position_embeddings": [0, -3, None, "256", 1.5],
    "num_attention_heads": [0, -1, "4", None],
    "num_key_value_heads": [0, -2, []],
    "num_hidden_layers": [0, 2**70, 10**6, "2"],
    "head_dim": [0, 1.5, 2**70],
    "hidden_size": ["64", -32, 2**40],
    "vocab_size": [0, 2**62, None],
    "intermediate_size": [2**40],
    "layer_types": [0, [1, 2], "full_attention"],
    "eos_token_id": ["x", [[1]], 1.5],
    "rope_theta": [None, "x", 0],
    "original_max_position_embeddings": ["x", 0],
    "rope_parameters": [{"rope_theta": None}, {"factor": "x"}, {"full_attention": {"rope_theta": []}}],
    "text_config": [{"hidden_size": "x"}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_an_odd_setting_of_a_backbone_is_named_with_its_file(run: Path, backbone: Path, key: str, value: Any) -> None:
    change(backbone / "config.json", lambda config: config.update({key: value}))
    inner = "|".join(value) if isinstance(value, dict) and value else key
    said = f"backbone/config.json: ({inner}|rope_theta|{key}) is .*, (expected|allowed) .*; copy the file again"
    refused(run, said)
    with pytest.raises(ValueError, match=said):
        on_meta(backbone, dtype="float32")


@pytest.mark.parametrize("key", ["n_positions", "n_embd", "n_layer"])
def test_an_odd_setting_under_a_familys_own_name_is_named_too(tmp_path: Path, key: str) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=300).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 0}))
    with pytest.raises(ConfigError, match=f"config.json: {key} is 0, expected a whole number over 0"):
        read_config(tmp_path)


def test_weights_that_are_not_there_are_not_made_up(backbone: Path) -> None:
    tensors = load_file(backbone / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, backbone / "model.safetensors")
    with pytest.raises(ValueError, match=f"its weights lack 1 tensors .* such as {name}"):
        molora.load(backbone, device="cpu")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_of_a_backbone_are_followed_to_files_as_people_share_weights(
    run: Path, backbone: Path, tmp_path: Path, file: str
) -> None:
    shutil.move(backbone / file, tmp_path / file)
    (backbone / file).symlink_to(tmp_path / file)
    molora.load(run, device="cpu")


def test_a_length_of_a_tokenizer_that_is_no_number_is_told(backbone: Path) -> None:
    change(backbone / "tokenizer_config.json", lambda config: config.update(model_max_length="x"))
    with pytest.raises(ConfigError, match="tokenizer_config.json: model_max_length is 'x', expected a number"):
        molora.load(backbone, device="cpu")


def test_counting_memory_leads_to_no_other_model_either(backbone: Path) -> None:
    (backbone / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapter_config.json"):
        on_meta(backbone, dtype="float32")
    (backbone / "adapter_config.json").unlink()
    (backbone / "config.json").write_bytes(b'{"a": "' + b" " * 2**24 + b'"}')
    with pytest.raises(ValueError, match="has 16777225 bytes, allowed 16777216"):
        on_meta(backbone, dtype="float32")


@pytest.mark.parametrize("file", ["../other.safetensors", "/x/other.safetensors"])
def test_an_index_names_files_of_its_folder(run: Path, backbone: Path, file: str) -> None:
    shutil.move(backbone / "model.safetensors", run / "other.safetensors")
    (backbone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refused(run, "weight_map: .*other.safetensors' is no name")


def test_pickles_of_a_backbone_are_not_opened(run: Path, backbone: Path, canary: Path) -> None:
    (backbone / "model.safetensors").unlink()
    torch.save(Surprise(canary), backbone / "pytorch_model.bin")
    refused(run, "no .safetensors weights .*reads no pickles")


def test_code_of_a_backbone_does_not_run(run: Path, backbone: Path, canary: Path) -> None:
    (backbone / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\nclass M: ...\n")
    code = {"AutoConfig": "modeling.M", "AutoModelForCausalLM": "modeling.M", "AutoTokenizer": ["modeling.M", None]}
    for file in ("config.json", "tokenizer_config.json"):
        change(backbone / file, lambda config: config.update(auto_map=code, model_type="surprise"))
    with pytest.raises((ValueError, OSError), match="custom code|does not recognize|surprise"):
        molora.load(run, device="cpu")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_pipe_in_a_backbone_does_not_hang(run: Path, backbone: Path, file: str) -> None:
    (backbone / file).unlink(missing_ok=True)
    os.mkfifo(backbone / file)
    with pytest.raises((ValueError, OSError), match="is no regular file|no config.json"):
        molora.load(run, device="cpu")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_an_interrupted_download_of_a_backbone_does_not_hang(run: Path, backbone: Path, size: int) -> None:
    path = backbone / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(run, "model.safetensors: not a whole .*interrupted")


# The cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"weights": 7, "probes": {}}', b'{"weights": "x", "probes": {}}'),
        b'{"weights": "' + b"0" * 64 + b'", "probes": 7}',
        b'{"a":' * 10**5,
    ],
)
def test_a_damaged_cache_is_made_anew(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    first, _ = load_backbone(str(home / "backbone"))
    (entry,) = (cache_folder() / "backbones").iterdir()
    entry.write_bytes(data)
    again, _ = load_backbone(str(home / "backbone"))
    assert again.identity == first.identity and again.embed_scale == first.embed_scale
    assert json.loads(entry.read_text())["weights"] == first.identity.weights


@pytest.mark.parametrize("probe", [7, None, {}, {"embed_scale": "1"}, {"embed_scale": float("inf")}])
def test_a_remembered_probe_of_another_form_is_made_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: Any
) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    first, _ = load_backbone(str(home / "backbone"))
    (entry,) = (cache_folder() / "backbones").iterdir()
    change(entry, lambda found: found.update(probes=dict.fromkeys(found["probes"], probe)))
    assert load_backbone(str(home / "backbone"))[0].embed_scale == first.embed_scale


def test_weights_of_the_same_size_and_time_are_hashed_anew(backbone: Path) -> None:
    path = backbone / "model.safetensors"
    before, _ = load_backbone(str(backbone))
    stamp = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after, _ = load_backbone(str(backbone))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns
    assert after.identity.weights != before.identity.weights


# Writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modalities", "state", "tensorboard", "metrics.jsonl", "modalities/vision"])
def test_a_run_with_a_link_out_is_not_written_through(run: Path, tmp_path: Path, name: str) -> None:
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "mine").write_text("mine")
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(there / "mine" if name == "metrics.jsonl" else there)
    with pytest.raises(ValueError, match="leads out of the run, to .*elsewhere"), hold(run):
        pass
    assert [path.name for path in there.iterdir()] == ["mine"]


def test_a_lock_that_is_a_link_is_not_followed(run: Path, canary: Path) -> None:
    (run / ".lock").symlink_to(canary)
    with pytest.raises(ValueError, match="cannot be locked .*remove the link"), hold(run):
        pass


def test_a_lock_that_is_another_file_too_is_not_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", run / ".lock")
    with pytest.raises(ValueError, match="is no file of its own"), hold(run):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_that_is_a_pipe_does_not_hang(run: Path) -> None:
    os.mkfifo(run / ".lock")
    with pytest.raises(ValueError, match="is no file of its own"), hold(run):
        pass


def test_temporary_names_that_others_guess_are_not_used(tmp_path: Path, canary: Path) -> None:
    for name in (".a.json.tmp", "a.json.tmp", ".molora.tmp"):
        (tmp_path / name).symlink_to(canary)
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": {}}', '{"model_type": 7, "vocab_size": "x", "model": 1}'])
def test_a_damaged_file_of_a_backbone_is_no_traceback(run: Path, backbone: Path, file: str, text: str) -> None:
    (backbone / file).write_text(text)
    with contextlib.suppress(ValueError, OSError):  # what the command line prints as one paragraph
        molora.load(run, device="cpu")
