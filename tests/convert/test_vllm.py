"""Folders for vLLM: what transformers and PEFT read of them, and what vLLM itself says where a Python has it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, Phi3Config, Phi4MultimodalProcessor
from typer.testing import CliRunner

import molora
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.checkpoint.run_folder import write_run
from molora.cli.commands import app
from molora.config import ConfigError
from molora.convert import vllm
from molora.convert.release import export_release, import_release
from molora.convert.vllm import export_vllm
from molora.testing import save_backbone
from tests.convert.reference_release import save_native

# A Python that has vLLM, whose other libraries have versions of their own.
VLLM_PYTHON = os.environ.get("MOLORA_VLLM_PYTHON", sys.executable)
ADAPTER = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["qkv_proj", "down_proj"]}
PICTURE = Image.new("RGB", (640, 480))
SOUND = np.zeros(24_000, np.float32)
PARTS = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What is it?"}]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Phi-4-multimodal."""
    home = tmp_path_factory.mktemp("released")
    save_native(home / "checkpoint")
    import_release(home / "checkpoint", home / "run")
    return home / "run"


@pytest.fixture(scope="module")
def exported(released: Path) -> Path:
    export_vllm(released, released.parent / "out")
    return released.parent / "out"


def save_run(folder: Path, adapter: dict[str, Any], plugin: str = "text", options: Any = None) -> Path:
    """A run with one adapter on a tiny backbone."""
    backbone, tokenizer = load_backbone(str(save_backbone(folder / "tiny")))
    plan = blueprint("own", plugin, options or {}, adapter, "here")
    router = RouterConfig(options={"rules": {"text": "own"} if plugin == "text" else {}})
    model, _ = assemble(backbone, tokenizer, {"own": plan}, router)
    save_modality(model, "own", plan, folder / "run" / "modalities" / "own", {})
    write_run(folder / "run", backbone.identity, ["own"], router)
    return folder / "run"


def test_weights_have_the_names_and_bytes_of_the_release_without_adapters(
    released: Path, exported: Path, tmp_path: Path
) -> None:
    export_release(released, tmp_path / "hub", "hub")
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    found = load_file(exported / "model.safetensors")
    assert found.keys() == {name for name in expected if "lora" not in name} < expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for ours, theirs in (("vision", "vision-lora"), ("audio", "speech-lora")):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            source = released / "modalities" / ours / file
            assert (exported / theirs / file).read_bytes() == source.read_bytes()


def test_transformers_reads_the_config_without_code(exported: Path) -> None:
    config: Any = AutoConfig.from_pretrained(exported)
    assert isinstance(config, Phi3Config) and config.architectures == ["Phi4MMForCausalLM"]
    assert config.embd_layer["audio_embd_layer"]["compression_rate"] == 8 and config.img_processor is None
    assert config.audio_processor["config"]["num_blocks"] == 2


def test_the_processor_says_what_transformers_own_says_under_vllms_names(released: Path, exported: Path) -> None:
    ours: Any = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    theirs: Any = Phi4MultimodalProcessor.from_pretrained(released.parent / "checkpoint")
    clips = [SOUND, np.sin(np.arange(9_000, dtype=np.float32))]
    found = ours("<|image_1|><|audio_1|>", images=[PICTURE], audios=[(clip, 16_000) for clip in clips])
    pictures = theirs.image_processor([PICTURE], return_tensors="pt")
    assert torch.equal(found["input_image_embeds"], pictures["image_pixel_values"])
    assert torch.equal(found["image_attention_mask"], pictures["image_attention_mask"])
    assert torch.equal(found["image_sizes"], pictures["image_sizes"])
    for index, clip in enumerate(clips):
        alone = theirs.audio_processor(clip, sampling_rate=16_000, return_tensors="pt")["audio_input_features"][0]
        assert torch.equal(found["input_audio_embeds"][index, : len(alone)], alone)
    assert ours("a", audios=[(SOUND, 16_000)])["image_sizes"].shape == (0, 2)


def asked_here(released: Path) -> list[int]:
    """The tokens of the question of `PARTS`, as molora has them, with the ids that vLLM gives to media."""
    media = [{"type": "image", "image": PICTURE}, {"type": "audio", "array": SOUND, "sampling_rate": 16_000}]
    loaded = molora.load(released, device="cpu")
    sample = loaded.encode([{"role": "user", "content": [*media, PARTS[2]]}])
    ids_T = sample.token_ids_T.clone()
    for index, item in enumerate(sample.items, 1):
        ids_T[sample.modality_ids_T == index] = {"vision": 200010, "audio": 200011}[item.modality]
    return ids_T.tolist()


