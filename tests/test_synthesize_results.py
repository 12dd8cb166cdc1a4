import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image
from test_comparison import NAMES, simulated

from engine.folders import RUN_LOCK, TRIAL_LOCKS
from model import UserError, comparison
from model.comparison import Counts, write_counts
from params import Params
from sweep.space import grid, read_spaces
from synthesize_results import BY_REGION, Result, by_seed, read_published, without_seed
from utils import lock, write_history
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
        **dict.fromkeys(METRICS, "0.5200"),
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


def test_a_metric_that_only_some_experiments_have_gets_a_column(tmp_path):
    """Best first by its own direction; the others show "-", come last, and stay readable."""
    for name, worst, loss in (("a", 0.2, 3.0), ("b", None, 1.0), ("c", 0.4, 2.0), ("old", "absent", 0.5)):
        folder = experiment(tmp_path / name, [0.5])
        history = [epoch(1, 0.5)]
        history[0]["val"] |= {"loss": loss} | ({} if worst == "absent" else {"worst_IoU": worst})
        write_history(folder, history)
    assert [row["worst_IoU"] for row in table(synthesize(tmp_path).stdout)] == ["0.2000", "-", "0.4000", "-"]
    rows = table(synthesize(tmp_path, "--sort", "worst_IoU").stdout)
    assert [(row["name"], row["worst_IoU"]) for row in rows[:2]] == [("c", "0.4000"), ("a", "0.2000")]
    assert {row["state"] for row in rows} == {"finished"}
    assert [row["name"] for row in table(synthesize(tmp_path, "--sort", "loss").stdout)] == ["old", "b", "c", "a"]


def test_the_metric_that_chose_the_epochs_sorts_the_table(tmp_path):
    for name, losses in (("a", [0.3, 0.4]), ("b", [0.9, 0.2]), ("c", [0.1, 0.8])):
        folder = experiment(tmp_path / name, [0.1, 0.2], best_metric="loss")
        history = [epoch(number, number / 10) for number in (1, 2)]
        for record, loss in zip(history, losses, strict=True):
            record["val"]["loss"] = loss
        write_history(folder, history)
    rows = table(synthesize(tmp_path).stdout)
    assert [(row["name"], row["loss"], row["best_epoch"]) for row in rows] == [
        ("c", "0.1000", "1"),
        ("b", "0.2000", "2"),
        ("a", "0.3000", "1"),
    ]


def test_experiments_on_other_data_or_of_another_size_are_not_ranked_among_each_other(tmp_path):
    for name, data, size, mIoU in (("a", "x", 64, 0.5), ("b", "y", 64, 0.6), ("c", "x", 64, 0.7), ("d", "x", 32, 0.9)):
        folder = experiment(tmp_path / name, [mIoU], image_size=size)
        (folder / "run.json").write_text(json.dumps({"data_dir": f"/{data}"}))
        metrics = {"epoch": 1, "mIoU": mIoU / 2, **dict.fromkeys(BY_REGION)}
        (folder / "metrics_val_best_original_size.json").write_text(json.dumps(metrics))
    result = synthesize(tmp_path)
    rows = table(result.stdout)
    assert [row["name"] for row in rows] == ["d", "c", "a", "b"]
    assert [row["data_dir"] for row in rows] == ["/x", "/x", "/x", "/y"]
    words = "Rows of another data_dir, num_classes, image_size or resize are not ranked among each other."
    assert words in result.stdout and words in (tmp_path / "results.md").read_text()
    by_original = table(synthesize(tmp_path, "--sort", "val_original_size_mIoU").stdout)
    assert [row["name"] for row in by_original] == ["d", "c", "a", "b"], "at their own size all of x can be ranked"
    alike = synthesize(tmp_path / "a")
    assert words not in alike.stdout and "data_dir" not in table(alike.stdout)[0]


