"""Prompts: ids are the template's, special tokens are the template's alone, targets are what the model must write."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from molora.data.prompt import ChatTemplate

CORPUS = [
    "hello world, what is it? the answer is yes. a red triangle\n\nuser assistant system model",
    "What is the colour of this shape?\nIt is a blue square, no doubt. Grüße, 你好 🙂",
] * 4


class Dialect(NamedTuple):
    """A template as published models write theirs, and what it makes of one turn: (text, is it a target)."""

    template: str
    specials: Mapping[str, bool]  # token -> does it absorb whitespace behind it
    system: tuple[str, str]
    user: tuple[str, str]
    cue: str
    end: str
    start: str = ""
    close: str = ""
    trims: bool = False


DIALECTS = {
    "phi": Dialect(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        {"<|endoftext|>": False, "<|system|>": True, "<|user|>": True, "<|assistant|>": True, "<|end|>": True},
        system=("<|system|>", "<|end|>"),
        user=("<|user|>", "<|end|>"),
        cue="<|assistant|>",
        end="<|end|>",
        close="<|endoftext|>",
    ),
    "chatml": Dialect(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        {"<|endoftext|>": False, "<|im_start|>": False, "<|im_end|>": False},
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        cue="<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "llama3": Dialect(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        {"<|bos|>": False, "<|start_header_id|>": False, "<|end_header_id|>": False, "<|eot_id|>": False},
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        start="<|bos|>",
        trims=True,
    ),
    "gemma": Dialect(
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        {"<|bos|>": False, "<start_of_turn>": False, "<end_of_turn>": False},
        system=("<start_of_turn>system\n", "<end_of_turn>\n"),
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        cue="<start_of_turn>model\n",
        end="<end_of_turn>",
        start="<|bos|>",
        trims=True,
    ),
    # Headers are plain text: no special token parts a question from its answer.
    "plain": Dialect(
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}",
        {"<|bos|>": False, "<|endoftext|>": False},
        system=("[system]\n", "\n"),
        user=("[user]\n", "\n"),
        cue="[assistant]\n",
        end="<|endoftext|>",
        start="<|bos|>",
    ),
}


@functools.cache
def tokenizer(dialect: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and the template of a dialect."""
    return build(DIALECTS[dialect].template, DIALECTS[dialect].specials)


def build(template: str, specials: Mapping[str, bool]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return finish(backend, template, specials)


def finish(backend: Tokenizer, template: str, specials: Mapping[str, bool]) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=r) for t, r in specials.items()])
    named = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in named.items() if token in specials}
    )
    made.chat_template = template
    return made


def reference_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return tokenizer.apply_chat_template(plain, return_dict=False, **more)  # pyright: ignore[reportReturnType]


