"""docs/RESULTS.md: its tables say what synthesize_results.py makes of the runs in docs/runs."""

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_script

PAGE = (ROOT / "docs" / "RESULTS.md").read_text()
# A command in the page, and all up to the next one: the tables that it makes.
COMMANDS = re.findall(r"^python synthesize_results.py (--parent_dir docs/runs.*)$((?:\n(?!#).*)*)", PAGE, re.MULTILINE)


def cells(row: dict[str, str]) -> list[str]:
    """Return what the page says of a row: mIoU on both halves, and its differences from the baseline."""
    scores, differences = [], []
    for split in ("val", "val2"):
        name = f"{split}_original_size_mIoU"
        spread = f" ± {float(row[f'{name}_std']):.3f}" if row.get(f"{name}_std") else ""
        scores.append(f"{float(row[name]):.3f}{spread}")
        if row[f"{split}_difference"]:
            difference, low, high = (f"{float(row[f'{split}_{key}']):.3f}" for key in ("difference", "low", "high"))
            verdict = row[f"{split}_verdict"].removesuffix(" (optimistic)")
            differences.append(f"{difference} ({low} to {high}), {verdict}")
        else:
            differences.append("")
    return scores + differences


@pytest.mark.parametrize(("flags", "text"), COMMANDS, ids=[flags.split()[1] for flags, _ in COMMANDS])
def test_a_table_says_what_its_command_prints(flags, text, tmp_path):
    folder, *others = shlex.split(flags)[1:]
    runs = Path(shutil.copytree(ROOT / folder, tmp_path / "runs"))
    run_script("synthesize_results.py", "--parent_dir", runs, *others)
    with (runs / "results.csv").open(newline="") as file:
        expected = {row["name"]: cells(row) for row in csv.DictReader(file)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    said = {row[0].strip("`"): row[-4:] for row in rows}
    assert said and said == {name: expected[name] for name in said}


def test_there_are_tables():
    assert COMMANDS