def test_long_numbers_have_six_digits_on_the_screen_and_all_in_the_file(tmp_path):
    for name, rate in (("a", 0.000123456789), ("b", 0.1)):
        experiment(tmp_path / name, [0.123456789], learning_rate=rate)
    assert table(synthesize(tmp_path).stdout)[0]["learning_rate"] == "0.000123457"
    assert "0.000123456789" in (tmp_path / "results.csv").read_text()


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
    names = ['a|b, "c"', "two\nlines", "$x$_$", "_hidden", "実験", "1e3"]
    for rank, name in enumerate(names):
        experiment(tmp_path / "sweep" / name, [0.9 - rank / 10], train_split=f"$\\x$_{rank}")
    looked_at = {"epoch": 1, "mIoU": 0.5}
    (tmp_path / "sweep" / "1e3" / "metrics_x|y_best_original_size.json").write_text(json.dumps(looked_at))
    Path(os.fsdecode(bytes(tmp_path / "sweep") + b"/\xff")).mkdir()
    (tmp_path / "elsewhere").mkdir()
    experiment(tmp_path / "elsewhere" / "linked", [0.05])
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    result = synthesize(tmp_path / "sweep")
    assert result.stderr == ""
    assert r" x\|y_original_size_mIoU |" in result.stdout.splitlines()[0]
    rows = [line.split(" | ")[0].strip("| ") for line in result.stdout.split("\n\n")[0].splitlines()[2:]]
    assert rows == [r"a\|b, \"c\"".replace(r"\"", '"'), "two lines", "$x$_$", "_hidden", "実験", "1e3", "link/linked"]
    with open(tmp_path / "sweep" / "results.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [*names, "link/linked"]
    assert (tmp_path / "sweep" / "results.png").exists()


def publish(folder: Path, *results: dict, source: str = "A paper, table 1") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "published.json").write_text(json.dumps({"source": source, "results": results}))


def test_published_figures_stand_beside_ours(tmp_path):
    sweep = tmp_path / "sweep"
    experiment(sweep / "any name", [0.5], head="conv1x1")
    experiment(sweep / "seven", [0.6])  # by default
    experiment(sweep / "nine", [0.4], kernel_size=9)
    experiment(sweep / "eleven", [0.3], kernel_size=11)
    experiment(sweep / "new", kernel_size=13)
    publish(
        sweep,
        {"params": {"head": "gcn", "kernel_size": 7}, "mIoU": 0.728},
        {"params": {"head": "gcn", "kernel_size": 9}, "mIoU": 0.734},
        {"params": {"head": "gcn", "kernel_size": 13}, "mIoU": 0.74},
        {"params": {"head": "gcn", "kernel_size": 99}, "mIoU": 0.99},
        {"params": {"head": "conv1x1"}, "mIoU": 0.69, "pixel_accuracy": 1},
    )
    result = synthesize(sweep)
    rows = table(result.stdout)
    shown = [(row["name"], row["mIoU"], row["published_mIoU"], row["published_pixel_accuracy"]) for row in rows]
    assert shown == [
        ("seven", "0.6000", "0.7280", "-"),
        ("any name", "0.5000", "0.6900", "1.0000"),
        ("nine", "0.4000", "0.7340", "-"),
        ("eleven", "0.3000", "-", "-"),
        ("new", "-", "0.7400", "-"),
    ]
    columns = list(rows[0])
    assert columns[columns.index("mIoU") + 1] == "published_mIoU"
    assert not any(metric in column for column in columns for metric in BY_REGION), "nobody has published them"
    assert result.stdout.endswith("\n\nPublished: A paper, table 1\n")
    assert (sweep / "results.md").read_text() == result.stdout
    with open(sweep / "results.csv", newline="") as stream:
        assert [row["published_mIoU"] for row in csv.DictReader(stream)] == ["0.728", "0.69", "0.734", "", "0.74"]
    rows = table(synthesize(sweep, "--sort", "published_mIoU").stdout)
    assert [row["name"] for row in rows] == ["new", "nine", "seven", "any name", "eleven"]