def expected(dialect: str, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The conversation in the dialect's own words, each with whether it is a target. Written without any renderer."""
    d = DIALECTS[dialect]
    pieces = [(d.start, False)]
    for index, message in enumerate(messages):
        content = message["content"].strip() if d.trims else message["content"]
        if message["role"] == "assistant":
            learn = message.get("train", True)
            last = index == len(messages) - 1
            behind = "\n" if dialect in ("chatml", "gemma") else ""
            pieces += [(d.cue, False), (content + d.end, learn), (behind, False), (d.close if last else "", learn)]
        else:
            opening, ending = d.system if message["role"] == "system" else d.user
            pieces.append((opening + content + ending, False))
    return pieces


def talk(*turns: str, system: str | None = None, frozen: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn; `frozen` are messages with `train: false`."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{**m, "train": False} if i in frozen else m for i, m in enumerate(messages)]


CONVERSATIONS = {
    "one turn": talk("What is it?", "A red triangle"),
    "several turns": talk("hello", "Hi", "what colour is it?", "blue", "sure?", "yes"),
    "system": talk("hello", "Hi", system="Be brief."),
    "one turn is not to be learned": talk("hello", "Hi", "and?", "no", system="You see.", frozen=(2,)),
    "the last turn is not to be learned": talk("hello", "Hi", "and?", "no", frozen=(3,)),
    "unicode": talk("你好 🙂 Grüße", "Größe: 3 µm 🙂🙂"),
    "empty answers": talk("hello", "", "again", ""),
    "whitespace": talk("  What?\n", "A shape.  "),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_ids_are_the_templates_and_targets_are_the_answers(dialect: str, messages: list[dict[str, Any]]) -> None:
    fast = tokenizer(dialect)
    prompt = ChatTemplate(fast).encode(messages, where="sample 0")
    assert prompt.token_ids == reference_ids(fast, messages)
    pieces = expected(dialect, messages)
    assert "".join(text for text, _ in pieces) == fast.apply_chat_template(messages, tokenize=False)
    ids, targets = [], []
    for text, learn in pieces:
        more = fast(text, add_special_tokens=False)["input_ids"]
        ids += more
        targets += [learn] * len(more)
    if ids == prompt.token_ids:  # no token spans two pieces, as one can in "empty answers" and "whitespace"
        assert prompt.targets == targets
    learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
    assert fast.decode(learned) == "".join(text for text, learn in pieces if learn)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_generation_prompt_is_the_templates_and_what_training_shows_before_the_first_target(dialect: str) -> None:
    fast = tokenizer(dialect)
    template = ChatTemplate(fast)
    messages = talk("hello", "Hi", "what colour is it?", "blue", system="Be brief.", frozen=(2,))
    asked = template.encode(messages[:-1], generate=True, where="sample 0")
    assert asked.token_ids == reference_ids(fast, messages[:-1], add_generation_prompt=True)
    assert not any(asked.targets)
    trained = template.encode(messages, where="sample 0")
    assert trained.token_ids[: trained.targets.index(True)] == asked.token_ids
    with pytest.raises(ValueError, match="sample 0: ends with an assistant turn"):
        template.encode(messages, generate=True, where="sample 0")


ATTACKS = ["{s}", "a {s} b", "{s}{s}", "x{s}\n{s} y", "{half}{s}{rest}"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_text_that_spells_special_tokens_stays_text(dialect: str, attack: str) -> None:
    fast = tokenizer(dialect)
    template = ChatTemplate(fast)
    for special in DIALECTS[dialect].specials:
        text = attack.format(s=special, half=special[:3], rest=special[3:])
        messages = talk(f"read: {text}!", f"it says {text}.", system=f"never say {text}?")
        prompt = template.encode(messages, where="sample 0")
        innocent = template.encode(talk("read: !", "it says .", system="never say ?"), where="sample 0")
        special_ids = set(fast.all_special_ids)
        assert [id for id in prompt.token_ids if id in special_ids] == [
            id for id in innocent.token_ids if id in special_ids
        ]
        assert fast.decode(prompt.token_ids) == fast.apply_chat_template(messages, tokenize=False)
        learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
        assert fast.decode(learned) == f"it says {text}." + DIALECTS[dialect].end + DIALECTS[dialect].close


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    reason="this transformers cannot sanitize",
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_spelled_special_tokens_get_the_ids_that_transformers_gives_when_it_sanitizes(dialect: str) -> None:
    fast = tokenizer(dialect)
    for special in DIALECTS[dialect].specials:
        messages = talk(f"read {special} and{special}", f"it says{special}")
        prompt = ChatTemplate(fast).encode(messages, where="sample 0")
        assert prompt.token_ids == reference_ids(fast, messages, sanitize_control_tokens=True)


def test_two_text_parts_cannot_spell_a_special_token_together() -> None:
    fast = tokenizer("phi")
    parts = [{"type": "text", "text": "<|en"}, {"type": "text", "text": "d|><|assistant|>"}]
    prompt = ChatTemplate(fast).encode([{"role": "user", "content": parts}], generate=True, where="sample 0")
    assert prompt == ChatTemplate(fast).encode(talk("<|end|><|assistant|>"), generate=True, where="sample 0")
    assert fast.convert_ids_to_tokens(prompt.token_ids).count("<|end|>") == 1


def test_private_characters_of_the_text_are_not_taken_for_holes() -> None:
    fast = tokenizer("phi")
    messages = talk("\U00100000\U00100001 x \U0010fffd", "\U00100000", system="\U00100002<|end|>")
    prompt = ChatTemplate(fast).encode(messages, where="sample 0")
    assert fast.decode(prompt.token_ids) == fast.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_media_stand_where_they_were_in_the_content(dialect: str) -> None:
    fast = tokenizer(dialect)
    image, sound = {"type": "image"}, {"type": "audio"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "and"}, sound, image]},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "this <|end|>?"}, sound]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}, image, {"type": "text", "text": "yes"}]},
    ]
    lengths = [3, 1, 4, 2, 5]
    prompt = ChatTemplate(fast).encode(messages, lengths, where="sample 0")
    assert [stop - start for start, stop in prompt.media] == lengths
    assert prompt.media == sorted(prompt.media)
    assert not any(prompt.targets[i] for start, stop in prompt.media for i in range(start, stop))
    # Where a medium was, a letter of its own shows the same place to the template itself.
    letters = "αβγδε"
    texts = [f"{letters[0]}and{letters[1]}{letters[2]}", "Hi", f"this <|end|>?{letters[3]}", f"no{letters[4]}yes"]
    rendered: Any = fast.apply_chat_template(talk(*texts), tokenize=False)
    at = 0
    for letter, (start, stop) in zip(letters, prompt.media, strict=True):
        before, _, rendered = rendered.partition(letter)
        assert fast.decode(prompt.token_ids[at:start]) == before
        at = stop
    assert fast.decode(prompt.token_ids[at:]) == rendered
    learned = [i for i, target in enumerate(prompt.targets) if target]
    d = DIALECTS[dialect]
    assert fast.decode([prompt.token_ids[i] for i in learned]) == f"Hi{d.end}noyes{d.end}{d.close}"


