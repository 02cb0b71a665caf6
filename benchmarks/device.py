"""molora on one accelerator: its promises there, then how fast it trains and decodes at Phi-4-mini's full shape.

    python -m benchmarks.device promises resume training decoding [--device cuda] [--json device.json]

benchmarks/device.sh runs all of it. Weights are random and built on the device, so nothing is fetched. With
`--device cpu --dtype float32 --size tiny` the same code runs in a minute or two.

Letters: T tokens of a sample.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM

import molora
from benchmarks.peers import work
from benchmarks.peers.generation import Ours
from benchmarks.peers.measure import Machine, environment, name_of, seconds_of, synchronize
from benchmarks.peers.models import SIZES, never_stop, save_checkpoint
from benchmarks.peers.training import train_light_parts
from molora.config import build
from molora.data.processor import Processor
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer, save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe
from molora.train.step import train_step
from molora.verify.promises import promises

WARMUPS = 2


@dataclass(frozen=True)
class Shape:
    """A backbone of the Phi-3 class, the rank of its adapters, and how it is used."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    rank: int
    tokens_per_pack: int
    sample_tokens: int
    prompt_tokens: int
    new_tokens: int
    promised: tuple[str, ...]


SHAPES = {
    # Source of the backbone's sizes and of rank 320: microsoft/Phi-4-multimodal-instruct.
    "full": Shape(200_064, 3072, 8192, 32, 24, 8, 320, 4096, 512, 512, 128, ("tiny", "small")),
    "tiny": Shape(512, 64, 96, 2, 4, 2, 4, 512, 128, 96, 8, ("tiny",)),
}
PACKS_PER_STEP = 4
NUM_MEDIA, NUM_TARGETS = 64, 64
RUNNING = (1, 16, 64)


def check_promises(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """What `molora verify` checks, on Phi-4-multimodal of small sizes with its two encoders, in fp32 and in `dtype`."""
    for size in shape.promised:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), SIZES[size])
            for each in dict.fromkeys((torch.float32, dtype)):
                run = Path(folder) / "run"
                loaded = molora.load(run, dtype=name_of(each), device=device)
                folders = {name: run / "modalities" / name for name in loaded.model.modalities}
                for finding in promises(loaded, [], folders):
                    kind = f"{size}, {name_of(each)}"
                    yield {"model": kind, "promise": finding.what, "found": finding.found, "holds": finding.ok}