def test_accuracies_by_region_come_from_the_evaluation_at_original_size(tmp_path):
    sweep = tmp_path / "sweep"
    for name, content in {
        "both": '{"epoch": 1, "mIoU": 0.9, "boundary_accuracy": 0.61, "interior_accuracy": 0.92}',
        "one": '{"epoch": 1, "boundary_accuracy": 0.5, "interior_accuracy": null}',
        "older": '{"epoch": 2, "boundary_accuracy": 0.5, "interior_accuracy": 0.5}',
        "neither": None,
        "damaged": '{"boundary_accuracy": "0.5"}',
        "other": "[]",
    }.items():
        folder = experiment(sweep / name, [0.3])
        if content:
            (folder / "metrics_val_best_original_size.json").write_text(content)
    assert not {*BY_REGION} & table(synthesize(sweep).stdout)[0].keys()
    publish(sweep, {"params": {}, "boundary_accuracy": 0.713, "interior_accuracy": 0.939})
    result = synthesize(sweep)
    columns = [f"{kind}{metric}" for metric in BY_REGION for kind in ("", "published_")]
    rows = {row["name"]: row for row in table(result.stdout)}
    assert {name: [row[column] for column in columns] for name, row in rows.items()} == {
        "both": ["0.6100", "0.7130", "0.9200", "0.9390"],
        "one": ["0.5000", "0.7130", "-", "0.9390"],
        **{name: ["-", "0.7130", "-", "0.9390"] for name in ("neither", "older", "damaged", "other")},
    }
    assert {row["mIoU"] for row in rows.values()} == {"0.3000"} and "published_mIoU" not in rows["both"]
    assert [rows[name]["state"] for name in ("neither", "damaged", "other")] == ["finished", *2 * ["unreadable"]]
    assert result.stderr.count("metrics_val_best_original_size.json is damaged") == 2 == result.stderr.count("\n")


def test_the_mIoU_at_original_size_has_a_column_for_every_split(tmp_path):
    sweep = tmp_path / "sweep"
    for name, splits in {"both": {"val": 0.31, "rest": 0.25}, "one": {"val": 0.2}, "none": {}}.items():
        folder = experiment(sweep / name, [0.3])
        for split, mIoU in splits.items():
            content = {"epoch": 1, "mIoU": mIoU, "boundary_accuracy": 0.5}
            (folder / f"metrics_{split}_best_original_size.json").write_text(json.dumps(content))
        (folder / "metrics_test_best.json").write_text('{"epoch": 1, "mIoU": 0.7}')
    result = synthesize(sweep, "--sort", "rest_original_size_mIoU")
    columns = ["name", "mIoU", "rest_original_size_mIoU", "val_original_size_mIoU", "pixel_accuracy"]
    rows = table(result.stdout)
    assert list(rows[0])[:5] == columns
    assert [rows[0][column] for column in columns[:4]] == ["both", "0.3000", "0.2500", "0.3100"]
    assert {row["name"]: row["val_original_size_mIoU"] for row in rows} == {
        "both": "0.3100",
        "one": "0.2000",
        "none": "-",
    }


