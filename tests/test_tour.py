"""docs/tour.ipynb: it runs from the first cell to the last, and what is committed is what it says."""

import os
import shutil

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_every_cell_was_run_in_order_and_the_file_is_small():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert NOTEBOOK.stat().st_size < 1e6


@pytest.mark.slow
def test_it_runs(tmp_path):
    client = pytest.importorskip("nbclient")
    for name in os.listdir(ROOT):  # what it writes goes to experiments
        if name not in ("experiments", "docs", ".git"):
            (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "experiments" / "quickstart", tmp_path / "experiments" / "quickstart")
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": tmp_path / "docs"}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "error:" not in text and "1 of 1 photos -> experiments/tour/predictions" in text
