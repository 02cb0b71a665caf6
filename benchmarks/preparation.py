"""Preparation of pictures and clips beside transformers' processors, and the loader beside the training step.

    python benchmarks/preparation.py [pictures clips loader] [--threads 1 2] [--rounds 9] [--json FILE]

Numbers are compared before anything is timed, and both sides run in turns in one process. A ratio is the peer's time
over ours, round by round.

- pictures: Phi4MultimodalImageProcessor. It gives what a tower takes; in molora a data worker makes crops of bytes, and
  the encoder normalises them and draws the global view on its device. `crops` is the worker's part, `inputs` is all of
  it. The peer resizes in another arithmetic, which differs by up to 2 of 255 from the released processor's and ours.
- clips: Phi4MultimodalFeatureExtractor on 32 clips of 3 to 30 seconds, all at once (the peer pads them) and one by one.
- loader: tokens a second that one worker gives, beside those of a training step on the same samples: 2 pictures of 448
  pixels, 3 clips of 5 seconds and 3 texts a step, from files. 125 M backbone, 6 blocks in each tower, fp32.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi4MultimodalFeatureExtractor
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import Phi4MultimodalImageProcessor

from molora.data.loader import step_loader
from molora.data.processor import Processor
from molora.data.sources import EncodedSamples, SourceConfig
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.audio import TowerConfig as AudioTowerConfig
from molora.encoders.audio_towers.conformer import ConformerConfig
from molora.encoders.logmel import log_mel, num_frames
from molora.encoders.vision import Vision, VisionConfig, VisionEncoder
from molora.encoders.vision_towers.tower import TowerConfig
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import byte_tokenizer
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

SIZES = ((448, 448), (640, 480), (1344, 1344), (1920, 1080))
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
SAMPLES_PER_STEP, TOKENS_PER_PACK = 8, 8192
# What a worker is timed over; the first steps wait for it to start.
STEPS_A_ROUND, FIRST_STEPS = 24, 4


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, which JPEG and PNG shrink as they do photographs."""
    shape = (height // 8 + 1, width // 8 + 1, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds))).astype(np.float32)


def in_turns(rounds: int, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each round after one that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(-1, rounds):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            if number >= 0:
                times[side].append(1000 * (time.perf_counter() - started))
    return times


def header(what: str, threads: int) -> None:
    print(f"\n{f'{what}, {threads} threads':<30}{'ours, ms':>14}{'peer, ms':>17}{'ratio':>7}  of rounds")
    print(f"{'':<30}{'best':>7}{'median':>7}{'best':>9}{'median':>8}")


def row(name: str, threads: int, ours: list[float], peer: list[float]) -> dict[str, Any]:
    """Prints a comparison, best and median of each side, and returns it."""
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    ratio = statistics.median(ratios)
    sides = f"{min(ours):>7.1f}{statistics.median(ours):>7.1f}{min(peer):>9.1f}{statistics.median(peer):>8.1f}"
    print(f"{name:<30}{sides}{ratio:>7.2f}  {min(ratios):.1f} to {max(ratios):.1f}", flush=True)
    return {"name": name, "threads": threads, "ours_ms": ours, "peer_ms": peer, "ratio": ratio}


def pictures(threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    modality = Vision("vision", VisionConfig(tower=TowerConfig(kind="transformers", pretrained=False, arguments=TOWER)))
    encoder, processor = modality.build_encoder(), Phi4MultimodalImageProcessor()
    for width, height in SIZES:
        image = picture(width, height)
        files = {kind: io.BytesIO() for kind in ("JPEG", "PNG")}
        for kind, file in files.items():
            image.save(file, kind, quality=90)
        given: dict[str, Any] = {"decoded": image, **{kind: file.getvalue() for kind, file in files.items()}}
        for value in given.values():
            check_picture(modality, encoder, processor, value)
        for count in threads:
            torch.set_num_threads(count)
            header(f"picture of {width}x{height}", count)
            for kind, value in given.items():
                times = in_turns(
                    rounds,
                    {
                        "crops": lambda value=value: crops_of(modality, value),
                        "inputs": lambda value=value: inputs_of(encoder, crops_of(modality, value)),
                        "peer": lambda value=value: processor(opened(value), return_tensors="pt"),
                    },
                )
                for part in ("crops", "inputs"):
                    found = row(f"  {kind}, {part}", count, times[part], times["peer"])
                    yield {**found, "name": f"{width}x{height}, {kind}, {part}"}


def opened(value: Image.Image | bytes) -> Image.Image:
    return Image.open(io.BytesIO(value)).convert("RGB") if isinstance(value, bytes) else value


def crops_of(modality: Vision, value: Image.Image | bytes) -> dict[str, Tensor]:
    return modality.prepare(modality.load({"image": value})).tensors


def inputs_of(encoder: VisionEncoder, prepared: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    inputs_BCHW, _, view_ids = encoder.inputs(prepared["crops_BCHW"], [tuple(prepared["layout_4"].tolist())])
    return inputs_BCHW, view_ids


def check_picture(modality: Vision, encoder: VisionEncoder, processor: Any, value: Image.Image | bytes) -> None:
    theirs = processor(opened(value), return_tensors="pt")
    prepared = modality.prepare(modality.load({"image": value}))
    inputs_BCHW, view_ids = inputs_of(encoder, prepared.tensors)
    ours_BCHW = torch.cat([inputs_BCHW[view_ids], inputs_BCHW[: len(prepared.tensors["crops_BCHW"])]])
    difference = (ours_BCHW - theirs["image_pixel_values"][0]).abs()
    # Bicubic weights enlarge a difference of 2 of 255 a little.
    assert float(difference.max()) < 0.03 and float(difference.mean()) < 2e-3, difference.max()
    assert prepared.num_tokens == int(theirs["num_img_tokens"][0]), prepared.num_tokens


def clips(threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    waves = [noise(seconds, seed) for seed, seconds in enumerate(np.linspace(3, 30, 32))]
    tensors = [torch.from_numpy(wave) for wave in waves]
    extractor = Phi4MultimodalFeatureExtractor()

    def theirs(clips: list[np.ndarray]) -> Tensor:
        return extractor(clips, sampling_rate=16_000, return_tensors="pt")["audio_input_features"]

    packed = log_mel(tensors).split([num_frames(len(wave)) for wave in waves])
    for mine_SM, other_SM in zip(packed, theirs(waves), strict=True):
        # Of the highest bin the peer's triangle is a little wider than the released processor's.
        difference = (mine_SM - other_SM[: len(mine_SM)])[:, :79].abs()
        assert float(difference.max()) < 5e-3 and float(difference.mean()) < 5e-5, difference.max()
    for count in threads:
        torch.set_num_threads(count)
        header("32 clips", count)
        times = in_turns(rounds, {"ours": lambda: log_mel(tensors), "peer": lambda: theirs(waves)})
        yield row("  clips at once", count, times["ours"], times["peer"])
        sides: dict[str, Callable[[], object]] = {
            "ours": lambda: [log_mel([wave]) for wave in tensors],
            "peer": lambda: [theirs([wave]) for wave in waves],
        }
        times = in_turns(rounds, sides)
        yield row("  clips one by one", count, times["ours"], times["peer"])


def write_rows(folder: Path) -> None:
    """Files of eight steps and the conversations about them."""
    draw, rows = np.random.default_rng(0), []
    words = ["a", "bridge", "over", "the", "green", "river", "seven", "small", "houses", "who", "speaks", "here"]
    for index in range(8 * SAMPLES_PER_STEP):
        content: list[dict[str, str]] = [{"type": "text", "text": " ".join(draw.choice(words, 6))}]
        if index % SAMPLES_PER_STEP < 2:
            picture(448, 448, seed=index).save(folder / f"{index}.jpg", quality=90)
            content.insert(0, {"type": "image", "path": f"{index}.jpg"})
        elif index % SAMPLES_PER_STEP < 5:
            soundfile.write(folder / f"{index}.wav", noise(5.04, seed=index), 16_000)
            content.insert(0, {"type": "audio", "path": f"{index}.wav"})
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes, seven"}]
        rows.append(json.dumps({"id": str(index), "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")


def make_model() -> MoLoRA:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    config = LlamaConfig(**sizes, vocab_size=32_000, num_key_value_heads=4, tie_word_embeddings=False)
    backbone: Any = LlamaForCausalLM(config)
    conformer = ConformerConfig(width=256, blocks=6, heads=4, mlp_width=1024, subsampling_channels=256)
    modalities = {
        "vision": Vision(
            "vision", VisionConfig(tower=TowerConfig(kind="transformers", pretrained=False, arguments=TOWER))
        ),
        "audio": Audio("audio", AudioConfig(tower=AudioTowerConfig(conformer=conformer))),
    }
    router = TableRouter(list(modalities), TableConfig())
    adapters = {name: lora_config(LORA, "adapter") for name in modalities}
    packed = Backbone(backbone, Identity("random", "", "", "", ""))
    return MoLoRA(packed, modalities, adapters, router)


def loader(threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    count = max(threads)  # of the step; a data worker has one
    torch.set_num_threads(count)
    model = make_model()
    processor = Processor(byte_tokenizer(), model.modalities, model.router.order, TOKENS_PER_PACK)
    parts = {part: PartConfig(learning_rate=1e-5) for part in ("adapters", "projectors")}
    optimizers = set_trainable(model, parts, total_steps=1000, where="benchmark")
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        source = SourceConfig(kind="messages", options={"path": f"{folder}/rows.jsonl"})
        dataset = EncodedSamples(
            {"rows": source}, processor, seed=0, max_tokens=TOKENS_PER_PACK, skips=(), where="benchmark"
        )
        samples = check_loader(dataset, next(samples_by_step(dataset)))
        num_tokens = sum(map(len, samples))
        rates: dict[str, list[float]] = {"step": [], "worker": []}
        for number in range(-1, rounds):
            started = time.perf_counter()
            train_step(model, processor, samples, TOKENS_PER_PACK, optimizers)
            seconds = time.perf_counter() - started
            if number >= 0:
                rates["step"].append(num_tokens / seconds)
                rates["worker"].append(worker_rate(dataset))
    ratios = [worker / step for worker, step in zip(rates["worker"], rates["step"], strict=True)]
    ratio = statistics.median(ratios)
    shown = [f"{max(rates[side]):>9,.0f}{statistics.median(rates[side]):>9,.0f}" for side in ("step", "worker")]
    print(f"\n{'tokens a second':<26}{f'step, {count} threads':>18}{'one worker':>20}{'ratio':>6}  of rounds")
    print(f"{'':<26}{'best':>9}{'median':>9}{'best':>11}{'median':>9}")
    spread = f"{min(ratios):.0f} to {max(ratios):.0f}"
    print(f"{f'  {num_tokens:,} tokens a step':<26}{shown[0]}  {shown[1]}{ratio:>6.0f}  {spread}", flush=True)
    yield {"name": "loader", "threads": count, "tokens_per_second": rates, "ratio": ratio}


def samples_by_step(dataset: EncodedSamples) -> Iterator[list[Any]]:
    steps = FIRST_STEPS + STEPS_A_ROUND
    return step_loader(
        dataset, first_step=0, steps=steps, samples_per_step=SAMPLES_PER_STEP, rank=0, ranks=1, workers=1
    )


def check_loader(dataset: EncodedSamples, step: list[Any]) -> list[Sample]:
    """The samples of a step; a worker's have the bits of those encoded here."""
    for k, sample in enumerate(step):
        here: Any = dataset[k]
        assert sample.id == here.id and torch.equal(sample.token_ids_T, here.token_ids_T)
        for mine, other in zip(sample.items, here.items, strict=True):
            for name, tensor in mine.prepared.tensors.items():
                assert torch.equal(tensor, other.prepared.tensors[name])
    return step


def worker_rate(dataset: EncodedSamples) -> float:
    """Tokens a second of one worker that nobody waits for."""
    steps = samples_by_step(dataset)
    for _ in range(FIRST_STEPS):
        next(steps)
    started = time.perf_counter()
    num_tokens = sum(len(sample) for step in steps for sample in step)
    return num_tokens / (time.perf_counter() - started)


PARTS = {"pictures": pictures, "clips": clips, "loader": loader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to compare (default all)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--json", type=Path, help="file for the figures of every round")
    arguments = parser.parse_args()
    rows = [row for part in arguments.parts or PARTS for row in PARTS[part](arguments.threads, arguments.rounds)]
    if arguments.json:
        about = {"torch": torch.__version__, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps({"format_version": 1, **about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
