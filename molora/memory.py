"""What is free of a device's memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Where Linux shows the groups of processes (cgroup v2), and the group of this one.
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken: of a GPU with what torch holds there and does not use; of the machine's memory as
    far as the limits of containers allow. A device without values has room for anything."""
    if device.type == "meta":
        return sys.maxsize
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, min([psutil.virtual_memory().available, *_left_to_groups(_GROUPS, _OWN_GROUP)]))


def _left_to_groups(groups: Path, own_group: Path) -> Iterator[int]:
    """What is left below each limit that holds for this process; files that can be given up at once count as left."""
    own = next((line[3:] for line in _lines(own_group) if line.startswith("0::")), "/")
    folder = groups / own.lstrip("/")
    while folder.is_relative_to(groups):
        limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
        if used and limit and limit[0] != "max":
            cached = (line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith("inactive_file "))
            yield int(limit[0]) - int(used[0]) + int(next(cached, 0))
        folder = folder.parent


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