def test_over_seeds_has_a_row_for_runs_that_differ_in_their_seed_only(tmp_path):
    sweep = tmp_path / "sweep"
    for seed, mIoU in ((1, 0.1), (2, 0.2), (3, 0.6)):
        folder = experiment(sweep / f"batch_size_8__seed_{seed}", [mIoU, 0.05], batch_size=8, seed=seed)
        content = {"epoch": 1, "mIoU": mIoU + 0.1}
        (folder / "metrics_val_best_original_size.json").write_text(json.dumps(content))
    experiment(sweep / "batch_size_8__seed_4", [0.9], batch_size=8, seed=4, num_epochs=2)
    experiment(sweep / "batch_size_8__seed_5", batch_size=8, seed=5, num_epochs=2)
    experiment(sweep / "alone", [0.4, 0.5], seed=7)
    (experiment(sweep / "broken") / "params.json").write_text("{")
    rows = table(synthesize(sweep, "--over_seeds").stdout)
    assert [row["name"] for row in rows] == ["alone", "batch_size_8", "broken"]
    assert {key: rows[1][key] for key in list(rows[1])[1:8]} == {
        "seeds": "1 2 3",
        "batch_size": "8",
        "mIoU": "0.3000",
        "mIoU_std": "0.2646",  # sqrt((0.2^2 + 0.1^2 + 0.3^2) / (3 - 1))
        "val_original_size_mIoU": "0.4000",
        "val_original_size_mIoU_std": "0.2646",
        "pixel_accuracy": "0.5100",
    }
    assert rows[1]["state"] == "3 finished, 1 failed, 1 not started", "unfinished runs count in no mean"
    assert (rows[0]["seeds"], rows[0]["mIoU"], rows[0]["mIoU_std"], rows[0]["best_epoch"]) == ("7", "0.5000", "-", "2")
    assert rows[2]["state"] == "1 unreadable" and "seed" not in rows[0]
    with open(sweep / "results.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == ["alone", "batch_size_8", "broken"]
    seeds = tmp_path / "seeds"
    for seed in (1, 2):
        experiment(seeds / f"seed_{seed}", [0.1], seed=seed)
    assert [row["name"] for row in table(synthesize(seeds, "--over_seeds").stdout)] == ["seeds"]
    assert [row["name"] for row in table(synthesize(tmp_path, "--over_seeds").stdout)][-2:] == ["seeds", "sweep/broken"]


def test_the_plot_over_seeds_is_of_the_runs_that_the_table_counts(tmp_path):
    for seed, mIoU in ((1, 0.1), (2, 0.2)):
        experiment(tmp_path / f"seed_{seed}", [mIoU, mIoU], seed=seed, num_epochs=2)
    synthesize(tmp_path, "--over_seeds")
    finished_only = (tmp_path / "results.png").read_bytes()
    experiment(tmp_path / "seed_3", [0.9], seed=3, num_epochs=2)
    synthesize(tmp_path, "--over_seeds")
    assert (tmp_path / "results.png").read_bytes() == finished_only
    write_history(tmp_path / "seed_3", [epoch(1, 0.9), epoch(2, 0.9)])
    synthesize(tmp_path, "--over_seeds")
    assert (tmp_path / "results.png").read_bytes() != finished_only
    experiment(tmp_path / "wide", [0.5, 0.6], batch_size=8, momentum=0.9, num_epochs=2)
    synthesize(tmp_path, "--over_seeds")
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width == 2 * 5 * 120, "the curves and a plot by name, not one for each hyperparameter"


@pytest.mark.parametrize(
    "names, expected",  # "name:batch_size", the batch size in place of all that is not the seed
    [
        (["zero:4", "seed_1__zero:8", "seed_2__zero:8"], {"zero": 1, "seed_1__zero": 2}),
        (["seed_1__zero:8", "seed_2__zero:8", "zero:8"], {"zero": 3}),
        (["a__seed_1:4", "a__seed_2:8"], {"a__seed_1": 1, "a__seed_2": 1}),
        (["a__seed_1:4", "a__seed_2:4", "b:4"], {"a__seed_1": 3}),
        (["seed_1/a:4", "seed_2/a:4", "seed_1/b:8"], {"a": 2, "b": 1}),
        (["seed_1:4", "seed_2:4", "TOP:8"], {"seed_1": 2, "TOP": 1}),
    ],
)
def test_runs_over_seeds_are_called_by_what_they_share_if_that_is_theirs_alone(tmp_path, names, expected):
    results = []
    for seed, (name, batch_size) in enumerate(name.split(":") for name in names):
        results.append(Result(name.replace("TOP", tmp_path.name), {"seed": seed, "batch_size": batch_size}))
    groups = by_seed(results, tmp_path)
    assert {name.replace(tmp_path.name, "TOP"): len(group) for name, group in groups.items()} == expected


def test_over_seeds_a_broken_run_stands_alone_and_a_mean_is_over_all_that_finished(tmp_path):
    for seed in (1, 2, 3):
        folder = experiment(tmp_path / f"x__seed_{seed}", [0.1], seed=seed, loss_weights={"bce": 1, "dice": 1})
    (tmp_path / "x__seed_1" / "params.json").write_text("{")
    (tmp_path / "x__seed_2" / "params.json").write_text(
        json.dumps({"num_epochs": 1, "seed": 2, "loss_weights": {"dice": 1, "bce": 1}})
    )
    (folder / "metrics_val_best_original_size.json").write_text(json.dumps({"epoch": 1, "mIoU": 0.7}))
    rows = table(synthesize(tmp_path, "--over_seeds").stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("x", "2 finished"), ("x__seed_1", "1 unreadable")]
    assert rows[0]["mIoU"] == "0.1000" and rows[0]["val_original_size_mIoU"] == "-", "seed 2 was not looked at"
    unfinished = experiment(tmp_path / "p" / "seed_1", [0.1], seed=1, num_epochs=2).parent
    (unfinished / "published.json").write_text(json.dumps({"source": "s", "results": [FIGURE]}))
    assert table(synthesize(unfinished, "--over_seeds").stdout)[0]["published_mIoU"] == "0.7000"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("seed_1", ""),
        ("seed_1/a", "a"),
        ("deep/seed_12/a", "deep/a"),
        ("deep/seed_12", "deep"),
        ("seed_3__head_gcn", "head_gcn"),
        ("deep/seed_3__head_gcn", "deep/head_gcn"),
        ("precision_bf16__seed_3__head_gcn", "precision_bf16__head_gcn"),
        ("precision_bf16__seed_3", "precision_bf16"),
        ("my_seed_1", "my_seed_1"),
    ],
)
def test_names_without_their_seed(name, expected):
    assert without_seed(name) == expected


