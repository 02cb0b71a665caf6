"""The examples for clusters: what they start is started here, loses a process, is taken away and put back."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from torch.distributed.run import get_args_parser

from molora.config import dump
from tests.train.test_train import free_port, home, in_processes, outcome, recipe  # noqa: F401

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"

# Stand-ins for Slurm's commands on one machine: `srun` starts what it is given, in a session of its own.
STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\necho $$ > "$STEP"\nexec setsid "$@"\n',
    "scontrol": 'case $1 in show) echo localhost;; requeue) echo "$2" >> "$REQUEUED";; esac\n',
}


def test_the_job_for_kubernetes_starts_what_there_is() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "train.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    launcher, *arguments = container["command"]
    given = get_args_parser().parse_args(arguments)
    assert launcher == "torchrun" and given.module and given.training_script == "molora"
    assert given.training_script_args == ["train", "/recipe/recipe.yaml"]
    assert given.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert int(given.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    host = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    assert given.rdzv_endpoint == f"{host}:29500" and service["metadata"]["name"] == host.partition(".")[2]
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    dockerfile = (CLUSTER.parents[1] / "Dockerfile").read_text()
    assert f"docker build --target cuda --tag {container['image']} ." in dockerfile
    assert f"--uid {job['spec']['template']['spec']['securityContext']['fsGroup']} " in dockerfile


def test_the_script_for_slurm_is_bash_without_a_mistake() -> None:
    script = CLUSTER / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(script)], check=True)


def wait_until(so: Callable[[], bool], process: subprocess.Popen[bytes], told: Path) -> None:
    for _ in range(12_000):
        assert process.poll() is None, told.read_text()[-3000:]
        if so():
            return
        time.sleep(0.05)
    raise AssertionError(told.read_text()[-3000:])


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid of util-linux")
def test_a_job_of_slurm_that_loses_a_process_and_is_taken_away_ends_as_if_it_had_not(
    home: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    def of(name: str) -> Path:
        config = recipe(home, tmp_path / name, evaluations={}, save_every_steps=3)
        config.stages[1].steps, config.stages[1].samples_per_step = 60, 2
        (tmp_path / f"{name}.yaml").write_text(dump(config))
        return tmp_path / f"{name}.yaml"

    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    step, requeued, told = tmp_path / "step", tmp_path / "requeued", tmp_path / "told"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # as the run beside it has
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7"},
        "SLURM_CPUS_PER_TASK": "1",
        **{"SLURM_JOB_END_TIME": str(int(time.time()) + 100), "MASTER_PORT": str(free_port())},
        **{"STEP": str(step), "REQUEUED": str(requeued)},
    }
    command = shlex.join(["bash", str(CLUSTER / "train.sbatch"), str(of("job"))])
    log = tmp_path / "job/metrics.jsonl"

    def rows() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    with open(told, "wb") as file:
        job = subprocess.Popen(command, shell=True, env=environment, stdout=file, stderr=file)
        try:
            wait_until(lambda: rows() > 8, job, told)
            launcher = psutil.Process(int(step.read_text()))
            first = launcher.children()
            first[1].send_signal(signal.SIGKILL)
            wait_until(lambda: not any(rank.is_running() for rank in first), job, told)
            wait_until(lambda: len(launcher.children()) == 2 and rows() > 20, job, told)
            # As Slurm does: to every process of the step, and the launcher passes it on as well.
            os.killpg(launcher.pid, signal.SIGUSR1)
            for rank in launcher.children():
                rank.send_signal(signal.SIGUSR1)
            assert job.wait(300) == 0, told.read_text()[-3000:]
        finally:
            job.kill()
        assert requeued.read_text() == "7\n"
        said = " ".join(told.read_text().split())
        assert said.count("stopped by SIGUSR1 after step") == 1
        assert "start it again as you did, in 2 processes, and it goes on" in said
        done = rows()
        assert 20 < done < 65
        subprocess.run(command, shell=True, env=environment, stdout=file, stderr=file, check=True, timeout=600)
    in_processes(of("straight"))
    ours, expected = outcome(tmp_path / "job"), outcome(tmp_path / "straight")
    for key in expected:
        assert ours[key] == expected[key], key