def test_the_chat_template_puts_media_where_they_are_sent(released: Path, exported: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    asked = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A cat."}]
    asked.append({"role": "user", "content": [PARTS[2], PARTS[0]]})
    text = processor.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    own: Any = molora.load(released, device="cpu").processor.tokenizer
    same = [("user", "<|image_1|><|audio_1|>What is it?"), ("assistant", "A cat."), ("user", "What is it?<|image_2|>")]
    messages = [{"role": role, "content": content} for role, content in same]
    assert text == own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_no_adapter_has_the_name_that_the_bare_backbone_is_served_by() -> None:
    for adapter, bare in (("text", "backbone"), ("backbone", "bare-backbone")):
        command = vllm._command(Path("run"), {adapter: Path("run") / adapter}, 8, has_code=False)
        assert f"--served-model-name {bare} " in command and f"{adapter}=run/{adapter}" in command


def test_a_run_of_adapters_for_text_is_its_backbone_and_peft_folders(tmp_path: Path) -> None:
    run = save_run(tmp_path, {**ADAPTER, "rank_pattern": {"down_proj": 9}})
    done = CliRunner().invoke(app, ["convert", "vllm", str(run), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    words = shlex.split(done.stdout.strip().splitlines()[-1])
    assert words[:3] == ["vllm", "serve", str(tmp_path / "out")] and "--trust-remote-code" not in words
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[-1] == f"own={tmp_path / 'out' / 'own'}"
    for path in (tmp_path / "tiny").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    peft: Any = PeftModel.from_pretrained(stock, tmp_path / "out" / "own").eval()
    loaded = molora.load(run, device="cpu")
    answer = loaded.generate([{"role": "user", "content": "a"}], molora.GenerationConfig(max_new_tokens=8))
    ids_T = loaded.encode([{"role": "user", "content": "a"}]).token_ids_T
    stops = sorted(loaded.model.backbone.stop_ids)
    said = peft.generate(input_ids=ids_T[None], max_new_tokens=8, do_sample=False, eos_token_id=stops, pad_token_id=0)
    assert loaded.processor.decode([id for id in said[0, len(ids_T) :].tolist() if id not in stops]).strip() == answer


def changed(run: Path, folder: Path, router: dict[str, Any]) -> Path:
    shutil.copytree(run, folder, symlinks=True)
    about = json.loads((folder / "molora.json").read_text())
    (folder / "molora.json").write_text(json.dumps({**about, "router": router}))
    return folder


def test_what_vllm_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    run = save_run(tmp_path / "a", ADAPTER)
    out = tmp_path / "out"
    for router in ("sum", "learned"):
        with pytest.raises(ConfigError, match=f"the router is '{router}'"):
            export_vllm(changed(run, run.parent / router, {"plugin": router}), out)
    with pytest.raises(ConfigError, match="own.*rank 600, and vLLM takes at most 512"):
        export_vllm(save_run(tmp_path / "b", {**ADAPTER, "r": 600}), out)
    with pytest.raises(ConfigError, match=re.escape("has the modalities own (molora.testing:Numbers)")):
        import_numbers = save_run(tmp_path / "c", ADAPTER, "molora.testing:Numbers")
        molora.load(import_numbers, trust=["molora.testing:Numbers"], device="cpu")
        export_vllm(import_numbers, out)
    variant = run / "modalities" / "own"
    config = json.loads((variant / "adapter_config.json").read_text())
    (variant / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    about = json.loads((variant / "modality.json").read_text())
    about["files"]["adapter_config.json"] = hashlib.sha256((variant / "adapter_config.json").read_bytes()).hexdigest()
    (variant / "modality.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="adapter_config.json.use_dora: this LoRA variant has no routed form"):
        export_vllm(run, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    whole = save_run(tmp_path / "d", ADAPTER)
    for folder, says in {
        out: "is there already",
        out / "mine.txt": "is a file",
        whole / "in" / "it": "lies in",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"{folder}: {says}")):
            export_vllm(whole, folder)
    assert not (whole / "in").exists()


def checks(*arguments: str) -> str:
    """What vLLM says; skips where there is none."""
    found = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"
    if subprocess.run([VLLM_PYTHON, "-c", found], capture_output=True, text=True, check=False).stdout.strip() != "True":
        pytest.skip("no vLLM: pip install 'vllm==0.33.*' elsewhere, and MOLORA_VLLM_PYTHON=that/bin/python")
    script = str(Path(__file__).with_name("vllm_checks.py"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [VLLM_PYTHON, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vllm_takes_phi4_multimodal(released: Path, exported: Path) -> None:
    told = checks("phi4mm", str(exported), "8", "vision-lora", "speech-lora")
    assert "initialize_model Phi4MMForCausalLM" in told
    assert len(re.findall(r"LoRAModel.from_local_checkpoint \S+: 8 layers", told)) == 2
    made = re.search(r"Phi4MMMultiModalProcessor (\[.*\])", told)
    assert made and json.loads(made[1]) == asked_here(released)


def test_vllm_takes_adapters_for_text(tmp_path: Path) -> None:
    run = save_run(tmp_path, {**ADAPTER, "rank_pattern": {"down_proj": 9}})
    export_vllm(run, tmp_path / "out")
    told = checks("text", str(tmp_path / "out"), "16", "own")
    assert "PEFTHelper.validate_legal own" in told and "LoRAModel.from_local_checkpoint own" in told
