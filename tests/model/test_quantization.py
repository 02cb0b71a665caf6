"""A backbone in 4 or 8 bits is transformers' own quantised model, and runs packs, adapters and all promises as any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from molora.checkpoint.assembly import BackboneConfig
from molora.checkpoint.pretrained import load_backbone
from molora.config import ConfigError, build
from molora.config.plain_yaml import parse
from molora.data.processor import Processor
from molora.doctor.dry_run import on_meta
from molora.doctor.needs import weights
from molora.inference.load import LoadedModel, load
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization, plain_tensors, quantizer
from molora.pack import collate
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer, save_backbone
from molora.train.loop import train
from molora.train.optim import PartConfig, set_trainable
from molora.train.recipe import Recipe
from molora.verify.promises import verify

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS: list[Quantization] = ["nf4", "int8"]
EVERYTHING = ("encoders", "projectors", "adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("llama"), "llama")


def quantised(folder: Path, kind: Quantization, dtype: str = "float32") -> LoadedModel:
    """The backbone with two modalities whose adapters are not zero."""
    backbone, tokenizer = load_backbone(str(folder), dtype=dtype, quantization=kind)
    modalities: Any = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": "all-linear"}
    adapters = {name: lora_config(options, name) for name in modalities}
    model = MoLoRA(backbone, modalities, adapters, TableRouter(list(adapters), TableConfig()))
    return LoadedModel(model, Processor(tokenizer, modalities, model.router.order, backbone.max_tokens))


def stock(folder: Path, kind: Quantization, dtype: torch.dtype) -> Any:
    """What transformers itself makes of the folder, without the layout that bitsandbytes has for some CPUs alone."""
    config: Any = quantizer(kind)
    if kind == "nf4":
        config.bnb_4bit_compute_dtype = dtype
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


def ask(*content: Any, answer: str = "") -> list[dict[str, Any]]:
    kinds = {list: "numbers", str: "text", bytes: "letters"}
    parts = [{"type": kinds[type(c)], kinds[type(c)]: c.decode() if isinstance(c, bytes) else c} for c in content]
    return [{"role": "user", "content": parts}, *([{"role": "assistant", "content": answer}] if answer else [])]


NUMBERS = [ask("what is it?"), ask([0.5, 1.0], "and this?"), ask([2.0] * 9, "yyy")]
MIX = [ask("what is it?"), ask([0.5, 1.0], "and this?"), ask(b"abc", "x"), ask("a"), ask([2.0] * 9, "yyy")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_alone_is_the_quantised_model_of_transformers_to_the_bit(
    folder: Path, kind: Quantization, dtype: torch.dtype
) -> None:
    loaded, theirs = quantised(folder, kind, str(dtype)), stock(folder, kind, dtype)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for text in ("a", "what is it?", "x" * 90):
        pack = collate([loaded.encode(ask(text))], loaded.model.modalities, loaded.model.router.order)
        logits = loaded.model.logits(pack)
        assert torch.equal(logits, theirs(input_ids=pack.token_ids_T[None]).logits[0])
        assert not torch.allclose(logits, bare(input_ids=pack.token_ids_T[None]).logits[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_is_alone(folder: Path, kind: Quantization) -> None:
    loaded = quantised(folder, kind)
    samples = [loaded.encode(messages, str(index)) for index, messages in enumerate(MIX)]
    together = collate(samples, loaded.model.modalities, loaded.model.router.order)
    packed = together.by_sample(loaded.model.logits(together))
    for sample in samples:
        alone = loaded.model.logits(collate([sample], loaded.model.modalities))
        torch.testing.assert_close(packed[sample.id], alone, rtol=0, atol=1e-5 * max(1.0, float(alone.abs().max())))


def dequantised(folder: Path, kind: Quantization, target: Path) -> Path:
    """A plain backbone whose weights are what the quantised ones stand for."""
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    plain, theirs = AutoModelForCausalLM.from_pretrained(folder), stock(folder, kind, torch.float32)
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.Linear) and (state := getattr(layer.weight, "quant_state", None)) is not None:
            plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, state)
        elif isinstance(layer, nn.Linear) and hasattr(layer.weight, "qdata"):
            plain.get_submodule(name).weight.data = layer.weight.dequantize()  # pyright: ignore[reportCallIssue]
    plain.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def learn_everything(model: MoLoRA) -> None:
    set_trainable(model, {name: PartConfig(learning_rate=1e-3) for name in EVERYTHING}, 1, "train")


def gradients(loaded: LoadedModel, *, checkpointing: bool) -> dict[str, Tensor]:
    model = loaded.model
    model.backbone.activation_checkpointing = checkpointing
    samples = [
        loaded.processor.encode([*m, {"role": "assistant", "content": "yes"}], str(i)) for i, m in enumerate(MIX)
    ]
    pack = collate(samples, model.modalities, model.router.order)
    learn_everything(model)
    model.zero_grad()
    logits = model.logits(pack)
    (logits.float().square().sum() / 1000).backward()
    return {
        f"{part}.{key}": each.grad.clone()
        for part, parameters in model.parts().items()
        for key, each in parameters.items()
        if each.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_layers_with_the_same_weights(
    folder: Path, kind: Quantization, checkpointing: bool, tmp_path: Path
) -> None:
    loaded = quantised(folder, kind)
    before = [part.clone() for tensor in loaded.model.backbone.parameters() for part in plain_tensors(tensor.detach())]
    oracle = quantised(dequantised(folder, kind, tmp_path), "none")
    ours, theirs = gradients(loaded, checkpointing=checkpointing), gradients(oracle, checkpointing=False)
    assert ours.keys() == theirs.keys() and any(key.startswith("encoders") for key in ours)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max())))
    after = [part for tensor in loaded.model.backbone.parameters() for part in plain_tensors(tensor.detach())]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_float_weight_is_kept_for_the_backward_pass(folder: Path, kind: Quantization) -> None:
    loaded = quantised(folder, kind)
    learn_everything(loaded.model)
    linear = [layer for layer in loaded.model.backbone.model.modules() if isinstance(layer, nn.Linear)]
    shapes = {(layer.out_features, layer.in_features) for layer in linear if layer.in_features > 4 < layer.out_features}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    pack = collate([loaded.encode(MIX[1])], loaded.model.modalities, loaded.model.router.order)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TD = loaded.model(pack)
    assert hidden_TD.requires_grad and kept and not any(len(pack.token_ids_T) in shape for shape in shapes)
    learned = {parameter.data_ptr() for parameter in loaded.model.parameters() if parameter.requires_grad}
    matrices = [tensor for tensor in kept if tensor.ndim == 2 and tensor.data_ptr() not in learned]
    assert not {shape for tensor in matrices for shape in (tuple(tensor.shape), tuple(tensor.T.shape))} & shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_as_foretold(folder: Path, kind: Quantization, dtype: str) -> None:
    foretold = next(
        need for need in weights(on_meta(folder, dtype=dtype, quantization=kind)) if need.what == "backbone"
    )
    backbone, _ = load_backbone(str(folder), dtype=dtype, quantization=kind)
    stored = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in (*backbone.parameters(), *backbone.buffers())
        for part in plain_tensors(tensor)
    }
    assert abs(foretold.num_bytes - sum(stored.values())) <= 0.01 * sum(stored.values())


RECIPE = """
backbone: {{path: {home}/backbone, quantization: {kind}}}
modalities:
  numbers: {{plugin: "molora.testing:Numbers", adapter: {{r: 2, lora_alpha: 4, target_modules: [q_proj, down_proj]}}}}
