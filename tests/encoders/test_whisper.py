"""Pretrained ears: frames against the full models of transformers, windows, batches, loading and saving."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molora.encoders.audio_towers.pretrained import PretrainedConfig, PretrainedEncoder, PretrainedFeatures
from molora.modality import Frames, Origin, Prepared

ARCHITECTURES = ("whisper", "wav2vec2_bert", "parakeet")
BINS = 16
DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.4)
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
# Nothing is as it is by default, so that what is not carried over shows.
WHISPER: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": BINS,
    "activation_function": "relu",
}  # fmt: skip
WAV2VEC2_BERT: dict[str, Any] = {
    **BLOCKS, "feature_projection_input_dim": 2 * BINS, "conv_depthwise_kernel_size": 5, "layer_norm_eps": 1e-3,
    "hidden_act": "gelu", "left_max_position_embeddings": 5, "right_max_position_embeddings": 3,
    "rotary_embedding_base": 50,
}  # fmt: skip
PARAKEET: dict[str, Any] = {
    **BLOCKS, "num_mel_bins": BINS, "subsampling_conv_channels": 8, "conv_kernel_size": 5, "hidden_act": "gelu",
    "attention_bias": False, "convolution_bias": False, "scale_input": False,
}  # fmt: skip


def whisper(max_source_positions: int = 100, kind: str = "WhisperForConditionalGeneration") -> Any:
    config = transformers.WhisperConfig(
        **WHISPER, **DROPOUT, max_source_positions=max_source_positions, encoder_layerdrop=0.4, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, begin_suppress_tokens=[3],
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def wav2vec2_bert(kind: str = "Wav2Vec2BertForCTC", **options: Any) -> Any:
    dropout = dict.fromkeys(("hidden_dropout", "feat_proj_dropout", "conformer_conv_dropout", "layerdrop"), 0.4)
    masks = {"mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.5, "mask_feature_length": 2}
    dropout |= {"attention_dropout": 0.4, "activation_dropout": 0.4}
    sizes = {**WAV2VEC2_BERT, **dropout, **masks, "vocab_size": 32, **options}
    return getattr(transformers, kind)(transformers.Wav2Vec2BertConfig(**sizes))


def parakeet(kind: str = "ParakeetForCTC") -> Any:
    sizes = {**PARAKEET, **DROPOUT, "layerdrop": 0.4, "dropout_positions": 0.4}
    if kind == "ParakeetEncoder":
        return transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**sizes))
    if kind == "ParakeetForCTC":
        config: Any = transformers.ParakeetCTCConfig(encoder_config=sizes, vocab_size=32, pad_token_id=31)
    else:
        options: dict[str, Any] = {"vocab_size": 32, "blank_token_id": 31, "decoder_hidden_size": 8}
        config = transformers.ParakeetTDTConfig(encoder_config=sizes, **options)
    return getattr(transformers, kind)(config)


def randomise(model: nn.Module) -> Any:
    """Weights, and statistics of BatchNorm, large enough that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "subsampling" in name and weight.ndim > 1:  # ReLUs of a few channels, which must not die out
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
            elif "embed_positions" not in name:
                weight.add_(0.15 * noise)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


EXTRACTORS: dict[str, Callable[[], Any]] = {
    "whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=BINS, chunk_length=2, n_fft=512),
    "wav2vec2_bert": lambda: transformers.SeamlessM4TFeatureExtractor(num_mel_bins=BINS, padding_value=1),
    "parakeet": lambda: transformers.ParakeetFeatureExtractor(
        feature_size=BINS, n_fft=400, win_length=320, preemphasis=0.5
    ),
}
WINDOW_SECONDS = {"whisper": 2, "wav2vec2_bert": 20, "parakeet": 40}


