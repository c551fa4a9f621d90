"""Each notebook runs from top to bottom in a fresh kernel and an empty folder, with few steps."""

import json
from pathlib import Path

import pytest

from conftest import draw_pairs

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))


def run(name, folder, monkeypatch, **settings):
    """The text that each code cell printed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout") for cell in cells
    ]


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_committed_without_outputs(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.slow
def test_steer(tmp_path, monkeypatch):
    printed = run("steer.ipynb", tmp_path, monkeypatch, STEPS=10)
    scores = json.loads(next(text for text in printed if "steered" in text).replace("'", '"'))
    assert scores["steered"] > scores["prior"] + 0.2


@pytest.mark.slow
def test_few_shot(tmp_path, monkeypatch):
    pairs = draw_pairs(tmp_path / "pairs", 16, size=64)
    printed = run("few-shot.ipynb", tmp_path, monkeypatch, PAIRS=pairs, STEPS=6)
    result = json.loads(printed[2].strip().splitlines()[-1])
    assert result["step"] == 6 and not result["interrupted"]
    assert {"README.md", "config.json"} <= {file.name for file in (tmp_path / "runs" / "few-shot").iterdir()}
    assert (tmp_path / "grid.png").exists() and "steered" in printed[3]