stages:
  - name: tune
    train: {{projectors: {{learning_rate: 1e-3}}, adapters: {{learning_rate: 1e-3}}}}
    data: {{rows: {{kind: messages, options: {{path: {home}/rows.jsonl}}}}}}
    steps: 2
    samples_per_step: 3
device: cpu
"""


@pytest.fixture(scope="module")
def home(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    (home / "backbone").symlink_to(folder)
    rows = [{"id": f"r{i}", "messages": [*m, {"role": "assistant", "content": "yes"}]} for i, m in enumerate(NUMBERS)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def num_parameters(folder: Path) -> int:
    """Those of the backbone as it is stored."""
    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())


def trained(home: Path, kind: Quantization, name: str = "run", **changes: Any) -> Path:
    values: Any = parse(RECIPE.format(home=home, kind=kind))
    return train(build(Recipe, {**values, "run": str(home / f"{name}-{kind}"), **changes}, "recipe"), show=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_run_keeps_the_promises_and_says_what_it_is(
    home: Path, kind: Quantization, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(home, kind)
    about = json.loads((run / "modalities/numbers/modality.json").read_text())["backbone"]
    plain, _ = load_backbone(str(home / "backbone"))
    assert about["quantization"] == kind and about["weights"] == plain.identity.weights
    card = json.loads((run / "card.json").read_text())
    assert card["backbone"]["parameters"] == num_parameters(home / "backbone")
    loaded = load(run)
    assert loaded.model.backbone.identity.quantization == kind
    capsys.readouterr()
    assert verify(loaded, [], loaded.layout.folders), capsys.readouterr().out
    capsys.readouterr()
    for other in ("none", *KINDS):
        load(run, quantization=other)
        shown = " ".join(capsys.readouterr().err.split())
        told = f"modality.json: trained on a backbone with quantization {kind}, and this one has {other}; "
        told += "in a trial the loss of answers was 7 % higher" if (kind, other) == ("nf4", "none") else "answers may"
        assert shown.count("trained on a backbone") == shown.count(told) == (kind != other)


def test_a_run_does_not_go_on_in_another_quantization(home: Path) -> None:
    trained(home, "nf4", "goes-on")
    (home / "goes-on-nf4").rename(home / "goes-on-int8")
    with pytest.raises(ConfigError, match="other settings: backbone.quantization: was 'nf4', is 'int8'. Give"):
        trained(home, "int8", "goes-on", allow_changed_environment=True)


def test_a_command_counts_all_weights_and_does_not_repeat_what_quantisers_say(home: Path) -> None:
    recipe = home / "quiet.yaml"
    recipe.write_text(f"run: {home}/quiet\n" + RECIPE.format(home=home, kind="nf4"))
    done = subprocess.run(
        [sys.executable, "-m", "molora", "train", str(recipe)], capture_output=True, text=True, check=True
    )
    assert "kernels" not in done.stderr and "pytree" not in done.stderr
    told = f"frozen backbone {num_parameters(home / 'backbone'):,} parameters"
    assert told in " ".join(done.stdout.split())


def test_another_quantization_is_refused_by_name(home: Path) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        build(BackboneConfig, {"path": "x", "quantization": "nf5"}, "backbone")
