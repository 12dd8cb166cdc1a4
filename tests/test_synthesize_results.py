import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from PIL import Image

from utils import RUN_LOCK, TRIAL_LOCKS, lock, write_history
from visualize import learning_curves

METRICS = ("pixel_accuracy", "mean_accuracy", "frequency_weighted_IoU", "mean_dice")


def experiment(folder: Path, scores=(), *, num_epochs: int | None = None, **params) -> Path:
    """A folder as train.py leaves it, with an epoch for every score; finished unless num_epochs says otherwise."""
    folder.mkdir(parents=True)
    epochs = num_epochs or max(1, len(scores))
    (folder / "params.json").write_text(json.dumps({"num_epochs": epochs} | params))
    if scores:
        write_history(folder, [epoch(number, score) for number, score in enumerate(scores, 1)])
        (folder / "train.log").write_text("…\n")
    return folder


def epoch(number: int, mIoU: float | None) -> dict:
    metrics = dict.fromkeys(METRICS, 0.5 + number / 100)
    record = {"epoch": number, "learning_rate": 0.1, "seconds": 30.0, "images_per_second": 10.0}
    return record | {"train": {"loss": 1.0} | metrics, "val": {"loss": 1 / number, "mIoU": mIoU} | metrics}


def synthesize(parent: Path, *more, check: int = 0) -> subprocess.CompletedProcess:
    return run_script("synthesize_results.py", "--parent_dir", parent, *more, check=check)