FIGURE = {"params": {"kernel_size": 7}, "mIoU": 0.7}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not valid JSON"),
        ("[]", 'must hold one object with "source" and "results"'),
        ({"results": [FIGURE]}, 'must hold one object with "source" and "results"'),
        ({"source": "x", "results": [FIGURE], "sauce": 1}, 'must hold one object with "source" and "results"'),
        ({"source": 3, "results": [FIGURE]}, '"source" is 3; allowed: a line of text'),
        ({"source": "two\nlines", "results": [FIGURE]}, "allowed: a line of text"),
        ({"source": "", "results": [FIGURE]}, "allowed: a line of text"),
        ({"source": "x", "results": FIGURE}, '"results" must list objects'),
        ({"source": "x", "results": [3]}, '"results" must list objects'),
        ([{"mIoU": 0.7}], 'result 1: "params" is null; allowed: an object with keys of params.json'),
        ([{"params": 7, "mIoU": 0.7}], 'result 1: "params" is 7'),
        ([{"params": {"kernal_size": 7}, "mIoU": 0.7}], 'result 1: unknown key "kernal_size"; did you mean "kernel_si'),
        ([{"params": {"kernel_size": 8}, "mIoU": 0.7}], '"kernel_size" is 8; allowed: an integer'),
        ([{"params": {}}], "result 1: no figure; known metrics: mIoU, pixel_accuracy, boundary_accuracy"),
        ([{"params": {}, "miou": 0.7}], 'unknown metric "miou"; known metrics: mIoU'),
        ([{"params": {}, "loss": 0.7}], 'unknown metric "loss"; known metrics: mIoU'),
        ([FIGURE, {"params": {"kernel_size": 9}, "mIoU": 72.8}], 'result 2: "mIoU" is 72.8; allowed: a number from 0'),
        ([{"params": {}, "mIoU": -0.1}], '"mIoU" is -0.1'),
        ([{"params": {}, "mIoU": None}], '"mIoU" is null'),
        ([{"params": {}, "mIoU": "0.7"}], '"mIoU" is "0.7"'),
        ([{"params": {}, "mIoU": True}], '"mIoU" is true'),
        ([FIGURE, FIGURE], "results 1 and 2 can match the same trial"),
        ([FIGURE, {"params": {"head": "gcn"}, "mIoU": 0.7}], "results 1 and 2 can match the same trial"),
        (
            [FIGURE, {"params": {"kernel_size": 9}, "mIoU": 0.7}, {"params": {}, "mIoU": 0.7}],
            "results 1 and 3 can match the same trial",
        ),
    ],
)
def test_faulty_published_figures_are_named(tmp_path, content, words):
    if isinstance(content, list):
        content = {"source": "x", "results": content}
    path = tmp_path / "published.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_published(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_faulty_published_figures_stop_the_table(tmp_path):
    experiment(tmp_path / "sweep" / "trial", [0.3])
    publish(tmp_path / "sweep", {"params": {"kernel_size": 7}, "mIoU": 72.8})
    result = synthesize(tmp_path / "sweep", check=2)
    assert "72.8" in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""
    assert not list((tmp_path / "sweep").glob("results.*"))


PAPER = sorted((ROOT / "experiments").glob("paper_*"))


def test_the_tables_of_the_paper_are_there():
    assert [sweep.name for sweep in PAPER] == [f"paper_table{number}" for number in (1, 2, 3, 5, 6)]


@pytest.mark.parametrize("sweep", PAPER, ids=lambda sweep: sweep.name)
def test_every_trial_of_the_paper_can_be_built_and_every_figure_has_one(sweep):
    import torch

    from model.net import FCN_GCN

    base = json.loads((sweep / "params.json").read_text())
    trials = grid(read_spaces(sweep / "search_space.json"), base, sweep)
    params = [Params.parse(base | values, sweep) for values in trials.values()]
    assert all(each.stem_maxpool and each.gcn_padding == "same" and each.pretrained for each in params)
    assert all((each.resize, each.image_size, each.train_split) == ("letterbox", 512, "trainaug") for each in params)
    assert {each.encoder for each in params} == {"resnet50" if sweep.name == "paper_table6" else "resnet152"}
    published = read_published(sweep / "published.json")
    assert "1703.02719" in published.source
    found = [published.of(vars(each)) for each in params]
    assert all(found.count(result) == 1 for result in published.results)
    for each in params:
        with torch.device("meta"):  # shapes alone, as some have 200 million parameters
            network = FCN_GCN(**each.network_options(), pretrained=False)
        assert network.gcn4 is not None


