"""What `molora verify` says of a model: every row holds in any dtype, and a fault is named by the row that promises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

import molora
from molora.checkpoint.opening import locate
from molora.config import build
from molora.inference.load import LoadedModel
from molora.model import attention
from molora.model.attention import PageTable
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import RoutedLinear, adapter_parameters
from molora.model.probe import decoder_layers
from molora.model.rotary import SampleRotary
from molora.pack import Pack
from molora.received import file_hash
from molora.routing import Flow, Routing, current_flow, flowing
from molora.terminal import Finding
from molora.testing import save_backbone, tiny_model
from molora.train.loop import train
from molora.train.recipe import Recipe
from molora.verify.promises import promises
from molora.verify.rounding import in_fp32, measure

DTYPES = ("float32", "bfloat16", "float16")
ADAPTER = {"r": 4, "lora_alpha": 64, "target_modules": ["qkv_proj", "o_proj", "down_proj"]}
PARTS: dict[str, dict[str, Any]] = {
    "numbers": {"type": "numbers", "numbers": [1.0, -0.5, 0.25]},
    "letters": {"type": "letters", "letters": "sense"},
}


def run_of(home: Path, name: str, family: str, adapter: dict[str, Any]) -> Path:
    """A run with two modalities that have learned something, on a tiny backbone."""
    save_backbone(home / f"{name}_backbone", family)
    with open(home / f"{name}.jsonl", "w") as file:
        for modalities in ((), ("numbers",), ("letters",), ("numbers", "letters")):
            content = [*(PARTS[modality] for modality in modalities), {"type": "text", "text": "what is it?"}]
            answer = {"role": "assistant", "content": "+".join(modalities) or "text"}
            file.write(json.dumps({"messages": [{"role": "user", "content": content}, answer]}) + "\n")
    parts = [f"{kind}.{modality}" for kind in ("encoders", "projectors", "adapters") for modality in PARTS]
    values = {
        "run": str(home / name),
        "backbone": {"path": str(home / f"{name}_backbone")},
        "modalities": {n: {"plugin": f"molora.testing:{n.capitalize()}", "adapter": adapter} for n in PARTS},
        "router": {"options": {"rules": {"letters+numbers": "letters"}}},
        "stages": [
            {
                "name": "tune",
                "train": {part: {"learning_rate": 2e-2} for part in parts},
                "data": {"rows": {"kind": "messages", "options": {"path": str(home / f"{name}.jsonl")}}},
                "steps": 6,
                "samples_per_step": 4,
            }
        ],
        "device": "cpu",
    }
    return train(build(Recipe, values, "test"), show=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    run_of(folder, "run", "phi4-mini", ADAPTER)
    return folder


def opened(run: Path, dtype: str) -> tuple[LoadedModel, dict[str, Path]]:
    return molora.load(run, dtype=dtype, device="cpu"), locate(run).folders


def checked(loaded: LoadedModel, folders: dict[str, Path]) -> list[Finding]:
    return list(promises(loaded, [], folders))


def broken(checks: list[Finding]) -> set[str]:
    return {f"{check.what[0]}: {check.found}" for check in checks if check.ok is False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_holds_in_any_dtype(dtype: str, home: Path) -> None:
    checks = checked(*opened(home / "run", dtype))
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    found = " ".join(check.found for check in checks)
    if dtype == "float32":
        assert "the stock model" not in found and found.count("allowed 1e-05") == 4
    else:
        assert found.count("the stock model: padded from alone by") == found.count("in fp32 (allowed 1e-05)") == 4


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss", "phimoe"])
def test_other_backbones_hold_in_bfloat16(family: str, tmp_path: Path) -> None:
    adapter = {**ADAPTER, "target_modules": ["q_proj", "v_proj"]}
    checks = checked(*opened(run_of(tmp_path, "run", family, adapter), "bfloat16"))
    assert not broken(checks)
    unchecked = [check.found for check in checks if check.ok is None]
    moe = family in ("gpt-oss", "phimoe")
    assert unchecked == (["neighbours of experts move the order of their sums"] if moe else [])


# Packing that is broken on purpose


def positions_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pack, "position_ids_T", property(lambda pack: torch.arange(len(pack.token_ids_T))))


def samples_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        flow = current_flow()
        assert flow is not None
        packed = isinstance(args[0], Tensor) and query.shape[2] == args[0].shape[2]
        one = Flow((sum(flow.lengths),), flow.routing) if packed else flow
        with flowing(one):
            return attention.packed_attention(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, leaking)


def a_neighbours_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Routing.by_sample

    def by_sample(adapters: list[tuple[str, ...]], lengths: tuple[int, ...]) -> Routing:
        return right([*adapters[1:], adapters[0]], lengths)

    monkeypatch.setattr(Routing, "by_sample", by_sample)


def one_tokens_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a slice gets the adapters of the next one."""
    right = Routing.by_sample

    def by_sample(adapters: list[tuple[str, ...]], lengths: tuple[int, ...]) -> Routing:
        slices = list(right(adapters, lengths).slices)
        for index in range(1, len(slices)):
            slices[index - 1] = slices[index - 1]._replace(stop=slices[index].start - 1)
            slices[index] = slices[index]._replace(start=slices[index].start - 1)
        return Routing(tuple(slices))

    monkeypatch.setattr(Routing, "by_sample", by_sample)


