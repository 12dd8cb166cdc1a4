"""docs/RESULTS.md: its tables say what synthesize_results.py makes of the runs in docs/runs."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean

import pytest
from conftest import ROOT, run_script

PAGE = (ROOT / "docs" / "RESULTS.md").read_text()
# Commands in the page, and what follows up to the next ones: the table that they make.
BLOCKS = re.findall(
    r"^((?:python synthesize_results.py --parent_dir docs/runs.*\n)+)```\n((?:(?!python synth).*\n)*)",
    PAGE,
    re.MULTILINE,
)

CLASS_COLUMNS = ("original", "64px_56_epochs", "64px_112_epochs_then_96px")  # of docs/runs/recipes


def section(title: str) -> list[list[str]]:
    """Return the cells of the table in a section of the page, without its heads."""
    text = PAGE.split(f"## {title}\n")[1].split("\n#")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


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


@pytest.mark.parametrize(("commands", "text"), BLOCKS, ids=[commands.split()[-1] for commands, _ in BLOCKS])
def test_a_table_says_what_its_commands_print(commands, text, tmp_path):
    expected = {}
    for command in commands.splitlines():
        folder, *others = shlex.split(command)[3:]
        runs = Path(shutil.copytree(ROOT / folder, tmp_path / Path(folder).name))
        run_script("synthesize_results.py", "--parent_dir", runs, *others)
        with (runs / "results.csv").open(newline="") as file:
            expected |= {f"{runs.name}/{row['name']}": cells(row) for row in csv.DictReader(file)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    said = {row[0].strip("`"): row[-4:] for row in rows}
    assert said and said == {name: expected[name] for name in said}


def test_every_run_is_in_a_table():
    groups = [path for path in (ROOT / "docs" / "runs").iterdir() if path.is_dir()]
    runs = {f"{group.name}/{path.name.split('__')[0]}" for group in groups for path in group.iterdir() if path.is_dir()}
    assert runs == {name for _, text in BLOCKS for name in re.findall(r"^\| `(.*?)`", text, re.MULTILINE)}


def test_what_time_buys_is_taken_from_the_other_tables():
    scores = [row[-4:-2] for row in section("Everything that was tried")]
    assert all(row[-2:] in scores for row in section("What time buys"))


def test_the_table_of_classes_has_the_means_over_seeds():
    expected = {}
    for split in ("val", "val2"):
        for name in CLASS_COLUMNS:
            folder, file = ROOT / "docs" / "runs" / "recipes", f"metrics_{split}_best_original_size.json"
            runs = [json.loads(path.read_text())["IoU"] for path in folder.glob(f"{name}__*/{file}")]
            for label in runs[0]:
                values = [run[label] for run in runs if run[label] is not None]
                expected.setdefault(label, []).append(f"{100 * mean(values):.1f}" if values else "-")
    assert {label: values for label, *values in section("Class by class")} == expected