@pytest.mark.slow
@pytest.mark.parametrize("sweep", PAPER, ids=lambda sweep: sweep.name)
def test_every_trial_of_the_paper_trains_a_step(sweep):
    import torch

    from engine.training import Training
    from model.losses import SegmentationLoss
    from model.net import FCN_GCN

    base = json.loads((sweep / "params.json").read_text())
    for values in grid(read_spaces(sweep / "search_space.json"), base, sweep).values():
        params = Params.parse(base | values | {"pretrained": False, "precision": "fp32"}, sweep)
        training = Training(FCN_GCN(**params.network_options(), pretrained=False), params, 1)
        logits, labels = training.forward(torch.randn(2, 3, 64, 64)), torch.randint(21, (2, 64, 64))
        training.step(SegmentationLoss(**params.loss_options())(logits, labels), ends_group=True)
        assert training.is_finite()


def test_neither_table_nor_sweep_imports_torch():
    for module in ("synthesize_results", "sweep.study", "search_hyperparams"):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, module


def test_the_plots_show_every_curve_and_every_hyperparameter():
    curves = {f"run {index}": [[index / 100, index / 50]] for index in reversed(range(14))}
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
    legend = figure.legends[0]
    assert len(first.lines) == 14
    assert [text.get_text() for text in legend.texts] == [*list(curves)[:9], "the other 5"]
    assert {line.get_color() for line in first.lines[:5]} == {legend.legend_handles[-1].get_color()}
    assert list(first.lines[-1].get_ydata()) == [0.13, 0.26], "the best is drawn last, over the others"
    assert (rate.get_xscale(), kernel.get_xscale()) == ("log", "linear")
    assert [label.get_text() for label in head.get_xticklabels()] == ["conv", "gcn"]
    assert [label.get_text() for label in clip.get_xticklabels()] == ["1", "null"]
    assert [label.get_text() for label in kernel.get_xticklabels()] == ["3", "5", "7"]
    points = kernel.collections[0].get_offsets()
    assert sorted(map(tuple, points.tolist())) == sorted(
        (3 + 2 * (i % 3), y[0][1]) for i, y in enumerate(curves.values())
    )


def test_the_plot_of_several_seeds_is_their_mean_in_a_band_from_lowest_to_highest():
    figure = learning_curves(
        {"three": [[0.1, 0.3], [0.2, 0.2, 0.9], [0.3, 0.1]], "one": [[0.4]]}, {"batch_size": {"three": 8, "one": 4}}
    )
    curves, best = figure.axes
    assert curves.lines[-1].get_ydata().tolist() == pytest.approx([0.2, 0.2, 0.9])
    (band,) = curves.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()} >= {
        (1, 0.1),
        (1, 0.3),
        (2, 0.3),
        (3, 0.9),
    }
    assert sorted(map(tuple, best.collections[0].get_offsets().tolist())) == [(4, 0.4), (8, pytest.approx(0.5))]


def test_the_plot_by_name_has_a_point_for_every_run_and_a_line_at_their_mean():
    figure = learning_curves({"three": [[0.1, 0.3], [0.2, 0.6], [0.9]], "one": [[0.4]]}, None, {"one": 0.7})
    _, best = figure.axes
    assert best.get_ylim()[0] > best.get_ylim()[1], "the first is on top"
    assert [label.get_text() for label in best.get_yticklabels()] == ["three", "one"]
    assert [points.get_offsets().tolist() for points in best.collections] == [
        [[0.3, 0], [0.6, 0], [0.9, 0]],
        [[0.4, 1]],
    ]
    of_three, of_one, ring = [(*line.get_xydata()[0], line.get_color()) for line in best.lines]
    assert (of_three, of_one, ring) == ((pytest.approx(0.6), 0, "C0"), (0.4, 1, "C1"), (0.7, 1, "C1"))
    assert [text.get_text() for text in figure.legends[0].texts] == ["published"], "the names stand at the points"


