"""Putting a model together: from a recipe's description, from modality folders, or from a run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from molora.checkpoint.stock import read_dtype
from molora.config import ConfigError, build, plain
from molora.data.processor import Processor
from molora.media import MediaPolicy
from molora.modality import Modality
from molora.model.backbone import Backbone
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization
from molora.plugins import Finder, Found, find
from molora.routing import TEXT, RoutingError, check_part


@dataclass(kw_only=True)
class BackboneConfig:
    """A causal LM: `path` is a folder, a hub id, or `package:NAME` for the GGUF file in an installed Python package;
    `revision` is a branch, tag or commit on the hub. `dtype` casts its weights; by default they keep their stored
    dtype, those of a GGUF file fp32. `quantization` stores its linear layers, but for the head, in 4 bits (`nf4`) or 8
    (`int8`); they compute in the dtype, and encoders, projectors and adapters are what they are without."""

    path: str
    dtype: str | None = None
    revision: str | None = None
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            self.dtype = str(read_dtype(self.dtype)).removeprefix("torch.")
        if self.quantization not in (known := get_args(Quantization)):
            raise ValueError(f"quantization: {self.quantization!r:.80} is none; give one of {', '.join(known)}")


@dataclass(kw_only=True)
class ModalityConfig:
    """A modality: a plugin with its options and its adapter's LoraConfig options, or a saved folder (`path`). Under the
    plugin "text" there is an adapter and nothing else: text alone runs with it where a rule of the router says so."""

    plugin: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.plugin is None):
            raise ValueError("give either plugin (to make one) or path (to load one)")


@dataclass(kw_only=True)
class RouterConfig:
    """The router plugin and its options; or the run (`path`) whose router it is, with what that has learned."""

    plugin: str = "table"
    options: dict[str, Any] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class Blueprint:
    """A modality before its weights: the plugin's spec and the hash of its code as folders record them, the weightless
    plugin (None of an adapter for text), its adapter's config, and where all this is written."""

    plugin: str
    modality: Modality | None
    adapter: LoraConfig | None
    where: str = ""
    plugin_sha256: str | None = None


@dataclass(frozen=True)
class RouterPlan:
    """A router before it knows its adapters: its class, and its options."""

    found: Found
    options: Mapping[str, Any]


# Options that pictures and clips had once, and what says it now.
FORMER_OPTIONS = {
    "allow_urls": "where media may come from is the caller's to say: write `allow_urls` at the top of the recipe",
    "media_root": "a data set's folder belongs to the data set: write `media_root` into the options of the data source",
}


def blueprint(
    name: str,
    plugin: str,
    options: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
    where: str,
    *,
    saved: bool = False,
    find: Finder = find,
) -> Blueprint:
    """Finds a plugin with `find` and reads its options. Those of a `saved` modality may hold what was an option when it
    was saved and is the caller's to say now; that is left out. Raises ConfigError, and the plugin's own errors."""
    adapter_config = None if adapter is None else lora_config(adapter, f"{where}.adapter")
    if plugin == TEXT:
        if options:
            raise ConfigError(f"{where}.options: plugin {TEXT!r} has none, as it reads no media; take them out")
        if adapter is None and not saved:
            raise ConfigError(f"{where}.adapter: missing, and plugin {TEXT!r} is nothing but an adapter; give one")
        try:
            check_part(name)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        return Blueprint(TEXT, None, adapter_config, where)
    if name == TEXT:
        raise ConfigError(f"{where}: {name!r} is what rules call samples without media; take another name")
    try:
        found = find("modality", plugin)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    modality_class: Any = found.plugin
    known = getattr(modality_class.config_type, "__dataclass_fields__", {})
    former = [key for key in FORMER_OPTIONS if key in options and key not in known]
    if former and not saved:
        key = former[0]
        raise ConfigError(f"{where}.options.{key}: is no option of a modality any more; {FORMER_OPTIONS[key]}")
    options = {key: value for key, value in options.items() if key not in former}
    config = build(modality_class.config_type, options, f"{where}.options")
    try:
        modality = modality_class(name, config)
        for part in (name, *modality.projectors()):
            check_part(part)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_option_in(error, config, where) or where}: {error}") from error
    return Blueprint(found.spec, modality, adapter_config, where, found.sha256)