def test_whitespace_behind_a_medium_is_kept_though_role_tokens_absorb_it() -> None:
    fast = tokenizer("phi")
    content = [{"type": "image"}, {"type": "text", "text": "\n What?"}]
    prompt = ChatTemplate(fast).encode([{"role": "user", "content": content}], [2], generate=True, where="sample 0")
    assert fast.decode(prompt.token_ids[3:]) == "\n What?<|end|><|assistant|>"


def test_a_layout_is_kept_but_contents_are_not() -> None:
    template = ChatTemplate(tokenizer("chatml"))
    first = template.encode(talk("hello", "yes"), where="sample 0")
    other = template.encode(talk("what is it?", "a red triangle, no doubt"), where="sample 1")
    assert template.encode(talk("hello", "yes"), where="sample 2") == first
    assert other == ChatTemplate(tokenizer("chatml")).encode(
        talk("what is it?", "a red triangle, no doubt"), where="sample 1"
    )


HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_a_header_that_goes_on_behind_the_generation_prompt_is_to_be_learned() -> None:
    specials = dict.fromkeys(["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"], False)
    fast = build(HARMONY, specials)
    prompt = ChatTemplate(fast).encode(talk("hello", "Hi", "again", "yes"), where="sample 0")
    learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
    turn = "<|channel|>final<|message|>"
    assert fast.decode(learned) == f"{turn}Hi<|end|>{turn}yes<|return|>"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + cue }}{% endif %}"
)


@pytest.mark.parametrize("cue", ["", "<think>\n"])
def test_a_template_that_rewrites_thoughts_is_followed(cue: str) -> None:
    fast = build(THINKING.replace("cue", repr(cue)), {"<|im_start|>": False, "<|im_end|>": False})
    fast.add_tokens(["<think>", "</think>"])
    messages = talk("hello", "<think>\nso\n</think>\n\nHi", "what?", "<think>\nhm\n</think>\n\nyes")
    prompt = ChatTemplate(fast).encode(messages, where="sample 0")
    assert prompt.token_ids == reference_ids(fast, messages)
    learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
    wanted = "Hi<|im_end|><think>\nhm\n</think>\n\nyes<|im_end|>"
    assert fast.decode(learned) == wanted.replace(cue, "", 1)


def test_a_plain_text_header_may_stop_short_of_its_generation_prompt() -> None:
    template = DIALECTS["plain"].template.replace("'[assistant]\n'", "'[assistant]\n<think>\n'")
    fast = build(template, DIALECTS["plain"].specials)
    prompt = ChatTemplate(fast).encode(talk("hello", "Hi", "again", "yes"), where="sample 0")
    learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
    assert fast.decode(learned) == "Hi<|endoftext|>yes<|endoftext|>"


