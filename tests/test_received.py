"""What others made is read within bounds, and the bytes that are hashed are the bytes that are loaded."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora.model.identity import weights_hash
from molora.received import TensorFile, check_name, file_hash, open_file, parse_json, read_json, read_tensors

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
]


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (3, 0, 2), (5,), (2, 3, 4)]
    numbers = {shape: torch.randint(0, 2, shape, generator=generator) for shape in shapes}
    return {f"{dtype}.{shape}": numbers[shape].to(dtype) for dtype in DTYPES for shape in shapes}


def test_tensors_of_every_dtype_and_shape_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some(), path, {"format": "pt"})
    ours, theirs = read_tensors(path), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


def test_the_hash_of_what_was_read_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some(), path)
    with TensorFile(path) as file:
        assert len(dict(file.tensors(hashlib.sha256(path.read_bytes()).hexdigest()))) == len(some())
    with TensorFile(path) as file, pytest.raises(ValueError, match="does not have the hash"):
        dict(file.tensors("0" * 64))


def test_the_hash_of_weights_is_what_it_always_was(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    ones, zero = struct.pack("<6f", *[1.0] * 6), bytes(2)
    lines = [f"a F32 [2, 3] {hashlib.sha256(ones).hexdigest()}", f"b BF16 [1] {hashlib.sha256(zero).hexdigest()}"]
    assert weights_hash(tmp_path) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_a_tensor_can_be_read_alone(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3), "b": torch.arange(5)}, tmp_path / "a.safetensors")
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.tensor("b").tolist() == [0, 1, 2, 3, 4]
        assert file.tensor("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -100, -1])
def test_an_interrupted_download_is_named_for_what_it_is(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    for read in (read_tensors, lambda path: weights_hash(path.parent)):
        with pytest.raises(ValueError, match=r"model.safetensors: not a whole .* bytes of .*interrupted"):
            read(path)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(100)}, path)
    with TensorFile(path) as file, pytest.raises(ValueError, match="written to while it was read"):
        for _ in file.tensors():
            with open(path, "r+b") as other:
                other.seek(-4, os.SEEK_END)
                other.write(b"1234")
    with TensorFile(path) as file, pytest.raises(ValueError, match="ended while it was read"):
        for _ in file.tensors():
            os.truncate(path, 600)


def test_a_snapshot_of_the_hub_is_a_folder_of_links_that_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "ff").write_text("{}")
    (snapshot / "modality.json").symlink_to("../../blobs/ff")
    assert read_json(snapshot / "modality.json", snapshot) == {}
    assert file_hash(snapshot / "modality.json", snapshot) == hashlib.sha256(b"{}").hexdigest()


def test_a_link_inside_its_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{}")
    (tmp_path / "b").symlink_to("a")
    with open_file(tmp_path / "b", tmp_path) as file:
        assert file.read() == b"{}"


@pytest.mark.parametrize("name", ["vision", "Vision 2", "vision-v1.2", "視覚", "a..b", "x" * 128])
def test_names_are_names(name: str) -> None:
    assert check_name(name, "here") == name


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[1]", "expected a JSON object, found list"),
        (b"\x80\x03}q", "not JSON but binary"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_one_paragraph_that_names_the_file(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"a.json: .*{said}") as caught:
        parse_json(data, "a.json")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_infinities_are_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": Infinity, "b": -Infinity}', "") == {"a": float("inf"), "b": float("-inf")}
