"""Uses an installed wheel as a stranger would; `make wheel-test` runs it with the Python of a clean environment."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def only_molora_was_added() -> None:
    """Nothing but the package, its metadata and the command: not `encoders`, `routers` or `tests`."""
    files = importlib.metadata.files("molora")
    assert files, "the wheel has no record of its files"
    outside = {file.parts[0] for file in files if file.parts[0] != ".."}
    version = importlib.metadata.version("molora")
    assert outside == {"molora", f"molora-{version}.dist-info"}, f"site-packages gained {sorted(outside)}"
    assert {file.name for file in files if file.parts[0] == ".."} == {"molora"}, "only the command goes to bin"


def it_imports_from_site_packages() -> None:
    import molora
    import molora.encoders
    import molora.routers

    for package in (molora, molora.encoders, molora.routers):
        assert Path(str(package.__file__)).is_relative_to(sys.prefix), f"{package.__file__} is not the installed one"
    for name in (
        *("py.typed", "report/report.html.j2", "plugin_kit/templates/modality.py.j2", "configs/easy_vqa.yaml"),
        *("serve/web/chat.html", "serve/web/chat.js", "serve/web/icon.svg"),
    ):
        assert (Path(str(molora.__file__)).parent / name).is_file(), f"{name} is not in the wheel"


def the_command_helps() -> None:
    command = Path(sys.executable).with_name("molora")
    for call in ([command, "--help"], [sys.executable, "-m", "molora", "--help"]):
        shown = subprocess.run(call, capture_output=True, text=True)
        assert shown.returncode == 0, f"{call} exits {shown.returncode}:\n{shown.stderr}"
        assert "train" in shown.stdout, f"{call} does not list `train`:\n{shown.stdout}"


def it_trains_and_answers() -> None:
    """A tiny backbone made here, a recipe of two steps, and an answer from the run it writes."""
    import molora
    from molora.testing import save_backbone

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        save_backbone(home / "backbone")
        question = {
            "role": "user",
            "content": [{"type": "numbers", "numbers": [1.0, 2.0]}, {"type": "text", "text": "?"}],
        }
        row = {"messages": [question, {"role": "assistant", "content": "3"}]}
        (home / "rows.jsonl").write_text(json.dumps(row))
        adapter = {"r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj"]}
        recipe = {
            "run": "run",
            "backbone": {"path": "backbone"},
            "modalities": {"numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter}},
            "stages": [
                {
                    "name": "tune",
                    "train": {"adapters": {"learning_rate": 1e-3}, "projectors": {"learning_rate": 1e-3}},
                    "data": {"rows": {"kind": "messages", "options": {"path": "rows.jsonl"}}},
                    "steps": 2,
                    "samples_per_step": 2,
                }
            ],
        }
        (home / "recipe.yaml").write_text(json.dumps(recipe))
        command = Path(sys.executable).with_name("molora")
        for call in (["train", "recipe.yaml"], ["generate", "run", "hello", "--max-new-tokens", "3"]):
            done = subprocess.run([command, *call], cwd=home, capture_output=True, text=True)
            assert done.returncode == 0, f"{call} exits {done.returncode}:\n{done.stderr}"
        answer = molora.load(home / "run").generate([question], molora.GenerationConfig(max_new_tokens=3))
        assert isinstance(answer, str)


if __name__ == "__main__":
    for check in (only_molora_was_added, it_imports_from_site_packages, the_command_helps, it_trains_and_answers):
        check()
        print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)