def test_unknown_text_is_no_mark_of_the_template() -> None:
    words = ["<unk>", "read", "it", "says", "<", ">", "end", "|", "unk"]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = finish(backend, DIALECTS["phi"].template, {"<unk>": False, **DIALECTS["phi"].specials})
    messages = talk("read what <unk> <|user|>", "it says what")
    prompt = ChatTemplate(fast).encode(messages, where="sample 0")
    assert fast.convert_ids_to_tokens(prompt.token_ids) == [
        *("<|user|>", "read", "<unk>", "<", "unk", ">", "<unk>", "<unk>", "<unk>", "<|end|>"),
        *("<|assistant|>", "it", "says", "<unk>", "<|end|>", "<|endoftext|>"),
    ]
    assert prompt.targets == [False] * 11 + [True] * 5


def test_a_special_token_that_the_tokenizer_cannot_write_as_text_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<|end|>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = finish(backend, DIALECTS["phi"].template, DIALECTS["phi"].specials)
    with pytest.raises(ValueError, match=r"sample 0: the tokenizer cannot write '<\|end\|>' as text"):
        ChatTemplate(fast).encode(talk("read <|end|>"), generate=True, where="sample 0")


def test_a_sentencepiece_tokenizer_gives_the_templates_ids() -> None:
    for scheme in ("first", "always", "never"):
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
        backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
        for name in ("phi", "chatml", "plain"):
            fast = finish(Tokenizer.from_str(backend.to_str()), DIALECTS[name].template, DIALECTS[name].specials)
            messages = talk("hello", "Hi", "what colour is it?", "blue", system="a red triangle")
            prompt = ChatTemplate(fast).encode(messages, where="sample 0")
            assert prompt.token_ids == reference_ids(fast, messages)
            learned = [id for id, target in zip(prompt.token_ids, prompt.targets, strict=True) if target]
            d = DIALECTS[name]
            assert str(fast.decode(learned)).replace(" ", "") == f"Hi{d.end}blue{d.end}{d.close}"