def table(text: str) -> list[dict[str, str]]:
    """The rows of a pipe table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert set("".join(lines[1])) <= set(":-")
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.fixture
def parent(tmp_path) -> Path:
    """Three finished runs of a sweep, one in each other state, and what is no experiment."""
    folder = tmp_path / "sweep"
    experiment(folder / "a", [0.1, 0.3, 0.2], learning_rate=0.1)
    experiment(folder / "b", [0.2, 0.5], learning_rate=0.01, num_epochs=2)
    experiment(
        folder / "deeper" / "c",
        [0.4, 0.4, 0.4],
        learning_rate=1e-5,
        optimizer="adamw",
        num_epochs=9,
        early_stopping_patience=2,
    )
    experiment(folder / "crashed", [0.01], num_epochs=3)
    (experiment(folder / "log only") / "train.log").write_text("…\n")
    experiment(folder / "not started")
    pruned = experiment(folder / "pruned", [0.02], num_epochs=3)
    (pruned / "trial.json").write_text('{"state": "pruned", "epochs": 1}')
    failed = experiment(folder / "failed", num_epochs=3)
    (failed / "trial.json").write_text('{"state": "failed", "reason": ["exit status 1", "loss is nan"]}')
    (folder / "params.json").write_text('{"seed": 3}')
    (folder / "search_space.json").write_text("{}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "params.json").write_text("{}")
    (folder / "notes").mkdir()
    return folder


def test_the_table_has_a_row_for_every_experiment_best_first(parent):
    running = experiment(parent / "running", [0.05], num_epochs=3)
    starting = experiment(parent / "starting")
    (starting / "train.log").touch()
    (parent / TRIAL_LOCKS).mkdir()
    held = [lock(running / RUN_LOCK), lock(parent / TRIAL_LOCKS / "starting")]
    result = synthesize(parent)
    for each in held:
        each.release()
    rows = table(result.stdout)
    assert [row["name"] for row in rows[:6]] == ["b", "deeper/c", "a", "running", "pruned", "crashed"]
    assert {row["name"]: row["state"] for row in rows} == {
        **dict.fromkeys(["a", "b", "deeper/c"], "finished"),
        **dict.fromkeys(["crashed", "log only", "failed"], "failed"),
        **{name: name for name in ("running", "pruned", "not started")},
        "starting": "running",
    }
    assert rows[0] == {
        "name": "b",
        "learning_rate": "0.01",
        "num_epochs": "2",
        "optimizer": "sgd",
        "early_stopping_patience": "-",
        "mIoU": "0.5000",
        "pixel_accuracy": "0.5200",
        "loss": "0.5000",
        "best_epoch": "2",
        "epochs": "2",
        "minutes": "1.0",
        "state": "finished",
    }
    assert (rows[1]["best_epoch"], rows[1]["learning_rate"]) == ("1", "1e-05"), "the first of several that are best"
    assert "failed: failed, exit status 1; loss is nan" in result.stderr
    assert "crashed: failed, ended after 1 of 3 epochs" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_files_say_what_the_terminal_says(parent):
    result = synthesize(parent)
    assert (parent / "results.md").read_text() == result.stdout
    with open(parent / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    shown = table(result.stdout)
    assert [row["name"] for row in rows] == [row["name"] for row in shown] and list(rows[0]) == list(shown[0])
    assert float(rows[2]["loss"]) == 0.5 and float(rows[0]["mIoU"]) == 0.5 and rows[-1]["mIoU"] == ""
    picture = Image.open(parent / "results.png")
    picture.load()
    assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 100


@pytest.mark.parametrize(
    "file, content",
    [
        ("params.json", "{"),
        ("params.json", '{"learning_rat": 1}'),
        ("params.json", None),
        ("history.jsonl", '{"epoch": 1'),
        ("history.jsonl", "3\n"),
        ("history.jsonl", "null\n"),
        ("history.jsonl", '{"epoch": 1, "val": {"mIoU": 0.3}}\n'),
        ("history.jsonl", json.dumps(epoch(1, float("nan"))) + "\n"),
        ("history.jsonl", json.dumps(epoch(1, 0.3) | {"seconds": None}) + "\n"),
        ("history.jsonl", json.dumps(epoch(1, "")) + "\n"),
        ("history.jsonl", json.dumps(epoch(1, False)) + "\n"),
        ("history.jsonl", json.dumps(epoch(1, 10**400)) + "\n"),
        ("history.jsonl", "[" * 100_000),
        ("history.jsonl", b"\xff\xfe\x00"),
        ("history.jsonl", "folder"),
        ("trial.json", "{"),
    ],
)
def test_a_damaged_file_is_a_row_and_not_a_crash(tmp_path, file, content):
    damaged = experiment(tmp_path / "sweep" / "damaged", [0.9], num_epochs=3)
    experiment(tmp_path / "sweep" / "sound", [0.1])
    path = damaged / file
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = synthesize(tmp_path / "sweep")
    rows = table(result.stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("sound", "finished"), ("damaged", "unreadable")][
        :: 1 if file != "trial.json" else -1
    ]
    assert (
        result.stderr.startswith("damaged: unreadable, ") and file in result.stderr and result.stderr.count("\n") == 1
    )


def test_an_experiment_without_results_beside_others_is_a_row(tmp_path):
    experiment(tmp_path / "sweep" / "new")
    (tmp_path / "sweep" / "lost").mkdir()
    (tmp_path / "sweep" / "lost" / "metrics_val_best_weights.json").write_text("{}")
    rows = table(synthesize(tmp_path / "sweep").stdout)
    assert {row["name"]: row["state"] for row in rows} == {"new": "not started", "lost": "unreadable"}
    assert not (tmp_path / "sweep" / "results.png").exists()


def test_one_experiment_by_itself_is_a_table_of_one_row(tmp_path):
    rows = table(synthesize(experiment(tmp_path / "alone", [0.1, None])).stdout)
    assert len(rows) == 1 and rows[0]["name"] == "alone" and rows[0]["mIoU"] == "0.1000"


@pytest.mark.parametrize(
    "column, first",
    [("loss", "a"), ("minutes", "crashed"), ("learning_rate", "deeper/c"), ("name", "a"), ("state", "log only")],
)
def test_sort_takes_any_column(parent, column, first):
    rows = table(synthesize(parent, "--sort", column).stdout)
    names = [row["name"] for row in rows]
    assert rows[0][column] == next(row[column] for row in rows if row["name"] == first)
    assert set(names[-3:]) == {"log only", "not started", "failed"} or column in ("name", "state", "learning_rate")


def test_mistakes_are_one_line(tmp_path, parent):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        ([empty], "holds no experiments, which are folders with a params.json"),
        ([tmp_path / "nowhere"], "no folder"),
        ([parent, "--sort", "miou"], "--sort miou: no such column; there are name, learning_rate, "),
    ):
        result = synthesize(*arguments, check=2)
        assert words in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""
    assert not list(empty.iterdir())


def test_names_cannot_break_table_or_plot(tmp_path):
    names = ['a|b, "c"', "two\nlines", "$x$_$", "_hidden", "実験"]
    for rank, name in enumerate(names):
        experiment(tmp_path / "sweep" / name, [0.9 - rank / 10], train_split=f"$\\x$_{rank}")
    Path(os.fsdecode(bytes(tmp_path / "sweep") + b"/\xff")).mkdir()
    (tmp_path / "elsewhere").mkdir()
    experiment(tmp_path / "elsewhere" / "linked", [0.05])
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    result = synthesize(tmp_path / "sweep")
    assert result.stderr == ""
    rows = [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()[2:]]
    assert rows == [r"a\|b, \"c\"".replace(r"\"", '"'), "two lines", "$x$_$", "_hidden", "実験", "link/linked"]
    with open(tmp_path / "sweep" / "results.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [*names, "link/linked"]
    assert (tmp_path / "sweep" / "results.png").exists()


def test_neither_table_nor_sweep_imports_torch():
    for module in ("synthesize_results", "study", "search_hyperparams"):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, module


def test_the_plots_show_every_curve_and_every_hyperparameter():
    curves = {f"run {index}": [index / 100, index / 50] for index in reversed(range(14))}
    figure = learning_curves(
        curves,
        {
            "learning_rate": {name: 10.0 ** -(index % 4) for index, name in enumerate(curves)},
            "kernel_size": {name: 3 + 2 * (index % 3) for index, name in enumerate(curves)},
            "head": {name: ("gcn", "conv")[index % 2] for index, name in enumerate(curves)},
            "clip_grad_norm": {name: (None, 1.0)[index % 2] for index, name in enumerate(curves)},
        },
    )
    first, rate, kernel, head, clip = figure.axes
    assert len(first.lines) == 14 and [text.get_text() for text in figure.legends[0].texts] == list(curves)[:10]
    assert list(first.lines[-1].get_ydata()) == [0.13, 0.26], "the best is drawn last, over the others"
    assert (rate.get_xscale(), kernel.get_xscale()) == ("log", "linear")
    assert [label.get_text() for label in head.get_xticklabels()] == ["conv", "gcn"]
    assert [label.get_text() for label in clip.get_xticklabels()] == ["1", "null"]
    assert [label.get_text() for label in kernel.get_xticklabels()] == ["3", "5", "7"]
    points = kernel.collections[0].get_offsets()
    assert sorted(map(tuple, points.tolist())) == sorted((3 + 2 * (i % 3), y[1]) for i, y in enumerate(curves.values()))