def rotary_of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SampleRotary.forward

    def forward(self: SampleRotary, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with flowing(None):
            return right(self, *args, **kwargs)

    monkeypatch.setattr(SampleRotary, "forward", forward)


def neighbours_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step of decoding, every sample reads another one's pages."""
    right = PageTable.__init__

    def of_others(self: PageTable, pages: list[list[int]], *others: Any) -> None:
        right(self, pages[::-1], *others)

    monkeypatch.setattr(PageTable, "__init__", of_others)


def another_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RoutedLinear.adapter_weights

    def scaled(self: RoutedLinear, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = right(self, name, dtype)
        return a, b * 1.01

    monkeypatch.setattr(RoutedLinear, "adapter_weights", scaled)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    positions_go_on: ("3: 0 of", "have their own positions"),
    samples_see_each_other: ("3: ", "samples are equal to the bit when all of their neighbours change"),
    a_neighbours_adapter: ("2: ", "samples without it are equal to the bit"),
    one_tokens_adapter: ("2: ", "samples without it are equal to the bit"),
    rotary_of_the_pack: ("3: ", "samples packed have their own positions"),
    neighbours_in_the_cache: ("5: ", "cached tokens are a full forward's"),
    another_scaling: ("7: ", "PEFT opens the folder, logits differ"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_packing_broken_on_purpose_is_broken(
    fault: Callable[[pytest.MonkeyPatch], None], dtype: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, folders = opened(home / "run", dtype)
    fault(monkeypatch)
    found = broken(checked(loaded, folders))
    assert any(all(word in row for word in FAULTS[fault]) for row in found), found


# Weights that are nudged


def of_backbone(loaded: LoadedModel) -> Tensor:
    return loaded.model.backbone.model.get_submodule("model.norm").weight  # pyright: ignore[reportReturnType]


def of_adapter(loaded: LoadedModel) -> Tensor:
    return next(iter(adapter_parameters(loaded.model.backbone.model, "letters").values()))


def of_projector(loaded: LoadedModel) -> Tensor:
    return next(loaded.model.projectors["numbers"].parameters())


def of_encoder(loaded: LoadedModel) -> Tensor:
    return next(loaded.model.encoders["numbers"].parameters())


NUDGES: dict[Callable[[LoadedModel], Tensor], str] = {
    of_backbone: "1: weights in memory equal those on disk to the bit",
    of_adapter: "others than in letters/adapter_model.safetensors",
    of_projector: "others than in numbers/projector.safetensors",
    of_encoder: "others than in numbers/encoder.safetensors",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", NUDGES, ids=lambda weight: weight.__name__)
def test_one_element_nudged_by_one_ulp_in_memory_is_found(
    weight: Callable[[LoadedModel], Tensor], dtype: str, home: Path
) -> None:
    loaded, folders = opened(home / "run", dtype)
    tensor = weight(loaded).detach().view(-1)
    tensor[0] = torch.nextafter(tensor[0], torch.tensor(torch.inf, dtype=tensor.dtype))
    assert any(NUDGES[weight] in row for row in broken(checked(loaded, folders)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_that_changed_after_it_was_opened_is_found_with_its_hash_rewritten(
    dtype: str, home: Path, tmp_path: Path
) -> None:
    loaded, folders = opened(home / "run", dtype)
    folder = tmp_path / "letters"
    folder.mkdir()
    for file in folders["letters"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: float(tensors[name].abs().max()) if "lora_B" in name else 0.0)
    tensors[name].view(-1)[tensors[name].abs().argmax()] *= 1.5
    save_file(tensors, path)
    changed = {**folders, "letters": folder}
    with pytest.raises(ValueError, match="does not have the hash"):
        checked(loaded, changed)
    about = json.loads((folder / "modality.json").read_text())
    about["files"][path.name] = file_hash(path)
    (folder / "modality.json").write_text(json.dumps(about))
    found = broken(checked(loaded, changed))
    assert any("others than in letters/adapter_model.safetensors" in row for row in found)
    assert any("letters: PEFT opens the folder, logits differ" in row for row in found)


# How far a model moves by itself


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors.items()}
    yield
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors.items()} == before


@pytest.mark.parametrize("family", ["phi4-mini", "llama", "qwen3", "gpt-oss", "granite"])
def test_a_half_precision_model_computes_in_fp32_what_its_fp32_copy_does(family: str, tmp_path: Path) -> None:
    tiny_model(family).bfloat16().save_pretrained(tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    half, copy = (load(tmp_path, dtype=dtype, attn_implementation="eager").eval() for dtype in ("bfloat16", "float32"))
    ids = torch.arange(40)[None]
    with torch.no_grad(), untouched(half):
        before = half(input_ids=ids).logits
        with in_fp32(half):
            exact = half(input_ids=ids).logits
        assert exact.dtype == torch.float32 and torch.equal(exact, copy(input_ids=ids).logits)
        assert torch.equal(half(input_ids=ids).logits, before) and before.dtype == torch.bfloat16


def test_a_failing_forward_leaves_no_layer_in_fp32() -> None:
    model = tiny_model("llama").bfloat16()

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    decoder_layers(model)[1].register_forward_pre_hook(fail)
    with untouched(model), pytest.raises(RuntimeError, match="on purpose"), torch.no_grad(), in_fp32(model):
        model(input_ids=torch.arange(5)[None])


def test_an_fp32_model_moves_less_than_is_allowed_and_a_bfloat16_one_more() -> None:
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = tiny_model("llama").to(dtype=dtype)  # pyright: ignore[reportCallIssue]
        model.set_attn_implementation("sdpa")
        embeds = [model.get_input_embeddings()(torch.arange(count)) for count in (1, 7, 40)]
        moved[dtype] = measure(model, embeds)
    assert moved[torch.float32].shape < 1e-5 and moved[torch.float32].fp32 == 0
    assert 1e-3 < moved[torch.bfloat16].fp32 < 0.1 and moved[torch.bfloat16].most == 2 * moved[torch.bfloat16].fp32


def test_longrope_is_measured_without_changing_its_frequencies() -> None:
    """A row longer than the switch beside a short one would give the short one other frequencies in the stock model."""
    model = tiny_model("phi4-mini").bfloat16()
    backbone_of = Backbone(tiny_model("phi4-mini"), Identity("", "", "", "", ""))
    assert backbone_of.regime(20) != backbone_of.regime(40)
    model.set_attn_implementation("sdpa")
    embeds = [model.get_input_embeddings()(torch.arange(count)) for count in (20, 40)]
    assert measure(model, embeds).shape < 0.05