def check_resume(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """A run of four steps that goes on for four more, against eight without a stop: the same weights to the bit."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        save_backbone(home / "backbone")
        with open(home / "rows.jsonl", "w", encoding="utf-8") as file:
            for index in range(24):
                media = (
                    {"type": "numbers", "numbers": [index / 24, 0.5]}
                    if index % 2
                    else {"type": "letters", "letters": "ab"}
                )
                content = [media, {"type": "text", "text": f"question {index}"}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(index)}]
                file.write(json.dumps({"messages": messages}) + "\n")
        for run, steps in (("straight", 8), ("stopped", 4), ("stopped", 8)):
            train(_recipe(home, run, steps, device), show=False)
        paths = sorted((home / "straight" / "modalities").rglob("*.safetensors"))
        same = []
        for path in paths:
            mine, expected = load_file(home / "stopped" / path.relative_to(home / "straight")), load_file(path)
            same += [torch.equal(mine[name], tensor) for name, tensor in expected.items()]
        found = f"{sum(same)} of {len(same)} tensors of a resumed run equal those of one that did not stop"
        yield {"model": "tiny, float32", "promise": "6 resume", "found": found, "holds": bool(same) and all(same)}


def _recipe(home: Path, run: str, steps: int, device: str) -> Recipe:
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}
    learning = {"learning_rate": 1e-2, "schedule": "constant"}
    values = {
        "run": str(home / run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {
            "numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter},
            "letters": {"plugin": "molora.testing:Letters", "adapter": adapter},
        },
        "stages": [
            {
                "name": "tune",
                "train": dict.fromkeys(("encoders", "projectors", "adapters"), learning),
                "data": {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}},
                "steps": steps,
                "samples_per_step": 6,
            }
        ],
        "device": device,
    }
    return build(Recipe, values, "resume")


class Full:
    """A backbone of a shape with two modalities, whose items are numbers: their encoders cost nothing."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device
        half = int(shape.width // shape.heads * 0.75) // 2
        rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
        config = Phi3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=131_072,
            original_max_position_embeddings=4096,
            rope_parameters=rope | {"short_factor": [1.0] * half, "long_factor": [2.0] * half},
            tie_word_embeddings=True,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        )
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                stock = Phi3ForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        never_stop(stock)
        # What the probe compares was compared by the promises, and its second model would take as much memory again.
        backbone = Backbone(stock, Identity("random", "", "", "", ""), probe={"embed_scale": 1.0})
        modalities = {kind.__name__: kind(kind.__name__, NumbersConfig()) for kind in (Numbers, Letters)}
        lora = {"r": shape.rank, "lora_alpha": 2 * shape.rank, "target_modules": "all-linear"}
        lora["init_lora_weights"] = False
        adapters = {name: lora_config(lora, "benchmark") for name in modalities}
        router = TableRouter(list(adapters), TableConfig())
        self.model = MoLoRA(backbone, modalities, adapters, router)
        self.processor = Processor(byte_tokenizer(), modalities, router.order, backbone.max_tokens)

    def samples(self, count: int, length: int) -> list[Sample]:
        """Samples with the numbers of either modality in turn."""
        draw = torch.Generator().manual_seed(0)
        names, made = list(self.model.modalities), []
        for index in range(count):
            kind = index % len(names)
            modality: Any = self.model.modalities[names[kind]]
            prepared = modality.prepare(torch.randn(NUM_MEDIA, generator=draw).tolist())
            places_T = torch.arange(length)
            ids_T = torch.randint(300, self.shape.vocab_size, (length,), generator=draw)
            marks_T = (places_T < NUM_MEDIA).long() * (1 + kind)
            items = (Item(names[kind], "default", prepared),)
            made.append(Sample(f"sample {index}", ids_T, marks_T, places_T >= length - NUM_TARGETS // 2, items))
        return made


def measure_training(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Steps of packs of mixed samples, with activation checkpointing and then without, which may not fit."""
    full = Full(shape, device, dtype)
    optimizers = train_light_parts(full.model)
    count = PACKS_PER_STEP * shape.tokens_per_pack // shape.sample_tokens
    samples = full.samples(count, shape.sample_tokens)
    machine = Machine(dtype, device)
    tokens = count * shape.sample_tokens
    flop = work.step_flop(full.model, samples)
    full.model.train()

    def step() -> object:
        return train_step(full.model, full.processor, samples, shape.tokens_per_pack, optimizers)

    for checkpointing in (True, False):
        full.model.backbone.activation_checkpointing = checkpointing
        row: dict[str, Any] = {"dtype": name_of(dtype), "activation_checkpointing": checkpointing}
        row |= {"tokens_per_step": tokens, "tokens_per_pack": shape.tokens_per_pack}
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = []
        try:
            for number in range(-WARMUPS, rounds):
                machine.look()
                seconds = seconds_of(step, device)
                taken += [seconds] if number >= 0 else []
        except torch.OutOfMemoryError as error:
            yield row | {"failed": str(error)}
            return
        yield row | {
            "seconds": taken,
            "tokens_per_second": tokens / min(taken),
            # Useful operations only: what checkpointing computes again is not counted.
            "share_of_matrix_product": flop / min(taken) / machine.flop_per_second,
            "matrix_product_flop_per_second": machine.flop_per_second,
            "peak_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated() - machine.held_bytes,
        }


def measure_decoding(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Decoding of 1, 16 and 64 mixed samples, from the moment that each has its first token."""
    full = Full(shape, device, dtype)
    machine = Machine(dtype, device)
    for running in RUNNING:
        samples = full.samples(running, shape.prompt_tokens)
        ours = Ours(full.model, shape.new_tokens)
        whole = []
        for _ in range(1 + rounds):
            machine.look()
            synchronize(device)
            started = time.perf_counter()
            ours.answer(samples)
            synchronize(device)
            whole.append(time.perf_counter() - started)
        decode, whole = ours.decode_seconds[1:], whole[1:]
        steps = shape.new_tokens - 1
        read = work.decode_bytes(full.model, [len(s) for s in samples], [shape.new_tokens] * running)
        used = {name for sample in samples for name in sample.modalities}
        # Adapters lie in fp32 and are read in every step.
        read += steps * 4 * sum(work.adapter_weights(full.model, name) for name in used)
        yield {
            "dtype": name_of(dtype),
            "running": running,
            "prompt_tokens": shape.prompt_tokens,
            "new_tokens": shape.new_tokens,
            "seconds": decode,
            "seconds_with_prompts": whole,
            "tokens_per_second": running * steps / min(decode),
            "milliseconds_per_step": 1000 * min(decode) / steps,
            "share_of_copy": read / min(decode) / machine.bytes_per_second,
            "copy_bytes_per_second": machine.bytes_per_second,
        }


PARTS: dict[str, Callable[[Shape, str, torch.dtype, int], Iterator[dict[str, Any]]]] = {
    "promises": check_promises,
    "resume": check_resume,
    "training": measure_training,
    "decoding": measure_decoding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--size", choices=list(SHAPES), default="full", help="tiny tries the code, not the speed")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--json", type=Path, help="file of results, written after every row")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    broken = 0
    for part in given.part:
        rows = []
        for row in PARTS[part](SHAPES[given.size], given.device, getattr(torch, given.dtype), given.rounds):
            print(f"{part}: {json.dumps(row)}", flush=True)
            broken += row.get("holds") is False
            rows.append(row)
            if given.json:
                write_part(given.json, part, rows, environment(given.device))
    if broken:
        raise SystemExit(f'{broken} promises are broken on {given.device}; see the rows with "holds": false')


def write_part(path: Path, part: str, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Puts the rows of a part so far into a file that other parts share."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**kept, "environment": about, part: rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