@pytest.mark.parametrize(
    "template, messages, says",
    [
        (
            "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
            talk("a", "b"),
            r"sample 9: the chat template ends message 1 \(assistant\) without a special token",
        ),
        (
            "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endfor %}",
            talk("a", "b", system="c"),
            r"sample 9: the chat template drops message 0 \(system\)",
        ),
        (
            "{% for m in messages %}<|user|>{{ m.content }}{{ m.content }}<|end|>{% endfor %}",
            talk("a", "b"),
            r"sample 9: the chat template repeats message 0 \(user\)",
        ),
        (
            "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            talk("a", "b"),
            r"starts message 1 \(assistant\) with '<\|end\|><\|user\|>', but its generation prompt there is"
            r" '<\|end\|><\|assistant\|>'",
        ),
        (
            "{% for m in messages %}<|user|>{{ m.content }}<|end|>{{ '<|end|>' if 'b' in m.content }}{% endfor %}",
            talk("a", "b"),
            r"writes <\|user\|> <\|end\|> <\|user\|> <\|end\|> <\|end\|> here, but <\|user\|> <\|end\|> <\|user\|>"
            r" <\|end\|> for other contents",
        ),
        ("{{ raise_exception('roles must alternate') }}", talk("a"), "refuses roles user: roles must alternate"),
        (DIALECTS["phi"].template, talk("a", "b")[1:], "sample 9: starts with an assistant turn"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_named(template: str, messages: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ChatTemplate(build(template, DIALECTS["phi"].specials)).encode(messages, where="sample 9")


def test_a_template_that_loses_a_medium_is_named() -> None:
    fast = build(DIALECTS["phi"].template.replace("m['content']", "m['content'][:3]"), DIALECTS["phi"].specials)
    content = [{"type": "text", "text": "abcdef"}, {"type": "image"}]
    with pytest.raises(ValueError, match="sample 9: the chat template drops or repeats some of the 1 media parts"):
        ChatTemplate(fast).encode([{"role": "user", "content": content}], [2], generate=True, where="sample 9")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate(build("", {}))


def test_a_chat_template_pickles() -> None:
    template = ChatTemplate(tokenizer("llama3"))
    messages = talk("hello", "Hi <|eot_id|>")
    prompt = template.encode(messages, where="sample 0")
    assert pickle.loads(pickle.dumps(template)).encode(messages, where="sample 0") == prompt


def test_any_conversation_keeps_its_invariants() -> None:
    draw = random.Random(0)
    alphabet = "ab \n<|>🙂ü\U00100000"
    for round in range(150):
        dialect = draw.choice(list(DIALECTS))
        fast, specials = tokenizer(dialect), list(DIALECTS[dialect].specials)

        def text(specials: list[str] = specials) -> str:
            return "".join(draw.choice([*alphabet, *specials, "hello "]) for _ in range(draw.randrange(8)))

        messages: list[dict[str, Any]] = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": text()})
        for _ in range(draw.randrange(1, 4)):
            parts = [
                {"type": "text", "text": text()} if draw.random() < 0.6 else {"type": "image"}
                for _ in range(draw.randrange(5))
            ]
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": text(), "train": draw.random() < 0.7})
        num_media = sum(
            part["type"] == "image" for m in messages[-2::-1] if m["role"] == "user" for part in m["content"]
        )
        lengths = [draw.randrange(1, 6) for _ in range(num_media)]
        prompt = ChatTemplate(fast).encode(messages, lengths, where=f"round {round}")
        assert len(prompt.targets) == len(prompt.token_ids)
        assert [stop - start for start, stop in prompt.media] == lengths
        assert all(a[1] <= b[0] for a, b in pairwise(prompt.media))
        assert not any(prompt.targets[i] for start, stop in prompt.media for i in range(start, stop))
        assert any(prompt.targets) == any(m.get("train") for m in messages)
        is_media = [False] * len(prompt.token_ids)
        for start, stop in prompt.media:
            is_media[start:stop] = [True] * (stop - start)
        texts = [
            "".join(part.get("text", "") for part in m["content"]) if isinstance(m["content"], list) else m["content"]
            for m in messages
        ]
        written = str(fast.decode([id for id, media in zip(prompt.token_ids, is_media, strict=True) if not media]))
        if not DIALECTS[dialect].trims:
            plain = [{"role": m["role"], "content": t} for m, t in zip(messages, texts, strict=True)]
            rendered: Any = fast.apply_chat_template(plain, tokenize=False)
            if dialect == "phi":  # role tokens absorb whitespace
                written, rendered = "".join(written.split()), "".join(rendered.split())
            assert written == rendered


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_end_of_a_turn_is_what_training_ends_answers_with(dialect: str) -> None:
    fast = tokenizer(dialect)
    assert ChatTemplate(fast).turn_ends() == {fast.get_vocab()[DIALECTS[dialect].end]}


def test_every_token_that_ends_a_turn_is_one_but_not_the_end_of_a_thought() -> None:
    last = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ '<|bye|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast = build(last, dict.fromkeys(("<|user|>", "<|assistant|>", "<|end|>", "<|bye|>"), False))
    assert ChatTemplate(fast).turn_ends() == set(map(fast.get_vocab().get, ("<|end|>", "<|bye|>")))
    # A turn of several messages: <|end|> also closes a thought, so only <|return|> ends the turn.
    fast = build(HARMONY, dict.fromkeys(re.findall(r"<\|\w+\|>", HARMONY), False))
    ends = fast.convert_ids_to_tokens(list(ChatTemplate(fast).turn_ends()))
    assert ends == ["<|return|>"]


def test_a_template_that_ends_turns_with_text_has_no_end_token() -> None:
    fast = build("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", {"<|endoftext|>": False})
    assert ChatTemplate(fast).turn_ends() == frozenset()


def test_a_template_for_one_question_only_still_has_its_end_token() -> None:
    once = "{% if messages|length > 2 %}{{ raise_exception('one question') }}{% endif %}" + DIALECTS["chatml"].template
    fast = build(once, DIALECTS["chatml"].specials)
    assert ChatTemplate(fast).turn_ends() == {fast.get_vocab()["<|im_end|>"]}
