"""What is free of a device's memory."""

from pathlib import Path

import psutil
import torch

from molora import memory
from molora.memory import free_bytes


def test_what_is_free_is_some_of_what_is_there() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < psutil.virtual_memory().total
    assert free_bytes(torch.device("meta")) > 2**60


def test_limits_of_containers_hold(tmp_path: Path) -> None:
    """Those of the group of the process and of all above it, less what is used and not just a copy of a file."""
    groups, own = tmp_path / "groups", tmp_path / "cgroup"
    for folder, limit, used, cached in (("", None, 900, 0), ("pod", "1000", 700, 0), ("pod/box", "500", 450, 300)):
        (groups / folder).mkdir(parents=True)
        if limit is not None:
            (groups / folder / "memory.max").write_text(f"{limit}\n")
        (groups / folder / "memory.current").write_text(f"{used}\n")
        (groups / folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file 7\n")
    own.write_text("0::/pod/box\n")
    assert [*memory._left_to_groups(groups, own)] == [350, 300]
    (groups / "pod" / "memory.max").write_text("max\n")
    assert [*memory._left_to_groups(groups, own)] == [350]
    own.write_text("4:memory:/pod/box\n")  # cgroup v1, in whose folders these files are not
    assert [*memory._left_to_groups(groups, own)] == []
    assert [*memory._left_to_groups(tmp_path / "none", tmp_path / "neither")] == []
