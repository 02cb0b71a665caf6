"""Small backbones from text: what transformers opens, what packing hides, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM, PreTrainedTokenizerFast

from molora.config import ConfigError, build
from molora.interrupt import Stopped
from molora.pretrain import loop as module
from molora.pretrain.loop import PretrainConfig, long_factors, pretrain
from molora.pretrain.text import Document, Piece, contents, cut, read_documents
from molora.pretrain.tokenizer import SPECIAL_TOKENS, train_tokenizer
from molora.pretrain.windows import collate, pack
from molora.storage import hold

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "big", "red", "moon", "over", "1234", "hills"]
CHAT = [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": "the moon"}]


def write_text(folder: Path) -> list[str]:
    """A text, a few short ones, and conversations: enough for a vocabulary of 300."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + ".\n" for _ in range(200)]
    (folder / "long.txt").write_text("".join(sentences[:120]))
    rows = [{"text": sentence} for sentence in sentences[120:160]]
    rows += [{"messages": [{**CHAT[0], "content": sentence}, CHAT[1]]} for sentence in sentences[160:]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(folder / "long.txt"), str(folder / "rows.jsonl")]


def tiny(folder: Path, name: str = "backbone", **changes: object) -> PretrainConfig:
    config = PretrainConfig(
        output=str(folder / name),
        text=write_text(folder),
        vocab_size=300,
        width=32,
        mlp_width=48,
        layers=2,
        heads=2,
        key_value_heads=1,
        original_max_position_embeddings=64,
        max_position_embeddings=512,
        window_tokens=32,
        windows_per_step=4,
        steps=12,
        warmup_steps=3,
        learning_rate=1e-2,
        checkpoint_every_steps=4,
    )
    return replace(config, **changes)


def learned_tokenizer(documents: list[Document], config: PretrainConfig) -> PreTrainedTokenizerFast:
    texts = [text for document in documents for text in contents(document)]
    return train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)


