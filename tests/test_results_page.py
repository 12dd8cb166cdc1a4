"""docs/RESULTS.md: its tables say what the runs in docs/runs say."""

import csv
import json
import re
import shlex
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT, run_script

from comparing import read_counts, values

RUNS = sorted((ROOT / "docs" / "runs").glob("*.zip"))
PAGE = (ROOT / "docs" / "RESULTS.md").read_text()
# Commands in the page, and what follows up to the next ones: the table that they make.
BLOCKS = re.findall(
    r"^((?:python synthesize_results.py --parent_dir runs.*\n)+)```\n((?:(?!python synth).*\n)*)",
    PAGE,
    re.MULTILINE,
)


def table(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the cells of the table in a text: its head and its rows."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return head, rows


def cells(row: dict[str, str]) -> list[str]:
    """Return what the page says of a row: mIoU on both halves, and its differences from the baseline."""
    scores, differences = [], []
    for split in ("val", "val2"):
        name = f"{split}_original_size_mIoU"
        spread = f" ± {float(row[f'{name}_std']):.3f}" if row.get(f"{name}_std") else ""
        scores.append(f"{float(row[name]):.3f}{spread}")
        if row[f"{split}_mIoU_difference"]:
            difference, low, high = (
                f"{float(row[f'{split}_mIoU_{key}']):.3f}" for key in ("difference", "low", "high")
            )
            verdict = row[f"{split}_mIoU_verdict"].removesuffix(" (optimistic)")
            differences.append(f"{difference} ({low} to {high}), {verdict}")
        else:
            differences.append("")
    return scores + differences


@pytest.mark.parametrize(("commands", "text"), BLOCKS, ids=[commands.split()[-1] for commands, _ in BLOCKS])
def test_a_table_says_what_its_commands_print(commands, text, tmp_path):
    for archive in RUNS:
        ZipFile(archive).extractall(tmp_path / "runs")
    expected = {}
    for command in commands.splitlines():
        _, _, flag, folder, *others = shlex.split(command)
        run_script("synthesize_results.py", flag, tmp_path / folder, *others)
        with (tmp_path / folder / "results.csv").open(newline="") as file:
            expected |= {row["name"]: cells(row) for row in csv.DictReader(file)}
    said = {row[0].strip("`"): row[-4:] for row in table(text)[1] if row[0].startswith("`")}
    assert said and said == {name: expected[name] for name in said}


def test_every_run_is_in_a_table():
    files = [Path(name) for archive in RUNS for name in ZipFile(archive).namelist()]
    runs = {file.parts[1].split("__seed_")[0] for file in files}
    assert runs == {name for _, text in BLOCKS for name in re.findall(r"^\| `(.*?)`", text, re.MULTILINE)}


def test_every_score_is_that_of_its_counts(tmp_path):
    """Once mIoU was the mean over more classes: of an older program's files the differences would be of another one."""
    for archive in RUNS:
        ZipFile(archive).extractall(tmp_path)
    files = sorted(tmp_path.rglob("metrics_*.json"))
    for file in files:
        counts = read_counts(file.with_name(file.name.replace("metrics", "counts")).with_suffix(".npz"))
        expected = values(counts.pixels.sum(0))[0]
        assert json.loads(file.read_text())["mIoU"] == pytest.approx(expected, abs=1e-9), file
    assert len(files) > 50


def test_the_readme_has_the_scores_of_this_page():
    _, results = table((ROOT / "README.md").read_text().split("## Results\n")[1])
    _, rows = table(BLOCKS[0][1])
    for name, experiment in (("voc2012_lite0", "voc2012_lite0"), ("best_96px", "64px_112_epochs_then_96px")):
        (said,) = [row for row in results if f"`{name}`" in row[0]]
        _, _, minutes, _, first, second, *_ = next(row for row in rows if row[0] == f"`{experiment}`")
        assert said[2:] == [f"{first.split()[0]}, {second.split()[0]}", f"{minutes} min"]
