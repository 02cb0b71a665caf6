"""What is installed, what works, what is missing and how to get it: the content of `molora doctor`.

It is for broken installations, so it imports the libraries one by one, where it examines them, and reports what fails.
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType

import psutil
from packaging.requirements import Requirement

from molora.config import ConfigError
from molora.plugins import Kind, available, resolve
from molora.terminal import Finding, console, print_findings

# For these the right version is not enough: their compiled parts must fit each other, or they import those that do.
_IMPORTED = {
    **{name: name for name in ("torch", "torchvision", "torchaudio", "timm", "peft", "huggingface_hub")},
    "transformers": "transformers.models.llama.modeling_llama",  # its other imports wait until a model is used
}


def main() -> int:
    """Examines and prints within 80 columns. Returns the exit code: 1 if something is bad, else 0."""
    with console.status("importing the libraries"):
        findings = examine()
    return int(not print_findings("what", findings))


def examine() -> list[Finding]:
    """Everything that `molora doctor` looks at, in the order it is shown. What molora can work without is not wrong."""
    return [_python(), *_molora(), *_machine(), *_hub(), *_plugins("modality"), *_plugins("router")]


def libraries(lines: Iterable[str], extras: Iterable[str]) -> Iterator[Finding]:
    """One finding for each requirement of a package, its lines and extras as in the package's metadata."""
    requirements = [Requirement(line) for line in lines]
    core = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    yield from (_library(each) for each in core)
    for extra in extras:
        added = (each for each in requirements if each not in core and each.marker is not None)
        yield from (_library(each, extra) for each in added if each.marker and each.marker.evaluate({"extra": extra}))


def _python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if good else "make the environment with another Python, such as: make PYTHON=python3.12 setup"
    return Finding("Python", platform.python_version(), good, "3.11 to 3.13", remedy=remedy)


def _molora() -> Iterator[Finding]:
    if found := _version("molora"):
        yield Finding("molora", found)
        installed = distribution("molora")
        extras = [extra for extra in installed.metadata.get_all("Provides-Extra") or [] if extra not in ("dev", "docs")]
        yield from libraries(installed.requires or [], extras)
    else:
        remedy = "its libraries cannot be examined; install it, in its checkout: pip install --editable ."
        yield Finding("molora", "not installed", False, "installed", remedy)


def _library(requirement: Requirement, extra: str = "") -> Finding:
    name, needed = requirement.name, str(requirement.specifier)
    install = f"pip install 'molora[{extra}]'" if extra else f"pip install '{name}{needed}'"
    found = _version(name)
    if not found:
        return Finding(name, "not installed", None if extra else False, needed, install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, found, False, needed, install)
    if name in _IMPORTED and isinstance(error := _import(_IMPORTED[name]), Exception):
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = _other_build() or f"{install} --force-reinstall"
        return Finding(name, f"{found}, import fails: {why}", False, needed, remedy)
    return Finding(name, found, needed=needed)


def _version(name: str) -> str:
    """The installed version of a distribution, "" if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _import(name: str) -> ModuleType | Exception:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken library raises is the finding
        return error


def _other_build() -> str:
    """How to mend a companion of torch that was built for another torch, "" if there is none. The package registry's
    torchaudio needs CUDA libraries that a CPU build of torch does not have, and the models of transformers import
    torchaudio whenever it is installed; so one optional library breaks everything."""
    torch = _version("torch")
    build = torch.partition("+")[2]
    for companion in ("torchvision", "torchaudio"):
        release, _, its_build = _version(companion).partition("+")
        if torch and release and build != its_build:
            index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
            without = ", or do without it: pip uninstall torchaudio" if companion == "torchaudio" else ""
            wrong = f"{companion} {release} is the {its_build or 'registry'} build, but torch {torch} is not"
            return f"{wrong}; pip install --force-reinstall --no-deps {companion}=={release}{index}{without}"
    return ""


def _machine() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield Finding("memory", f"{_gib(memory.available)} free of {_gib(memory.total)}")
    yield Finding("disk", f"{_gib(disk.free)} free of {_gib(disk.total)} in {_short(Path.cwd())}")
    torch = _import("torch")
    if isinstance(torch, Exception):
        return
    cores = len(os.sched_getaffinity(0))
    has = torch.cpu.get_capabilities()
    instructions = next((name for name in ("avx512_f", "avx2") if has.get(name)), "no AVX2").replace("_f", "")
    native = "native" if has.get("avx512_bf16") or has.get("amx_bf16") else "emulated, slower than fp32"
    yield Finding("CPU", f"{cores} cores, {torch.get_num_threads()} threads, {instructions}; bf16 {native}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", f"none ({built}); the CPU is used")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        native = "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
        found = f"{device.name}, {_gib(device.total_memory)}, CUDA {torch.version.cuda}; bf16 {native}"
        yield Finding(f"GPU {index}", found)


def _hub() -> Iterator[Finding]:
    hub = _import("huggingface_hub.constants")
    if isinstance(hub, Exception):
        return
    folder = Path(hub.HF_HUB_CACHE)
    yield Finding("hub cache", _short(folder) + ("" if folder.is_dir() else " (nothing downloaded yet)"))
    if hub.HF_HUB_OFFLINE:
        remedy = "only models in the hub cache can be loaded by id; to download others: unset HF_HUB_OFFLINE"
        yield Finding("hub", "offline, HF_HUB_OFFLINE is set", None, remedy=remedy)
    else:
        yield Finding("hub", "online")


def _plugins(kind: Kind) -> Iterator[Finding]:
    for plugin in available(kind):
        what, found = f"{kind} {plugin.name}", f"{plugin.spec} ({plugin.origin})"
        try:
            resolve(kind, plugin.name)
        except ConfigError as error:
            yield Finding(what, found, False if plugin.origin == "built-in" else None, remedy=str(error))
        else:
            yield Finding(what, found)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _short(path: Path) -> str:
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