def router_plan(router: RouterConfig, where: str = "router", find: Finder = find) -> RouterPlan:
    """Finds a router with `find`; `where` is where it is written. Raises ConfigError."""
    try:
        return RouterPlan(find("router", router.plugin), router.options)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error


def modality_types(blueprints: Mapping[str, Blueprint]) -> dict[str, str]:
    """The modalities by the types of the parts that they answer to. Raises ConfigError for two that answer to one."""
    part_types: dict[str, str] = {}
    for name, plan in blueprints.items():
        if plan.modality is None:
            continue
        part_type = plan.modality.part_type
        other = part_types.setdefault(part_type, name)
        if other != name:
            raise ConfigError(
                f"{plan.where}: modality {name!r} answers to parts of type {part_type!r}, and so does {other!r} "
                f"({blueprints[other].where}); keep one of them, or give the plugin of one another part_type"
            )
    return part_types


def build_router(planned: RouterPlan, blueprints: Mapping[str, Blueprint], width: int, where: str) -> Any:
    """The router of a plan for the adapters there are and a backbone of this width; `where` is where it is written.
    Raises ConfigError and RoutingError."""
    router_class: Any = planned.found.plugin
    try:
        options = build(router_class.config_type, planned.options, "options")
        router = router_class([name for name, plan in blueprints.items() if plan.adapter is not None], options, width)
        media = {name for name, plan in blueprints.items() if plan.modality is not None}
        if wrong := sorted(router.adapters(frozenset()) & media):
            told = f"text alone would run with the adapters of {wrong}, which are for media"
            raise RoutingError(f"{told}; give it an adapter that was made for it, as `plugin: {TEXT}`, or none")
    except (ConfigError, RoutingError) as error:
        raise type(error)(f"{where}: {error}") from error
    return router


def _option_in(error: Exception, config: Any, where: str) -> str | None:
    """The key of the option whose text an error repeats, such as the path of a file that is missing."""

    def texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str) and len(value) > 1 and value in str(error):
            yield value, key
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for name, item in inner:
            yield from texts(item, f"{key}.{name}")

    return max(texts(plain(config), f"{where}.options"), key=lambda found: len(found[0]), default=("", None))[1]


def assemble(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    blueprints: Mapping[str, Blueprint],
    router: RouterConfig | RouterPlan,
    *,
    seed: int = 0,
    where: str = "router",
    policy: MediaPolicy | None = None,
) -> tuple[MoLoRA, Processor]:
    """Builds model and processor, which share modalities, their order and the router's order of samples. `where` is
    where the router is written. Raises ConfigError for two modalities that answer to one part type, RoutingError for a
    router that does not fit the modalities."""
    modality_types(blueprints)
    modalities = {name: plan.modality for name, plan in blueprints.items() if plan.modality is not None}
    adapters = {name: plan.adapter for name, plan in blueprints.items() if plan.adapter is not None}
    planned = router if isinstance(router, RouterPlan) else router_plan(router, where)
    decide = build_router(planned, blueprints, backbone.width, where)
    try:
        model = MoLoRA(backbone, modalities, adapters, decide, seed=seed)
    except OSError as error:
        keys = (_option_in(error, each.config, blueprints[name].where) for name, each in modalities.items())
        if key := next(filter(None, keys), None):
            raise ConfigError(f"{key}: {error}") from error
        raise
    longest, known_ids = backbone.max_tokens, backbone.num_embeddings
    return model, Processor(tokenizer, modalities, decide.order, longest, policy, known_ids)
