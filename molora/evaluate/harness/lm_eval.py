"""molora as a model of lm-eval, EleutherAI's harness for language models.

lm-eval knows the models that were imported before it starts, so this file is also its command line with molora known:

    python -m molora.evaluate.harness.lm_eval run --model molora --model_args run=runs/demo --tasks hellaswag
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

# lm-eval finds its own models only as long as it knows none.
import lm_eval.models  # noqa: F401 # pyright: ignore[reportMissingImports]
import torch
from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from molora.checkpoint.opening import model_hashes
from molora.evaluate.harness.asking import Asked, generation_config, open_model, replies, warn_of_unread
from molora.inference.likelihood import continued
from molora.pack import Sample
from molora.terminal import progress, warn

# As lm-eval's own models have it, for tasks that do not say how long answers are.
_MAX_NEW_TOKENS = 256


@register_model("molora")
class LmEvalModel(TemplateLM):
    """The text side of a run, or of a backbone: its scores are those that lm-eval's `hf` gives the backbone alone.

    Arguments: `run`, a run folder or a backbone; `modalities` and `trust`, names apart by colons; `dtype`, `device`.
    Requests are packed by their tokens, so `--batch_size` says nothing.
    """

    def __init__(
        self,
        run: str,
        modalities: str | None = None,
        trust: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # what lm-eval says where its user says nothing
        self.loaded = open_model(run, modalities, trust, dtype, device)
        self.tokenizer: Any = self.loaded.processor.tokenizer
        self.max_length = self.loaded.model.backbone.max_tokens
        self._device = self.loaded.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        return {"molora": model_hashes(self.loaded.layout)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds, unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The last token needs no room in the backbone: it is only predicted.
        contexts = self._shortened(
            [(context, self.max_length + 1 - len(continuation)) for _, context, continuation in requests]
        )
        samples = (
            continued(f"request {index}", context, continuation)
            for index, (context, (_, _, continuation)) in enumerate(zip(contexts, requests, strict=True))
        )
        found: list[tuple[float, bool]] = []
        with progress(shown=not disable_tqdm) as bars:
            bar = bars.add_task("loglikelihood", total=len(requests), note="")
            for (texts, _, _), scored in zip(requests, self.loaded.scored(samples), strict=True):
                assert scored.likelihood is not None  # an error would have been raised
                found.append((scored.likelihood.log_probability, scored.likelihood.is_greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
                bars.advance(bar)
        return found

    def _shortened(self, contexts: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """Contexts without what does not fit of their beginnings, as lm-eval's own models cut them; each with the
        tokens that there is room for. Raises ValueError where there is none."""
        longest = max((len(context) - room for context, room in contexts), default=0)
        if any(room < 1 for _, room in contexts):
            raise ValueError(f"a request has no room for its context: {self.max_length} tokens fit, with the answer")
        if longest > 0:
            count = sum(len(context) > room for context, room in contexts)
            fit = f"{self.max_length} tokens fit, with the answer"
            warn(f"{count} contexts were cut at their beginning, the longest by {longest} tokens: {fit}")
        return [context[-room:] for context, room in contexts]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Every text in windows as long as the context: each token is predicted once, from as much as fits before."""
        windows: list[tuple[None, list[int], list[int]]] = []
        places: list[int] = []
        for place, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                places.append(place)
        sums = [0.0] * len(requests)
        for place, (log_probability, _) in zip(places, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[place] += log_probability
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        warn_of_unread(request.args[1] for request in requests)
        configs = [generation_config(request.args[1], _MAX_NEW_TOKENS) for request in requests]
        contexts = self._shortened(
            [
                (self.tok_encode(request.args[0]), self.max_length - config.max_new_tokens)
                for request, config in zip(requests, configs, strict=True)
            ]
        )
        asked = [
            Asked(f"request {index}", partial(Sample.of_text, f"request {index}", context), config)
            for index, (context, config) in enumerate(zip(contexts, configs, strict=True))
        ]
        texts = [reply.text for reply in replies(self.loaded, asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


if __name__ == "__main__":
    cli_evaluate()