def test_the_plots_ring_what_is_published_in_the_colour_of_its_run():
    figure = learning_curves(
        {"nine": [[0.1, 0.5]], "seven": [[0.4]], "five": [[0.3]]},
        {"kernel_size": {"nine": 9, "seven": 7, "five": 5}, "head": {"nine": "conv", "seven": "gcn", "five": "gcn"}},
        {"nine": 0.7, "five": 0.6},
    )
    _, kernel, head = figure.axes
    rings = [(*line.get_xydata()[0], line.get_color(), line.get_markerfacecolor()) for line in kernel.lines]
    assert rings == [(9, 0.7, "C0", "none"), (5, 0.6, "C2", "none")]
    assert [tuple(line.get_xydata()[0]) for line in head.lines] == [(0, 0.7), (1, 0.6)]
    assert [text.get_text() for text in figure.legends[0].texts] == ["nine", "seven", "five", "published"]


# ---------------------------------------------------------------------------------------- comparisons


def scored(folder: Path, run: Counts, *splits: str, **params) -> Path:
    """A finished experiment whose best epoch evaluate.py has scored at the photos' own size."""
    experiment(folder, [0.5], **params)
    cells = []
    for labelled, predicted, hits in zip(run.labelled, run.predicted, run.hits, strict=True):
        missed, wrong = labelled - hits, predicted - hits
        cells.append([[5 * c, hits[c]] for c in range(4) if hits[c]])
        for c in range(4):  # what simulated() has missed of a class, the next one has too much of
            assert missed[c] == wrong[(c + 1) % 4]
            cells[-1] += [[4 * c + (c + 1) % 4, missed[c]]] if missed[c] else []
    for split in splits:
        name = f"{split}_best_original_size"
        metrics = {"epoch": 1, "mIoU": comparison.mIoU(run), "pixel_accuracy": run.hits.sum() / run.labelled.sum()}
        (folder / f"metrics_{name}.json").write_text(json.dumps(metrics))
        parts = [np.array(sorted(cell), dtype=np.int64).reshape(-1, 2) for cell in cells]
        write_counts(folder / f"counts_{name}.npz", run.ids, run.class_names, parts)
    return folder


def test_every_row_is_compared_with_the_baseline_on_every_split(tmp_path):
    rng = np.random.default_rng(0)
    first = simulated(rng, 60, quality=0.4)
    scored(tmp_path / "a" / "old", first, "val", "test")
    scored(tmp_path / "a" / "good", better := simulated(rng, 60, quality=0.8, shared=first.labelled), "val", "test")
    scored(tmp_path / "a" / "alike", simulated(rng, 60, quality=0.41, shared=first.labelled), "val")
    scored(tmp_path / "a" / "unscored", first)
    result = synthesize(tmp_path / "a", "--baseline", "old", "--by_class")
    rows = {row["name"]: row for row in table(result.stdout.split("\n\n")[0])}
    verdicts = {name: (row["val_verdict"], row["test_verdict"]) for name, row in rows.items()}
    assert verdicts == {
        "old": ("baseline", "baseline"),
        "good": ("better (optimistic, one seed)", "better (one seed)"),
        "alike": ("open", "-"),
        "unscored": ("-", "-"),
    }
    good = rows["good"]
    assert float(good["test_difference"]) == pytest.approx(comparison.mIoU(better) - comparison.mIoU(first), abs=1e-4)
    assert 0 < float(good["test_low"]) < float(good["test_difference"]) < float(good["test_high"])
    assert "2 comparisons on val" in result.stdout and "chosen on val, by mIoU" in result.stdout
    assert "another seed may change it" in result.stdout
    classes = table(result.stdout.split("\n\n")[-1])
    assert [row["IoU on val (optimistic)"] for row in classes] == NAMES
    assert all(row["good"].endswith("better") and int(row["photos"]) > 20 for row in classes)
    with open(tmp_path / "a" / "results.csv") as stream:
        assert float(next(row for row in csv.DictReader(stream) if row["name"] == "good")["test_low"]) > 0
    assert Image.open(tmp_path / "a" / "results.png").width > 1000  # curves, and a plot of intervals for each split


