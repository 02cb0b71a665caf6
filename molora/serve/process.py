"""The serving process: from a model to an exit code."""

import asyncio
import copy
import errno
import json
import logging
import math
import os
import resource
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import uvicorn
from fastapi import FastAPI

from molora.checkpoint.opening import ModelPlan
from molora.checkpoint.pretrained import fetch
from molora.config import ConfigError
from molora.data.processor import Processor
from molora.inference.generate import GenerationConfig
from molora.inference.grammar import Grammars
from molora.inference.load import LoadedModel
from molora.media import MediaPolicy
from molora.serve.app import make_app
from molora.serve.connections import bounded
from molora.serve.engine import Engine
from molora.serve.gate import Keys
from molora.serve.metrics import Metrics
from molora.serve.preparation import Preparation, PreparationLimits
from molora.serve.request import Service
from molora.serve.tool_calls import writes_calls
from molora.serve.upstream import Selection, Upstream, find_upstream, make_passing_app
from molora.terminal import say, warn

# Of the memory that is free once the model is there, what keys and values take at most unless their size is given.
_SHARE_FOR_KEYS_AND_VALUES = 0.5
# Files that are open beside connections, at most.
_OTHER_FILES = 128
# Tokens of prompts in a step, by device, and how many chunks of a long prompt they make: so few tokens that answers
# under way, and those who ask then, do not wait long, and not much slower to read than more at a time.
_PREFILL_TOKENS = {"cpu": 256, "cuda": 512}
_CHUNKS_IN_STEP = {"cpu": 4, "cuda": 1}
_LOOPBACK = ("127.0.0.1", "::1", "[::1]", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and to whom a model is served, and within which limits. Sizes of None follow from the machine.

    Media that a request names by URL come from `media_hosts`, patterns as in `MediaPolicy`, by HTTPS alone unless
    `media_http` is set.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str
    api_keys: Path | None = None
    max_running_samples: int = 16
    max_waiting: int = 64
    kv_cache_gib: float | None = None
    prefill_tokens: int | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    answer_seconds: float = 600.0
    max_body_mib: float = 32.0
    max_connections: int = 512
    client_seconds: float = 60.0
    media_hosts: tuple[str, ...] = ()
    media_http: bool = False
    media_private_addresses: bool = False
    media: PreparationLimits = field(default_factory=PreparationLimits)

    def __post_init__(self) -> None:
        for name in ("answer_seconds", "max_body_mib", "client_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} cannot be {getattr(self, name)}; give a finite number above 0")
        for host in self.media_hosts:
            if not host or set(host) & set("/@?# "):
                told = f"--media-host {host!r} is no host; give its name alone, such as example.org"
                raise ValueError(f"{told}, *.example.org or example.org:8443")
        for name in ("media_http", "media_private_addresses"):
            if getattr(self, name) and not self.media_hosts:
                told = f"--{name.replace('_', '-')} says how hosts are asked, and none may be"
                raise ValueError(f"{told}; give --media-host HOST, or leave it out")


def serve(load: Callable[[], LoadedModel], config: ServeConfig) -> int:
    """Serves a model until a signal ends it; the exit code. SIGTERM or Ctrl-C lets running answers finish, a second one
    does not."""
    generation = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        max_running_samples=config.max_running_samples,
        kv_cache_gib=config.kv_cache_gib,
    )
    gate, listening = _opened(config)
    loaded = load()
    # Before there are other threads, as processes are forked from this one.
    preparation = Preparation(_as_served(loaded, config), config.media)
    server: _Server | None = None

    def failed() -> None:
        logging.getLogger("molora.serve").error("the model has failed", exc_info=engine.failure)
        assert server is not None, "a model fails while it is served"
        server.should_exit = True

    engine = Engine(loaded, _sized(generation, loaded, config.prefill_tokens), config.max_waiting, failed)
    backbone = loaded.model.backbone
    service = Service(
        config.name,
        loaded,
        engine,
        preparation,
        Metrics(engine),
        Grammars(copy.deepcopy(loaded.processor.tokenizer), backbone.stop_ids, backbone.vocab_size),
        reads_calls=writes_calls(loaded.processor),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        answer_seconds=config.answer_seconds,
    )
    server = _server(make_app(service, **gate), config, lambda: _announce(service, config, listening))
    asyncio.run(server.serve(sockets=[listening]))
    preparation.close()
    return 0 if engine.failure is None else 1


def serve_upstream(plan: Callable[[], ModelPlan], url: str, key_variable: str | None, config: ServeConfig) -> int:
    """Serves a model whose weights the server at `url` has, until a signal ends it; the exit code. Nothing of the model
    but its descriptions is read. `key_variable` is the environment variable that holds that server's key. Raises
    FileNotFoundError for a backbone that is not there."""
    gate, listening = _opened(config)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request is there already
    planned = plan()
    if planned.run is None:  # a run is there, and has a record of its backbone
        fetch(planned.backbone.path, weights=False)
    selection = Selection.of(planned, config.name, _policy(config))
    most = config.max_running_samples + config.max_waiting
    upstream = find_upstream(url, key_variable, selection.adapters, most, config.answer_seconds)
    app = make_passing_app(selection, upstream, **gate)
    server = _server(app, config, lambda: _announce_upstream(selection, upstream, config, listening))
    asyncio.run(server.serve(sockets=[listening]))
    return 0


