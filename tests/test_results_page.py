"""docs/RESULTS.md: its tables say what the runs in docs/runs say."""

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

LAPTOP, BEST_96PX = "64px_56_epochs", "64px_112_epochs_then_96px"  # what is in docs/runs/recipes


def table(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the cells of the table in a text: its head and its rows."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return head, rows


def section(title: str) -> tuple[list[str], list[list[str]]]:
    """Return the cells of the table in a section of the page: its head and its rows."""
    return table(PAGE.split(f"## {title}\n")[1].split("\n#")[0])


TRIED = {row[0].strip("`"): row for row in section("Everything that was tried")[1]}


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
    said = {row[0].strip("`"): row[-4:] for row in table(text)[1] if row[0].startswith("`")}
    assert said and said == {name: expected[name] for name in said}


def test_every_run_is_in_a_table():
    groups = [path for path in (ROOT / "docs" / "runs").iterdir() if path.is_dir()]
    runs = {f"{group.name}/{path.name.split('__')[0]}" for group in groups for path in group.iterdir() if path.is_dir()}
    assert runs == {name for _, text in BLOCKS for name in re.findall(r"^\| `(.*?)`", text, re.MULTILINE)}


def test_what_time_buys_is_taken_from_the_other_tables():
    _, found = section("What time buys")
    names = [f"64px_{epochs}_epochs" for epochs in (14, 18, 28, 56, 112)] + [BEST_96PX]
    assert [row[0].split()[0] for row in found] == ["14", "18", "28", "56", "112", "and"]
    for row, name in zip(found, names, strict=True):
        _, _, minutes, seeds, _, *scores = TRIED[f"recipes/{name}"]
        assert row[1:] == [minutes, seeds, *scores[:2]]


def test_the_readme_has_the_scores_of_this_page():
    for name, words in {LAPTOP: "experiments/laptop`, mean", BEST_96PX: "`best_96px`, mean"}.items():
        (said,) = [line for line in (ROOT / "README.md").read_text().splitlines() if words in line]
        _, _, minutes, _, _, first, second, *_ = TRIED[f"recipes/{name}"]
        assert said.endswith(f"| {first.split()[0]}, {second.split()[0]} | {minutes} min |")


def test_the_table_of_classes_has_the_means_over_seeds():
    columns, expected = {"original": "original", "`laptop`": LAPTOP, "`best_96px`": BEST_96PX}, {}
    for split in ("val", "val2"):
        for name in columns.values():
            folder, file = ROOT / "docs" / "runs" / "recipes", f"metrics_{split}_best_original_size.json"
            runs = [json.loads(path.read_text()) for path in folder.glob(f"{name}__*/{file}")]
            for label, accuracy in runs[0]["accuracy"].items():  # None: no pixel is of this class
                value = "-" if accuracy is None else f"{100 * mean(run['IoU'][label] for run in runs):.1f}"
                expected.setdefault(label, []).append(value)
    head, rows = section("Class by class")
    assert head == ["class", *columns, *columns] and {label: values for label, *values in rows} == expected