def test_seeds_are_compared_as_one(tmp_path):
    rng = np.random.default_rng(1)
    shared = simulated(rng, 60, quality=0.4).labelled
    for name, quality in (("old", 0.4), ("new", 0.7)):
        for seed in (1, 2, 3):
            run = simulated(rng, 60, quality=quality + seed / 100, shared=shared)
            scored(tmp_path / "a" / f"{name}__seed_{seed}", run, "test", seed=seed, batch_size=1 + (name == "old"))
    rows = table(synthesize(tmp_path / "a", "--over_seeds", "--baseline", "old").stdout.split("\n\n")[0])
    assert [(row["name"], row["seeds"], row["test_verdict"]) for row in rows] == [
        ("new", "1 2 3", "better"),
        ("old", "1 2 3", "baseline"),
    ]
    # Run by run: what a seed changes is known from the others.
    rows = table(synthesize(tmp_path / "a", "--baseline", "old__seed_1").stdout.split("\n\n")[0])
    assert {row["name"]: row["test_verdict"] for row in rows} == {
        "old__seed_1": "baseline",
        **{f"old__seed_{seed}": "open" for seed in (2, 3)},
        **{f"new__seed_{seed}": "better" for seed in (1, 2, 3)},
    }
    (tmp_path / "a" / "new__seed_2" / "counts_test_best_original_size.npz").unlink()
    result = synthesize(tmp_path / "a", "--over_seeds", "--baseline", "old")
    assert "On test rows are left out whose photos were not counted: new__seed_2; score them again." in result.stdout
    assert [row["test_verdict"] for row in table(result.stdout.split("\n\n")[0])] == ["-", "baseline"]
    result = synthesize(tmp_path / "a", "--over_seeds", "--baseline", "new", check=2)
    assert "--baseline new: new__seed_2 has no counts of its photos on test; score it with" in result.stderr


def test_nothing_is_said_of_a_class_in_few_photos(tmp_path):
    rng = np.random.default_rng(0)
    first = simulated(rng, 60, quality=0.2)
    first.labelled[9:, 3] = first.hits[9:, 3] = first.predicted[9:, 0] = 0
    shared = first.labelled
    first = simulated(rng, 60, quality=0.2, shared=shared)
    scored(tmp_path / "a" / "old", first, "test")
    scored(tmp_path / "a" / "new", simulated(rng, 60, quality=0.9, shared=shared), "test")
    result = synthesize(tmp_path / "a", "--baseline", "old", "--by_class").stdout
    words = [row["new"].partition(") ")[2] for row in table(result.split("\n\n")[-1])]
    assert words == ["better", "better", "better", "few photos"]


def test_experiments_on_other_data_are_left_out(tmp_path):
    rng = np.random.default_rng(3)
    first = simulated(rng, 30, quality=0.4)
    scored(tmp_path / "a" / "old", first, "test")
    scored(tmp_path / "a" / "new", simulated(rng, 30, quality=0.5, shared=first.labelled), "test")
    scored(tmp_path / "a" / "sample", simulated(rng, 20, quality=0.5), "test", dataset="sample")
    rows = table(synthesize(tmp_path / "a", "--baseline", "old").stdout.split("\n\n")[0])
    assert {row["name"]: row["test_difference"] == "-" for row in rows} == {"old": True, "new": False, "sample": True}


def test_what_cannot_be_compared_is_one_line(tmp_path):
    rng = np.random.default_rng(2)
    scored(tmp_path / "a" / "old", simulated(rng, 9, quality=0.5), "val")
    scored(tmp_path / "a" / "other", simulated(rng, 8, quality=0.5), "val")
    experiment(tmp_path / "a" / "bare", [0.5])
    for flags, said in (
        (["--baseline", "older"], "--baseline older: the table has no row of that name"),
        (["--baseline", "bare"], "--baseline bare: it has no finished run with counts of its photos; score it with"),
        (["--baseline", "old"], "old and other were scored on different photos (8 of old alone)"),
        (["--by_class"], "--by_class goes with --baseline NAME"),
    ):
        result = synthesize(tmp_path / "a", *flags, check=2)
        assert said in result.stderr and not list((tmp_path / "a").glob("results.*")), flags
    old, other = (tmp_path / "a" / name / "counts_val_best_original_size.npz" for name in ("old", "other"))
    for content, said in ((other.read_bytes(), "is of another evaluation than the metrics"), (b"junk", "is damaged")):
        old.write_bytes(content)
        result = synthesize(tmp_path / "a", "--baseline", "old", check=2)
        assert f"{old} {said}" in result.stderr and result.stderr.count("\n") == 1