def _opened(config: ServeConfig) -> tuple[dict[str, Any], socket.socket]:
    """The settings of the gate and the socket behind it, before anything is loaded, and the log."""
    keys = None if config.api_keys is None else Keys(config.api_keys)
    listening = listen(config)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    gate = {
        "keys": keys,
        "hosts": _LOOPBACK if config.host in _LOOPBACK and keys is None else None,
        "max_body_bytes": int(config.max_body_mib * 2**20),
        "client_seconds": config.client_seconds,
    }
    return gate, listening


def _server(app: FastAPI, config: ServeConfig, began: Callable[[], None]) -> "_Server":
    def draining() -> None:
        app.state.draining = True

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http=bounded(config.client_seconds, config.max_connections),
        # A client that does not read must not keep the server alive.
        timeout_graceful_shutdown=math.ceil(config.answer_seconds + config.client_seconds),
    )
    return _Server(settings, began, draining)


class _Server(uvicorn.Server):
    """Tells when it serves, and ends as a signal says: the first drains it, the second stops it."""

    def __init__(self, config: uvicorn.Config, began: Callable[[], None], draining: Callable[[], None]) -> None:
        super().__init__(config)
        self._began = began
        self._draining = draining

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._began()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            warn(f"stopped by a second {signal.Signals(sig).name}; answers under way are lost")
            os._exit(128 + sig)
        self.should_exit = True
        self._draining()


def listen(config: ServeConfig) -> socket.socket:
    """The socket that a server listens on. Raises ConfigError for more connections than this process may have, OSError
    for an address that is not to be had."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and config.max_connections + _OTHER_FILES > files:
        told = f"--max-connections {config.max_connections}: this process may have {files} files open, and needs"
        raise ConfigError(f"{told} {_OTHER_FILES} more than connections; give fewer, or raise the limit: ulimit -n")
    if config.host not in _LOOPBACK and config.api_keys is None:
        warn(f"everybody who reaches {config.host} may ask, as there are no keys; give --api-keys FILE")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]  # the address is told already
        told = f"{config.host}:{config.port} cannot be listened on: {why}"
        of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        advice = "--port, or --port 0 for any that is free" if of_port else "--host, such as 127.0.0.1 or 0.0.0.0"
        raise OSError(f"{told}; give another {advice}") from error
    # Connections inherit it. asyncio does not set it on these, and each stream would wait 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _as_served(loaded: LoadedModel, config: ServeConfig) -> Processor:
    """The model's processor for requests of strangers: no local files, URLs as the server is told, and nothing larger
    than a body."""
    processor = copy.copy(loaded.processor)
    processor.media_policy = _policy(config)
    return processor


def _policy(config: ServeConfig) -> MediaPolicy:
    return MediaPolicy(
        allow_urls=bool(config.media_hosts),
        hosts=config.media_hosts,
        https_only=not config.media_http,
        allow_private_addresses=config.media_private_addresses,
        allow_paths=False,
        max_file_bytes=int(config.max_body_mib * 2**20),
        deadline_seconds=config.media.seconds / 2,
    )


def _sized(generation: GenerationConfig, loaded: LoadedModel, prefill_tokens: int | None) -> GenerationConfig:
    """With what follows from the machine where it is not given."""
    device = "cuda" if loaded.model.device.type == "cuda" else "cpu"
    prefill_tokens = prefill_tokens or _PREFILL_TOKENS[device]
    return replace(
        generation,
        prefill_tokens=prefill_tokens,
        chunk_tokens=math.ceil(prefill_tokens / _CHUNKS_IN_STEP[device]),
        kv_cache_gib=generation.kv_cache_gib or _room(loaded, generation.max_running_samples),
    )


def _room(loaded: LoadedModel, num_samples: int) -> float:
    """GiB for the keys and values of so many samples of any length, as far as memory allows."""
    backbone = loaded.model.backbone
    kept = backbone.kept_layers()
    needed = kept.num_bytes(num_samples * kept.pages_for(backbone.max_tokens), num_samples)
    on_cuda = loaded.model.device.type == "cuda"
    free = torch.cuda.mem_get_info(loaded.model.device)[0] if on_cuda else psutil.virtual_memory().available
    return min(needed, int(free * _SHARE_FOR_KEYS_AND_VALUES)) / 2**30


def _announce(service: Service, config: ServeConfig, listening: socket.socket) -> None:
    model, pool = service.loaded.model, service.engine.batch.pool
    address = _address(listening)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    tokens = pool.num_pages * pool.kept.page_tokens
    say(f"{address} serves {', '.join(service.names.known)}")
    say(f"weights {weights / 2**30:.2f} GiB; keys and values {pool.num_bytes / 2**30:.2f} GiB, for {tokens:,} tokens")
    say(f"chat {address}/")
    say(f"metrics {address}/metrics, API {address}/docs")
    _show_curl(address, config)


def _announce_upstream(selection: Selection, upstream: Upstream, config: ServeConfig, listening: socket.socket) -> None:
    address = _address(listening)
    say(f"{address} serves {', '.join(selection.names.known)}")
    passed = ", ".join(f"{adapter or 'no adapter'} as {model}" for adapter, model in upstream.models.items())
    say(f"requests go to {upstream.url}: {passed}")
    say(f"metrics {address}/metrics")
    _show_curl(address, config)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _show_curl(address: str, config: ServeConfig) -> None:
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    asked = json.dumps({"model": config.name, "messages": [{"role": "user", "content": "Hello"}]})
    command = f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(asked)}"
    print(command, flush=True)  # in one piece, so that it can be copied