class Interruption(Progress):
    """Stops the program at a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        super().__init__(disable=True)
        self.step = step

    def update(self, task_id, **fields) -> None:
        super().update(task_id, **fields)
        if "loss" in fields.get("note", "") and fields["completed"] == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pretrain(tiny(tmp_path_factory.mktemp("pretrain")))


def test_transformers_opens_a_phi_4_mini(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(model, Phi3ForCausalLM)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert model.config.rms_norm_eps == 1e-5
    assert len(tokenizer) == model.config.vocab_size == 300
    end_of_text, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert model.config.bos_token_id == model.config.pad_token_id == model.config.eos_token_id == end_of_text
    assert model.generation_config.eos_token_id == [end, end_of_text]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == end_of_text


def test_a_quarter_of_each_head_is_position_free_and_long_samples_switch_frequencies(folder):
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    promised, original, rotated = 512, 64, 12
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(promised / original) / math.log(original)))
    plain = 10000 ** -(torch.arange(0, rotated, 2) / rotated)
    factors = torch.tensor([8 ** min(1, 48 * i / 31 / 6) for i in range(6)])
    for length, frequencies in ((original, plain), (original + 1, plain / factors)):
        angles = torch.arange(length)[:, None] * frequencies
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        expected = torch.cat([angles, angles], dim=-1)
        torch.testing.assert_close(cos[0], expected.cos() * rotary.attention_scaling)
        torch.testing.assert_close(sin[0], expected.sin() * rotary.attention_scaling)


def test_long_factors_follow_phi_4_mini():
    # Some of the 48 in microsoft/Phi-4-mini-instruct; the last two leave any simple rule.
    reference = {
        0: 1.0,
        1: 1.118320672,
        7: 2.187582649,
        15: 5.351743533,
        23: 13.09260651,
        31: 32.03,
        38: 32.66,
        45: 33.5,
    }
    ours = long_factors(48, 131072 / 4096)
    for i, factor in reference.items():
        assert ours[i] == pytest.approx(factor, rel=0.05)
    assert long_factors(6, 1.0) == [1.0] * 6


def test_chat_template_is_phi_4_minis(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = "<|user|>what is red?<|end|><|assistant|>the moon<|end|><|endoftext|>"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == rendered
    prompt = "<|user|>what is red?<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == prompt
    tools = [{"role": "system", "content": "Help.", "tools": "[]"}]
    rendered = "<|system|>Help.<|tool|>[]<|/tool|><|end|><|endoftext|>"
    assert tokenizer.apply_chat_template(tools, tokenize=False) == rendered


def test_markers_absorb_whitespace_after_them_and_close_the_vocabulary(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<|user|> \n the moon<|end|>\n") == tokenizer.encode("<|user|>the moon<|end|>")
    assert len(tokenizer.encode("<|endoftext|> ")) == 2
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(300 - len(SPECIAL_TOKENS), 300))


def test_tokenizer_keeps_every_byte_and_frequent_words_whole(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("the cat  sat.\n\n\tOn — a Straße, 12345 times! 🙂\r\n", " leading", "trailing  ", "\x00\u0301é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" moon")) == len(tokenizer.encode(" the")) == 1


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    config = tiny(tmp_path)
    documents = list(read_documents(Path(config.text[0])))
    tokenizer = learned_tokenizer([text for _, text in documents], config)
    (piece,) = cut([("here", "a <|end|> b")], tokenizer, 32)
    assert (piece.token_ids >= 300 - len(SPECIAL_TOKENS)).sum() == 1
    assert piece.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(piece.token_ids[:-1]) == "a <|end|> b"


def test_conversations_learn_what_the_assistant_says(tmp_path):
    config = tiny(tmp_path)
    documents = [text for path in config.text for _, text in read_documents(Path(path))]
    tokenizer = learned_tokenizer(documents, config)
    (piece,) = cut([("here", [*CHAT])], tokenizer, 32)
    assert piece.token_ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(piece.token_ids[piece.targets]) == "the moon<|end|><|endoftext|>"


def test_packing_keeps_every_piece_whole_and_once():
    draw = random.Random(0)
    for _ in range(50):
        window = draw.randint(2, 60)
        lengths = [draw.randint(1, window) for _ in range(draw.randint(1, 200))]
        order = draw.sample(range(len(lengths)), len(lengths))
        windows = pack(lengths, order, window)
        assert sorted(piece for members in windows for piece in members) == list(range(len(lengths)))
        assert all(sum(lengths[piece] for piece in members) <= window for members in windows)


def test_packing_wastes_little():
    draw = random.Random(0)
    lengths = [128] * 100 + [draw.randint(10, 40) for _ in range(2000)]
    windows = pack(lengths, draw.sample(range(2100), 2100), 128)
    assert sum(lengths) > 0.95 * 128 * len(windows)


def test_documents_in_a_window_do_not_see_each_other(tmp_path):
    config = tiny(tmp_path)
    documents = [item for path in config.text for item in read_documents(Path(path))]
    tokenizer = learned_tokenizer([document for _, document in documents], config)
    model = module._build_model(config, tokenizer).eval()
    pieces = [piece for piece in cut(documents, tokenizer, 32) if len(piece) <= 10][:3]
    together = module._losses(model, collate(pieces, [[0, 1, 2]], 32), "float32")
    alone = [module._losses(model, collate([piece], [[0]], len(piece)), "float32") for piece in pieces]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    # The oracle: transformers' own loss on one plain row.
    text = Piece(pieces[0].token_ids, torch.ones_like(pieces[0].targets))
    ids = text.token_ids[None]
    ours = module._losses(model, collate([text], [[0]], len(text)), "float32").mean()
    torch.testing.assert_close(ours, model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_it_learns(tmp_path):
    config = tiny(tmp_path, steps=60)
    record = json.loads((pretrain(config) / "pretrain.json").read_text())
    assert len(record["losses"]) == 60
    # Random words among 15 cost about 2 nats each, and spelling them none.
    assert record["held_out_loss"] < 0.5 * record["losses"][0]
    assert record["held_out_perplexity"] == pytest.approx(math.exp(record["held_out_loss"]))


def test_an_interrupted_run_ends_like_the_straight_one(folder, tmp_path):
    config = tiny(tmp_path)
    for step in (2, 4, 7, 11):  # before any checkpoint, right after one, between two, before the end
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, Interruption(step))
        assert not Path(config.output).exists()
        # What a kill in the middle of a save leaves behind.
        (tmp_path / "backbone.partial" / ".state.safetensors.tmp").write_bytes(b"half")
        torch.manual_seed(step)  # the caller's randomness plays no part
    resumed = pretrain(config)
    for name in ("model.safetensors", "tokenizer.json", "pretrain.json", "config.json", "generation_config.json"):
        assert (resumed / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (tmp_path / "backbone.partial").exists()


def test_resuming_takes_the_checkpoint_and_not_a_fresh_start(tmp_path):
    config = tiny(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, Interruption(9))
    steps = []

    class Watch(Progress):
        def update(self, task_id, **fields) -> None:
            super().update(task_id, **fields)
            if "loss" in fields.get("note", ""):
                steps.append(fields["completed"])

    pretrain(config, Watch(disable=True))
    assert steps == [9, 10, 11, 12]


def test_pretraining_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pretrain(tiny(tmp_path, steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_folder_is_reused(tmp_path):
    config = tiny(tmp_path, steps=2)
    made = pretrain(config) / "model.safetensors"
    stamp = made.stat().st_mtime_ns
    assert pretrain(replace(config, checkpoint_every_steps=1)) == made.parent
    assert made.stat().st_mtime_ns == stamp


def test_another_config_or_text_for_a_finished_folder_is_refused(tmp_path):
    config = tiny(tmp_path, steps=2)
    pretrain(config)
    with pytest.raises(ConfigError, match=r"backbone was made differently: config\.steps: was 2, is 3; remove"):
        pretrain(replace(config, steps=3))
    with open(config.text[0], "a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match="text_sha256"):
        pretrain(config)


def test_an_interrupted_run_of_another_config_is_refused(tmp_path):
    config = tiny(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, Interruption(5))
    with pytest.raises(
        ConfigError, match=r"backbone\.partial was made differently: config\.learning_rate: was 0\.01, is 0\.5"
    ):
        pretrain(replace(config, learning_rate=0.5))
    recorded = tmp_path / "backbone.partial" / "pretrain.json"
    recorded.write_text(recorded.read_text().replace('"threads": ', '"threads": 9'))
    with pytest.raises(ConfigError, match="threads: was"):
        pretrain(config)


def test_a_mistake_found_before_training_does_not_block_the_next_try(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size 5000 is too large"):
        pretrain(tiny(tmp_path, vocab_size=5000))
    assert pretrain(tiny(tmp_path, steps=1)).is_dir()


def test_bfloat16_products_train_the_same_fp32_weights(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        folder = pretrain(tiny(tmp_path, name=precision, precision=precision))
        losses[precision] = torch.tensor(json.loads((folder / "pretrain.json").read_text())["losses"])
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert not torch.equal(losses["float32"], losses["bfloat16"])
    torch.testing.assert_close(losses["float32"], losses["bfloat16"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 40}, r"width 40 must be a multiple of 8 x heads \(16\)"),
        ({"heads": 4, "key_value_heads": 3}, "heads 4 must be a multiple of key_value_heads 3"),
        ({"window_tokens": 100}, "window_tokens 100 .* original_max_position_embeddings 64 .* 512 must not decrease"),
        ({"vocab_size": 200}, "vocab_size 200 must be at least 266"),
        ({"held_out_share": 1.0}, "held_out_share 1.0 must lie between 0 and 1"),
        ({"steps": 0}, "steps is 0; give a number of at least 1"),
        ({"precision": "float8"}, "precision 'float8' is none that a backbone runs in"),
        ({"vocab_sice": 300}, "did you mean 'vocab_size'"),
    ],
)
def test_a_config_that_cannot_work_is_refused(tmp_path, change, message):
    values = {**vars(tiny(tmp_path)), **change}
    with pytest.raises(ConfigError, match=message):
        build(PretrainConfig, values, "test.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt cannot be read: No such file"),
        ("empty.txt", b" \n", "empty.txt: the file is empty"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8 at byte 3"),
        ("table.csv", b"a,b", "table.csv: text is read from .txt and .jsonl files, not from '.csv'"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": ', "rows.jsonl, row 2: not valid JSON"),
        ("rows.jsonl", b'{"txt": "a"}', "rows.jsonl, row 1: expected an object with `text`"),
        ("rows.jsonl", b'{"messages": [{"role": "robot", "content": "a"}]}', "row 1: message 0: role 'robot'"),
        ("rows.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "no modality answers"),
        ("short.txt", b"a b", "cannot be split into training and held-out text"),
        ("short.txt", b"cat and dog " * 9, r"the text fills \d windows of 32 tokens, a step takes 4"),
    ],
)
def test_text_that_cannot_be_used_is_one_clear_error(tmp_path, name, content, message):
    config = tiny(tmp_path, text=[str(tmp_path / name)], vocab_size=266)
    if content is None:
        (tmp_path / name).unlink(missing_ok=True)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by `molora pretrain`"):
        pretrain(tiny(tmp_path))
    assert (tmp_path / "backbone" / "notes").read_text() == "mine"


def test_a_learning_rate_that_is_too_high_is_told(tmp_path):
    with pytest.raises(ConfigError, match="the gradient norm of step 1 is nan; lower learning_rate"):
        pretrain(tiny(tmp_path, learning_rate=1e30, max_gradient_norm=1e30))


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("loss", lambda found: found * math.nan),
        ("gradient norm", lambda found: found + 0 * (found - found.detach()).sqrt()),  # of a loss that is one
    ],
)
def test_what_is_no_number_stops_before_the_optimiser(tmp_path, monkeypatch, name, spoilt):
    losses = module._losses
    monkeypatch.setattr(module, "_losses", lambda *given: spoilt(losses(*given)))
    with pytest.raises(ConfigError, match=f"the {name} of step 0 is nan; lower learning_rate"):
        pretrain(tiny(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path, number: int) -> None:
    class Signalled(Interruption):
        def update(self, task_id, **fields) -> None:
            try:
                super().update(task_id, **fields)
            except KeyboardInterrupt:
                signal.raise_signal(number)

    config = tiny(tmp_path)
    told = f"stopped by {signal.Signals(number).name} after step 6 of 12, which is saved; run it again"
    with pytest.raises(Stopped, match=told):
        pretrain(config, Signalled(5))
    steps = []

    class Watch(Progress):
        def update(self, task_id, **fields) -> None:
            super().update(task_id, **fields)
            if "loss" in fields.get("note", ""):
                steps.append(fields["completed"])

    assert (pretrain(config, Watch(disable=True)) / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert steps[0] == 7


def test_a_backbone_in_the_making_is_refused_to_a_second_process(tmp_path: Path) -> None:
    (tmp_path / "backbone.partial").mkdir()
    with hold(tmp_path / "backbone.partial"), pytest.raises(ConfigError, match="backbone.partial: in use by process"):
        pretrain(tiny(tmp_path))