@dataclass
class Checkpoint:
    """A full model in a folder, and what it hears itself."""

    architecture: str
    folder: Path
    model: Any
    extractor: Any

    @property
    def encoder(self) -> Any:
        inner = {"whisper": "model.encoder", "wav2vec2_bert": "wav2vec2_bert", "parakeet": "encoder"}
        return self.model.get_submodule(inner[self.architecture])

    def config(self, **options: Any) -> PretrainedConfig:
        return PretrainedConfig(architecture=self.architecture, path=str(self.folder), **options)

    def ear(self, **options: Any) -> PretrainedFeatures:
        return PretrainedFeatures(self.config(**options))

    @torch.no_grad()
    def hear(self, wave_L: Tensor) -> Tensor:
        """The frames of a clip of one window, as the full model makes them from its extractor's output and mask."""
        inputs = self.extractor(wave_L.numpy(), sampling_rate=16000, return_tensors="pt")
        heard = self.encoder(**inputs)
        if self.architecture == "whisper":
            num_frames = -(-len(wave_L) // 320)
        else:
            mask = inputs.attention_mask if self.architecture == "wav2vec2_bert" else heard.attention_mask
            num_frames = int(mask.sum())
        return heard.last_hidden_state[0, :num_frames]


def save(folder: Path, architecture: str, model: Any) -> Checkpoint:
    extractor = EXTRACTORS[architecture]()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Checkpoint(architecture, folder, model, extractor)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("ears")
    models = {"whisper": whisper(), "wav2vec2_bert": wav2vec2_bert(), "parakeet": parakeet()}
    return {name: save(root / name, name, randomise(model)) for name, model in models.items()}


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


def clip(num_samples: int) -> Tensor:
    """Noise whose loudness and colour change, so that no two stretches of it are alike."""
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    time = torch.arange(num_samples) / 16000
    return (noise * (0.1 + 0.05 * torch.sin(3 * time)) + 0.3 * torch.sin(2000 * time + 40 * torch.sin(7 * time))) / 2


def same(features_SM: Tensor) -> Tensor:
    return features_SM


def prepare(ear: PretrainedFeatures, *lengths: int) -> list[Prepared]:
    return [ear.prepare(clip(length), same) for length in lengths]


def run(ear: PretrainedFeatures, encoder: PretrainedEncoder, *lengths: int) -> Frames:
    with torch.no_grad():
        return encoder(**ear.collate(prepare(ear, *lengths)))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert len(theirs) < 2 or theirs.std(0).mean() > 0.05  # frames tell stretches of a clip apart
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_frames_are_those_of_the_full_model(checkpoint):
    ear = checkpoint.ear()
    encoder = ear.build_encoder()
    assert encoder.width == 16 and encoder.origin is None
    for length in (720, 1601, 9999, 16000, 17777, 31999, 32000):
        close(run(ear, encoder, length).frames_SC, checkpoint.hear(clip(length)))


def test_whisper_at_its_real_sizes(tmp_path):
    """Windows of 30 s and 1500 frames, with the file that older repositories have: mel filters and all."""
    model = randomise(whisper(max_source_positions=1500))
    model.save_pretrained(tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=BINS)
    about = {**extractor.to_dict(), "mel_filters": extractor.mel_filters.tolist()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    ear = PretrainedFeatures(PretrainedConfig(architecture="whisper", path=str(tmp_path)))
    heard = run(ear, ear.build_encoder(), 33333, 481000)
    assert heard.lengths == (105, 1504)
    expected = Checkpoint("whisper", tmp_path, model, extractor)
    close(heard.frames_SC[:105], expected.hear(clip(33333)))
    close(heard.frames_SC[105:-4], expected.hear(clip(481000)[:480000]))
    close(heard.frames_SC[-4:], expected.hear(clip(481000)[480000:]))


MORE: list[tuple[str, Callable[[], Any]]] = [
    ("whisper", lambda: whisper(kind="WhisperModel")),
    ("whisper", lambda: whisper(kind="WhisperForAudioClassification")),
    ("wav2vec2_bert", lambda: wav2vec2_bert("Wav2Vec2BertModel")),
    ("wav2vec2_bert", lambda: wav2vec2_bert(add_adapter=True, use_intermediate_ffn_before_adapter=True)),
    ("parakeet", lambda: parakeet("ParakeetForTDT")),
    ("parakeet", lambda: parakeet("ParakeetEncoder")),
]


@pytest.mark.parametrize(("architecture", "make"), MORE)
def test_other_models_around_the_same_encoder_load_too(checkpoints, tmp_path, architecture, make):
    checkpoint = checkpoints[architecture]
    model = make()
    inner = next((model.get_submodule(name) for name in ("encoder", "wav2vec2_bert") if hasattr(model, name)), model)
    if architecture != "whisper" and not isinstance(inner, type(checkpoint.encoder)):
        inner = model
    missing = inner.load_state_dict(checkpoint.encoder.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("adapter", "intermediate_ffn")) for key in missing)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    about = {"processor_class": "Some", "feature_extractor": checkpoint.extractor.to_dict()}
    (tmp_path / "processor_config.json").write_text(json.dumps(about))  # where newer releases put it
    ear = PretrainedFeatures(PretrainedConfig(architecture=architecture, path=str(tmp_path)))
    close(run(ear, ear.build_encoder(), 20000).frames_SC, checkpoint.hear(clip(20000)))


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_every_kind_of_position_of_wav2vec2_bert(tmp_path, positions):
    checkpoint = save(tmp_path, "wav2vec2_bert", randomise(wav2vec2_bert(position_embeddings_type=positions)))
    ear = checkpoint.ear()
    encoder = ear.build_encoder()
    close(run(ear, encoder, 20000).frames_SC, checkpoint.hear(clip(20000)))
    again = PretrainedFeatures(encoder.saved_config(with_weights=True)).build_encoder()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(run(ear, again, 20000).frames_SC, run(ear, encoder, 20000).frames_SC)


def test_a_clip_does_not_depend_on_its_neighbours(checkpoint):
    ear = checkpoint.ear(pool=3)
    encoder = ear.build_encoder().train()
    window = WINDOW_SECONDS[checkpoint.architecture] * 16000
    lengths = (16001, 401, 7777, 16001, 7777, 16001, window + 5000, 16001, 2 * window, 3333, 16001, 560, 16001)
    heard = run(ear, encoder, *lengths)
    for length, frames_SC in zip(lengths, heard.frames_SC.split(heard.lengths), strict=True):
        close(frames_SC, run(ear, encoder, length).frames_SC)


def test_tokens_are_counted_before_any_weight_runs(checkpoint):
    window = WINDOW_SECONDS[checkpoint.architecture] * 16000
    around = (*range(-1, 2), -320, -160, 160, 319, 320, 321, 399, 400, 1279, 1280, 1281)
    lengths = [400, 401, 559, 560, 639, 640, 641, 719, 720, 721, 1279, 1280, 1281, 1439, 1440, 15999, 16000, 16001]
    lengths += [window + step for step in around] + [2 * window, 2 * window + 1]
    ear = checkpoint.ear()
    encoder = ear.build_encoder()
    prepared = prepare(ear, *lengths)
    with torch.no_grad():
        heard = encoder(**ear.collate(prepared))
    assert heard.lengths == tuple(item.num_tokens for item in prepared)
    assert heard.frames_SC.isfinite().all()
    rate = {"whisper": 50, "wav2vec2_bert": 50, "parakeet": 12.5}[checkpoint.architecture]
    for length, count in zip(lengths, heard.lengths, strict=True):
        assert abs(count - rate * length / 16000) <= 1.5


def test_pooling_averages_neighbours_and_what_is_left(checkpoint):
    ear, pooled = checkpoint.ear(), checkpoint.ear(pool=3)
    encoder, pooled_encoder = ear.build_encoder(), pooled.build_encoder()
    lengths = (5000, 5321, 6000, 6700, 7000, 40000)
    frames, pooled_frames = run(ear, encoder, *lengths), run(pooled, pooled_encoder, *lengths)
    assert {length % 3 for length in frames.lengths} == {0, 1, 2}
    expected = [
        group.mean(0) for frames_SC in frames.frames_SC.split(frames.lengths) for group in frames_SC.split(3)
    ]  # fmt: skip
    close(pooled_frames.frames_SC, torch.stack(expected))
    assert pooled_frames.lengths == tuple(-(-length // 3) for length in frames.lengths)
    assert pooled_frames.lengths == tuple(item.num_tokens for item in prepare(pooled, *lengths))


@torch.no_grad()
def test_a_long_clip_is_its_windows_joined(checkpoint):
    seconds = WINDOW_SECONDS[checkpoint.architecture]
    wave_L = clip(int(2.3 * seconds * 16000) + 77)
    if checkpoint.architecture == "whisper":
        expected = [checkpoint.hear(window_L) for window_L in wave_L.split(seconds * 16000)]
    else:
        inputs = checkpoint.extractor(wave_L.numpy(), sampling_rate=16000, return_tensors="pt")
        features_SM = inputs.input_features[0, : int(inputs.attention_mask.sum())]
        steps = {"wav2vec2_bert": 1000, "parakeet": 4000}[checkpoint.architecture]
        windows = features_SM.split(steps)
        expected = [checkpoint.encoder(window_SM[None]).last_hidden_state[0] for window_SM in windows]
    assert len(expected) == 3
    ear = checkpoint.ear()
    close(run(ear, ear.build_encoder(), len(wave_L)).frames_SC, torch.cat(expected))


def test_half_an_hour_is_encoded_a_few_windows_at_a_time(checkpoints, monkeypatch):
    checkpoint = checkpoints["whisper"]
    ear = checkpoint.ear()
    encoder = ear.build_encoder()
    sizes: list[int] = []
    encoder.model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    heard = run(ear, encoder, 60 * 16000, 16000)
    assert heard.lengths == (3000, 50)
    assert sum(sizes) == 31 and max(sizes) == 4


def test_augmentation_sees_the_mel_bins_of_the_clip_alone(checkpoint):
    ear = checkpoint.ear()
    seen: list[Tensor] = []

    def mark(features_SM: Tensor) -> Tensor:
        seen.append(features_SM)
        return torch.full_like(features_SM, 9.0)

    for length in (16000, 50001):  # in the second, Whisper's last window is padded too
        plain = ear.prepare(clip(length), same).tensors["features_SM"]
        marked = ear.prepare(clip(length), mark).tensors["features_SM"]
        expected = {"whisper": -(-length // 160), "wav2vec2_bert": (length - 400) // 160 + 1, "parakeet": length // 160}
        valid = expected[checkpoint.architecture]
        valid -= valid % 2 if checkpoint.architecture == "wav2vec2_bert" else 0
        assert seen[-1].shape == (valid, BINS) and seen[-1].dtype == torch.float32
        assert torch.equal(plain.reshape(-1, BINS)[:valid], seen[-1])
        assert (marked.reshape(-1, BINS)[:valid] == 9).all()
        assert torch.equal(marked.reshape(-1, BINS)[valid:], plain.reshape(-1, BINS)[valid:])


def test_features_are_the_same_every_time(tmp_path, checkpoints):
    """Whisper's extractor can add noise from a generator of its own; augmentation is ours alone."""
    shutil.copytree(checkpoints["whisper"].folder, tmp_path, dirs_exist_ok=True)
    transformers.WhisperFeatureExtractor(feature_size=BINS, chunk_length=2, dither=0.1).save_pretrained(tmp_path)
    ear = PretrainedFeatures(PretrainedConfig(architecture="whisper", path=str(tmp_path)))
    first, second = prepare(ear, 9000, 9000)
    assert torch.equal(first.tensors["features_SM"], second.tensors["features_SM"])


def test_training_has_no_hidden_randomness_and_leaves_statistics_alone(checkpoint):
    """Every dropout, layer dropout and time mask in the checkpoint's config is at 0.4 or 0.5."""
    ear = checkpoint.ear()
    encoder = ear.build_encoder().eval()
    expected = run(ear, encoder, 16000, 9000).frames_SC
    encoder.train()
    assert encoder.training
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert checkpoint.architecture != "parakeet" or any("running_mean" in name for name in buffers)
    for _ in range(3):
        assert torch.equal(run(ear, encoder, 16000, 9000).frames_SC, expected)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_gradients_reach_every_weight(checkpoint):
    ear = checkpoint.ear(pool=2)
    encoder = ear.build_encoder().train()
    frames_SC = encoder(**ear.collate(prepare(ear, 20000, 9000))).frames_SC
    (frames_SC * torch.randn(frames_SC.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_only_the_encoder_is_kept_and_whispers_sinusoids_do_not_train(checkpoint):
    encoder = checkpoint.ear().build_encoder()
    stored = {name.removeprefix("model."): tensor for name, tensor in encoder.state_dict().items()}
    theirs = {name: tensor for name, tensor in checkpoint.encoder.state_dict().items() if name != "masked_spec_embed"}
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stored.items())
    assert not any("embed_positions" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_layer_is_that_blocks_output(checkpoint, layer):
    blocks = checkpoint.encoder.get_submodule(
        "encoder.layers" if checkpoint.architecture == "wav2vec2_bert" else "layers"
    )
    outputs: list[Tensor] = []
    hook = blocks[layer].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    final = checkpoint.hear(clip(16000))
    hook.remove()
    ear = checkpoint.ear(layer=layer)
    encoder = ear.build_encoder()
    frames_SC = run(ear, encoder, 16000).frames_SC
    close(frames_SC, outputs[0][0, : len(final)])
    if layer == -2:
        assert len(encoder.state_dict()) < len(checkpoint.ear(layer=-1).build_encoder().state_dict())
    again = PretrainedFeatures(encoder.saved_config(with_weights=True)).build_encoder()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(run(ear, again, 16000).frames_SC, frames_SC)


def test_a_saved_encoder_needs_no_files(checkpoint, tmp_path):
    shutil.copytree(checkpoint.folder, tmp_path / "model")
    ear = PretrainedFeatures(
        PretrainedConfig(architecture=checkpoint.architecture, path=str(tmp_path / "model"), pool=2)
    )
    encoder = ear.build_encoder()
    prepared = prepare(ear, 16000, 40001)
    shutil.rmtree(tmp_path / "model")
    saved = PretrainedConfig(**json.loads(json.dumps(asdict(encoder.saved_config(with_weights=True)))))
    again = PretrainedFeatures(saved)
    rebuilt = again.build_encoder()
    rebuilt.load_state_dict(encoder.state_dict())
    for item, expected in zip(prepare(again, 16000, 40001), prepared, strict=True):
        assert item.num_tokens == expected.num_tokens
        assert torch.equal(item.tensors["features_SM"], expected.tensors["features_SM"])
    assert torch.equal(rebuilt(**again.collate(prepared)).frames_SC, encoder(**ear.collate(prepared)).frames_SC)
    assert rebuilt.saved_config(with_weights=True) == saved
    assert encoder.saved_config(with_weights=False) == ear.config


def test_an_ear_pickles_and_brings_what_it_has_read(checkpoint, tmp_path):
    shutil.copytree(checkpoint.folder, tmp_path / "model")
    config = PretrainedConfig(architecture=checkpoint.architecture, path=str(tmp_path / "model"))
    fresh, used = PretrainedFeatures(config), PretrainedFeatures(config)
    expected = used.prepare(clip(9000), same)
    fresh = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(fresh.prepare(clip(9000), same).tensors["features_SM"], expected.tensors["features_SM"])
    shutil.rmtree(tmp_path / "model")
    used = pickle.loads(pickle.dumps(used))
    assert torch.equal(used.prepare(clip(9000), same).tensors["features_SM"], expected.tensors["features_SM"])


SCRATCH: dict[str, dict[str, Any]] = {
    "whisper": {
        "arguments": {**WHISPER, "max_source_positions": 50},
        "features": {"feature_size": BINS, "chunk_length": 1},
    },
    "wav2vec2_bert": {"arguments": WAV2VEC2_BERT, "features": {"num_mel_bins": BINS}},
    "parakeet": {"arguments": PARAKEET, "features": {"feature_size": BINS}},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_encoder_from_scratch(architecture):
    ear = PretrainedFeatures(PretrainedConfig(architecture=architecture, pretrained=False, **SCRATCH[architecture]))
    heard = run(ear, ear.build_encoder(), 16000, 20001)
    assert heard.lengths == tuple(item.num_tokens for item in prepare(ear, 16000, 20001))
    assert heard.frames_SC.isfinite().all()


def test_half_precision_weights_are_trained_in_single(checkpoint, tmp_path):
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    half = {key: value.half() if value.is_floating_point() else value for key, value in load_file(weights).items()}
    save_file(half, weights)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "dtype": "float16", "torch_dtype": "float16"}))
    encoder = PretrainedFeatures(
        PretrainedConfig(architecture=checkpoint.architecture, path=str(tmp_path))
    ).build_encoder()
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_bfloat16_encoders_run(checkpoint):
    ear = checkpoint.ear(pool=2)
    encoder = ear.build_encoder()
    expected = run(ear, encoder, 16000).frames_SC
    frames_SC = run(ear, encoder.bfloat16(), 16000).frames_SC
    assert frames_SC.dtype == torch.bfloat16
    assert torch.cosine_similarity(frames_SC.float().flatten(), expected.flatten(), dim=0) > 0.95


def snapshot(cache: Path, repository: str, files: Path, commit: str) -> None:
    """Lays a folder into a hub cache as a download of `main` would."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(files, root / "snapshots" / commit)


def test_a_hub_name_loads_from_the_cache_and_knows_its_commit(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot(tmp_path, "someone/tiny", checkpoint.folder, commit)
    expected = checkpoint.hear(clip(16000))
    for revision in (None, "main", commit):
        config = PretrainedConfig(architecture=checkpoint.architecture, name="someone/tiny", revision=revision)
        ear = PretrainedFeatures(config)
        encoder = ear.build_encoder()
        assert encoder.origin == Origin("someone/tiny", commit)
        close(run(ear, encoder, 16000).frames_SC, expected)
        pinned = encoder.saved_config(with_weights=False)
        assert (pinned.name, pinned.revision, pinned.pretrained) == ("someone/tiny", commit, True)
        assert encoder.saved_config(with_weights=True).revision is None
    config = PretrainedConfig(architecture=checkpoint.architecture, name="someone/tiny", revision="v2")
    with pytest.raises(ValueError, match=r"someone/tiny .revision v2. cannot be fetched"):
        PretrainedFeatures(config).build_encoder()


def test_weights_come_from_the_commit_that_the_sizes_came_from(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    old, new = "0" * 40, "1" * 40
    snapshot(tmp_path, "someone/tiny", checkpoints["whisper"].folder, old)
    ear = PretrainedFeatures(PretrainedConfig(architecture="whisper", name="someone/tiny"))
    prepare(ear, 9000)
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(new)
    assert ear.build_encoder().origin == Origin("someone/tiny", old)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(checkpoint, tmp_path, damage):
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    bias = next(key for key in state if "layers.1" in key and key.endswith("norm.bias") and "decoder" not in key)
    prefix = {"whisper": "model.encoder", "wav2vec2_bert": "wav2vec2_bert", "parakeet": "encoder"}
    if damage == "missing":
        del state[bias]
    else:
        state[f"{prefix[checkpoint.architecture]}.surplus.weight" if damage == "unexpected" else bias] = torch.ones(5)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        PretrainedFeatures(PretrainedConfig(architecture=checkpoint.architecture, path=str(tmp_path))).build_encoder()
    expected = "surplus.weight" if damage == "unexpected" else bias.split("layers.1")[1]
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "hubert"}, "expected one of whisper, wav2vec2_bert, parakeet, got 'hubert'"),
        ({}, "architecture whisper needs a name on the hub or a path, one of them"),
        ({"name": "a/b", "path": "x"}, "needs a name on the hub or a path, one of them"),
        ({"name": "a/b", "pretrained": False}, "leave out name and path"),
        ({"name": "a/b", "arguments": {"d_model": 8}}, "bring their own sizes"),
        ({"name": "a/b", "features": {"n_fft": 8}}, "bring their own sizes"),
        ({"path": "x", "revision": "main"}, "revision 'main' is for weights named on the hub"),
        ({"name": "a/b", "pool": 0}, "pool is at least 1, got 0"),
        ({"name": "a/b", "layer": 3}, "layer counts from the end and is negative, -1 being the last; got 3"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainedConfig(**{"architecture": "whisper", **options})


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("whisper", {"arguments": {"d_modl": 8}}, "WhisperConfig takes no 'd_modl' here; did you mean 'd_model'"),
        ("parakeet", {"arguments": {"layerdrop": 0.1}}, "takes no 'layerdrop' here; it has hidden_size, "),
        ("whisper", {"features": {"dither": 1.0}}, "features: WhisperFeatureExtractor takes no 'dither' here; it has"),
        ("whisper", {"arguments": {"d_model": "wide"}}, "WhisperConfig refuses them: .*d_model"),
        ("whisper", {"arguments": {"encoder_attention_heads": 3}}, "width of 16 is not a multiple of 3 attention"),
        ("whisper", {"features": {"chunk_length": 2}}, "windows of 2 s have 32000 samples, but .* 50 needs 16000"),
        ("whisper", {"features": {"feature_size": 8}}, "reads 16 features a step, its feature extractor makes 8"),
        ("wav2vec2_bert", {"features": {"stride": 1}}, "reads 32 features a step, its feature extractor makes 16"),
        ("parakeet", {"arguments": {"subsampling_factor": 6}}, "a power of 2 that divides the 16 mel bins, got 6"),
        ("parakeet", {"layer": -3}, "layer -3 asked for, but the encoder has 2 blocks"),
    ],
)
def test_building_mistakes(architecture, changes, message):
    options = {**SCRATCH[architecture], "layer": changes.get("layer")}
    for key in ("arguments", "features"):
        options[key] = {**options[key], **changes.get(key, {})}
    with pytest.raises(ValueError, match=message):
        PretrainedFeatures(PretrainedConfig(architecture=architecture, pretrained=False, **options)).build_encoder()


def test_folders_of_the_wrong_kind_are_refused(checkpoints, tmp_path):
    def build(architecture: str, path: Path) -> None:
        PretrainedFeatures(PretrainedConfig(architecture=architecture, path=str(path))).build_encoder()

    def change(name: str, **changes: Any) -> None:
        shutil.copytree(checkpoints["parakeet"].folder, tmp_path, dirs_exist_ok=True)
        about = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**about, **changes}))

    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        build("whisper", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: cannot be read"):
        build("whisper", tmp_path)
    with pytest.raises(ValueError, match="holds a parakeet_ctc model, this architecture takes whisper"):
        build("whisper", checkpoints["parakeet"].folder)
    change("preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(ValueError, match="ParakeetFeatureExtractor at 8000 Hz, expected .* at 16000 Hz"):
        build("parakeet", tmp_path)
    change("preprocessor_config.json", feature_extractor_type="WhisperFeatureExtractor")
    with pytest.raises(ValueError, match="made by WhisperFeatureExtractor .*expected ParakeetFeatureExtractor"):
        build("parakeet", tmp_path)
    sizes = json.loads((checkpoints["parakeet"].folder / "config.json").read_text())["encoder_config"]
    change("config.json", encoder_config={**sizes, "subsampling_conv_kernel_size": 5})
    with pytest.raises(ValueError, match="only a subsampling with kernel 3 and stride 2"):
        build("parakeet", tmp_path)
    shutil.copytree(checkpoints["parakeet"].folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors in this folder"):
        build("parakeet", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config.json: cannot be read"):
        build("parakeet", tmp_path)
