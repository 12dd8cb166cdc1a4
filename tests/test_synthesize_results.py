import csv
import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock
from PIL import Image
from test_comparing import NAMES, simulated

import synthesize_results
from comparing import Counts, mIoU, write_counts
from engine.results import Run, read, without_seed
from engine.run import RUN_LOCK
from model import UserError
from params import Params
from sweep.space import grid, read_spaces
from synthesize_results import by_seed, doubt, published_columns, read_published, task
from utils import write_history

METRICS = ("pixel_accuracy", "mean_accuracy", "frequency_weighted_IoU", "mean_dice")
FIGURE = {"params": {"kernel_size": 7}, "mIoU": 0.7}


def experiment(folder: Path, scores=(), *, num_epochs: int | None = None, own_size=(), **params) -> Path:
    """A folder as train.py leaves it, with an epoch for every score; finished unless num_epochs says otherwise.

    own_size: by split, what evaluate.py has found at the photos' own size.
    """
    folder.mkdir(parents=True)
    epochs = num_epochs or max(1, len(scores))
    (folder / "params.json").write_text(json.dumps({"num_epochs": epochs} | params))
    if scores:
        write_history(folder, [epoch(number, score) for number, score in enumerate(scores, 1)])
        (folder / "train.log").write_text("…\n")
    for split, metrics in dict(own_size).items():
        (folder / f"metrics_{split}_best_original_size.json").write_text(json.dumps({"epoch": 1} | metrics))
    return folder


def epoch(number: int, mIoU: float | None, **val) -> dict:
    metrics = dict.fromkeys(METRICS, 0.5 + number / 100)
    record = {"epoch": number, "learning_rate": 0.1, "seconds": 30.0, "images_per_second": 10.0}
    return record | {"train": {"loss": 1.0} | metrics, "val": {"loss": 1 / number, "mIoU": mIoU} | metrics | val}


def synthesize(parent: Path, *more: str, render: bool = False) -> SimpleNamespace:
    """What the command prints, and the rows of its table; render: write the picture too, which takes longest."""
    return printed(parent, "--parent_dir", str(parent), *more, render=render)


def named(folder: Path, *more: str) -> SimpleNamespace:
    """What the command prints, in a folder, of runs that are named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return printed(Path("results"), *more)


def printed(output: Path, *arguments: str, render: bool = False) -> SimpleNamespace:
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", ["synthesize_results.py", *arguments])
        patch.setattr(synthesize_results, "WIDTH", 10_000)  # room for every column
        if not render:
            patch.setattr(synthesize_results, "save_figure", lambda figure, path, dpi: path.touch())
        synthesize_results.main(synthesize_results.parse_args())
    parts = out.getvalue().split("\n\n")
    rows = [row for part in parts if part.startswith("| name ") for row in table(part)]
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue(), rows=rows, file=results_csv(output))


def table(text: str) -> list[dict[str, str]]:
    """The rows of a pipe table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert set("".join(lines[1])) <= set(":-")
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]  # a cell may have a bar


def results_csv(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def parent(tmp_path) -> Path:
    """Three finished runs of a sweep, one in each other state, and what is no experiment."""
    folder = tmp_path / "sweep"
    experiment(folder / "a", [0.1, 0.3, 0.2], learning_rate=0.1)
    experiment(folder / "b", [0.2, 0.5], learning_rate=0.01, num_epochs=2)
    options = {"learning_rate": 1.23456789e-5, "optimizer": "adamw", "num_epochs": 9, "early_stopping_patience": 2}
    experiment(folder / "deeper" / "c", [0.4, 0.4, 0.4], **options)
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
    with FileLock(experiment(parent / "running", [0.05], num_epochs=3) / RUN_LOCK):
        result = synthesize(parent, "--all", render=True)
        begun = synthesize(parent)
    rows = result.rows
    assert {row["name"] for row in rows} - {row["name"] for row in begun.rows} == {"log only", "not started"}
    assert begun.err.startswith("2 of 9 have not begun (log only, not started); --all shows them\n")
    assert [row["name"] for row in rows[:6]] == ["b", "deeper/c", "a", "running", "pruned", "crashed"]
    assert {row["name"]: row["state"] for row in rows} == {
        **dict.fromkeys(["a", "b", "deeper/c"], "finished"),
        **dict.fromkeys(["crashed", "failed"], "failed"),
        **{name: name for name in ("running", "pruned", "not started")},
        "log only": "not started",
    }
    assert not (parent / "a" / RUN_LOCK).exists(), "looking makes no file"
    assert rows[0] == {
        "name": "b",
        "state": "finished",
        "mIoU": "0.500",
        "learning_rate": "0.01",
        "num_epochs": "2",
        "optimizer": "sgd",
        "early_stopping_patience": "-",
        "best_epoch": "2",
        "epochs": "2",
        "minutes": "1.0",
        **dict.fromkeys(METRICS, "0.520"),
        "loss": "0.500",
    }
    assert (rows[1]["best_epoch"], rows[1]["learning_rate"]) == ("1", "1.23457e-05"), "the first of several best"
    assert "failed: failed, exit status 1; loss is nan" in result.err
    assert "crashed: failed, ended after 1 of 3 epochs" in result.err
    result = synthesize(parent, "--all", render=True)
    assert (
        result.out == f"{(parent / 'results.md').read_text()}\n-> {parent / 'results.html'}, .md, .csv, .tex and .png\n"
    )
    file = result.file
    assert [row["name"] for row in file] == [row["name"] for row in rows] and {*file[0]} == {*rows[0]}
    assert (file[0]["mIoU"], file[-1]["mIoU"], file[1]["learning_rate"]) == ("0.5", "", "1.23456789e-05")
    with Image.open(parent / "results.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 100
    firsts = {
        "minutes": "crashed",
        "learning_rate": "deeper/c",
        "name": "a",
        "state": "crashed",
        "best_epoch": "deeper/c",
    }
    for column, first in firsts.items():
        sorted_rows = synthesize(parent, "--all", "--sort", column).rows
        assert r"learning\_rate" in (parent / "results.tex").read_text()
        expected = next(row[column] for row in rows if row["name"] == first)
        assert sorted_rows[0][column] == expected or column == "minutes"
        assert column != "minutes" or {row["name"] for row in sorted_rows[-3:]} == {"log only", "not started", "failed"}


def test_the_metric_that_chose_the_epochs_sorts_the_table(tmp_path):
    """Best first by its own direction; where a metric is missing "-" stands, last."""
    for name, losses in (("a", [0.3, 0.4]), ("b", [0.9, 0.2]), ("c", [0.1, 0.8])):
        folder = experiment(tmp_path / name, [0.1, 0.2], best_metric="loss")
        worst = {} if name == "a" else {"worst_IoU": None if name == "b" else 0.4}
        write_history(folder, [epoch(n, n / 10, loss=loss, **worst) for n, loss in enumerate(losses, 1)])
    rows = synthesize(tmp_path).rows
    ranked = [("c", "0.100", "1"), ("b", "0.200", "2"), ("a", "0.300", "1")]
    assert [(row["name"], row["loss"], row["best_epoch"]) for row in rows] == ranked
    other = experiment(tmp_path / "d", [0.1], best_metric="loss", loss_weights={"bce": 0.01})
    write_history(other, [epoch(1, 0.1, loss=0.01)])
    names = [row["name"] for row in synthesize(tmp_path).rows]
    assert names in (["d", "c", "b", "a"], ["c", "b", "a", "d"]), "another loss is not ranked among these"
    write_history(other, [epoch(1, 0.1, loss=0.25)])
    assert [row["name"] for row in synthesize(tmp_path).rows] == names
    drawn = [(tmp_path / "results.html").read_text()]
    shutil.rmtree(other)
    synthesize(tmp_path)
    drawn += [(tmp_path / "results.html").read_text()]
    assert ["validation mIoU" in page for page in drawn] == [True, False], "nor drawn beside them"
    assert [row["worst_IoU"] for row in synthesize(tmp_path, "--sort", "worst_IoU").rows] == ["0.400", "-", "-"]


def test_experiments_on_other_data_have_a_table_and_a_picture_of_their_own(tmp_path):
    """Of one data set, those of another size are not ranked among each other."""
    for name, data, size, value in (("a", "x", 64, 0.5), ("b", "y", 64, 0.6), ("c", "x", 64, 0.7), ("d", "x", 32, 0.9)):
        folder = experiment(tmp_path / name, [value], image_size=size, own_size={"val": {"mIoU": value / 2}})
        (folder / "run.json").write_text(json.dumps({"data_dir": f"/{data}"}))
    result = synthesize(tmp_path, render=True)
    of_x, of_y = (part for part in result.out.split("## ")[1:])
    assert of_x.partition("\n")[0].endswith("/x, 21 classes") and of_y.partition("\n")[0].endswith("/y, 21 classes")
    assert [row["name"] for row in table(of_x.split("\n\n")[1])] == ["d", "c", "a"]
    assert [row["name"] for row in table(of_y.split("\n\n")[1])] == ["b"]
    assert [row["data"][-13:] for row in result.file] == ["x, 21 classes"] * 3 + ["y, 21 classes"]
    assert "results.png is of" in result.err and "/x, 21 classes alone; name runs to draw others" in result.err
    drawn = (tmp_path / "results.png").read_bytes()
    shutil.rmtree(tmp_path / "b")
    own_size = synthesize(tmp_path, "--sort", "val_original_size_mIoU", render=True)
    assert [row["name"] for row in own_size.rows] == ["d", "c", "a"] and "##" not in own_size.out + own_size.err
    synthesize(tmp_path, render=True)
    assert (tmp_path / "results.png").read_bytes() == drawn, "at their own size all of x can be ranked"


@pytest.mark.parametrize(
    "file, content",
    [
        ("params.json", '{"learning_rat": 1}'),
        ("params.json", None),
        ("history.jsonl", json.dumps(epoch(1, "")) + "\n"),
        ("metrics_val_best_original_size.json", "["),
        ("trial.json", "{"),
    ],
)
def test_a_damaged_file_is_a_row_and_not_a_crash(tmp_path, file, content):
    damaged = experiment(tmp_path / "sweep" / "damaged", [0.9], num_epochs=3)
    experiment(tmp_path / "sweep" / "sound", [0.1])
    (damaged / file).unlink(missing_ok=True)
    if content is not None:
        (damaged / file).write_text(content)
    result = synthesize(tmp_path / "sweep")
    assert {row["name"]: row["state"] for row in result.rows} == {"sound": "finished", "damaged": "unreadable"}
    assert result.err.startswith("damaged: unreadable, ") and file in result.err and result.err.count("\n") == 1


def test_an_experiment_without_results_is_a_row(tmp_path):
    experiment(tmp_path / "sweep" / "new")
    (tmp_path / "sweep" / "lost").mkdir()
    (tmp_path / "sweep" / "lost" / "last.pth.tar").touch()
    (tmp_path / "sweep" / "docs").mkdir()
    (tmp_path / "sweep" / "docs" / "curves.png").touch()
    rows = synthesize(tmp_path / "sweep", "--all").rows
    assert {row["name"]: row["state"] for row in rows} == {"new": "not started", "lost": "unreadable"}
    assert not (tmp_path / "sweep" / "results.png").exists()
    (row,) = synthesize(experiment(tmp_path / "alone", [0.1, None])).rows
    assert (row["name"], row["mIoU"]) == ("alone", "0.100")


def test_mistakes_are_one_line(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    sweep = experiment(tmp_path / "sweep" / "trial", [0.3]).parent
    for folder, flags, words in (
        (empty, [], "holds no experiments, which are folders with a params.json"),
        (tmp_path / "nowhere", [], "no folder"),
        (sweep, ["--sort", "miou"], "--sort miou: no such column; there are name, "),
    ):
        with pytest.raises(UserError, match=words):
            synthesize(folder, *flags)
    publish(sweep, {"params": {"kernel_size": 7}, "mIoU": 72.8})
    with pytest.raises(UserError, match=r"72\.8"):
        synthesize(sweep)
    assert not list(empty.iterdir()) and not list(sweep.glob("results.*"))


def test_names_cannot_break_table_or_plot(tmp_path):
    names = ['a|b, "c"', "two\nlines", "$x$_$", "_hidden", "実験", "1e3"]
    for rank, name in enumerate(names):
        experiment(
            tmp_path / "sweep" / name, [0.9 - rank / 10], train_split=f"$\\x$_{rank}", own_size={"x|y": {"mIoU": 1}}
        )
    experiment(tmp_path / "elsewhere" / "linked", [0.05])
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    result = synthesize(tmp_path / "sweep", render=True)
    assert result.err == "" and r" x\|y at own size |" in result.out.splitlines()[0]
    shown = [line.split(" | ")[0].strip("| ") for line in result.out.split("\n\n")[0].splitlines()[2:]]
    assert shown == [r'a\|b, "c"', "two lines", "$x$_$", "_hidden", "実験", "1e3", "link/linked"]
    assert [row["name"] for row in results_csv(tmp_path / "sweep")] == [*names, "link/linked"]
    assert (tmp_path / "sweep" / "results.png").exists()


# ---------------------------------------------------------------------------------------- published figures


def publish(folder: Path, *results: dict) -> None:
    (folder / "published.json").write_text(json.dumps({"source": "A paper, table 1", "results": results}))


def test_published_figures_stand_beside_ours(tmp_path):
    own_size = {"val": {"mIoU": 0.9, "boundary_accuracy": 0.61, "interior_accuracy": None}}
    experiment(tmp_path / "any name", [0.5], head="conv1x1", own_size=own_size)
    experiment(tmp_path / "seven", [0.6], own_size={"val": {"epoch": 2, "boundary_accuracy": 0.5}})  # of another epoch
    experiment(tmp_path / "nine", [0.4], kernel_size=9)
    experiment(tmp_path / "new", kernel_size=13)
    publish(
        tmp_path,
        {"params": {"head": "gcn", "kernel_size": 7}, "mIoU": 0.728},
        {"params": {"head": "gcn", "kernel_size": 13}, "mIoU": 0.74},
        {"params": {"head": "conv1x1"}, "mIoU": 0.69, "boundary_accuracy": 0.713},
    )
    result = synthesize(tmp_path, "--all")
    columns = ["name", "mIoU", "published_mIoU", "boundary_accuracy", "published_boundary_accuracy"]
    columns += ["interior_accuracy"]
    assert [tuple(row[column] for column in columns) for row in result.rows] == [
        ("seven", "0.600", "0.728", "-", "-", "-"),
        ("any name", "0.500", "0.690", "0.610", "0.713", "-"),
        ("nine", "0.400", "-", "-", "-", "-"),
        ("new", "-", "0.740", "-", "-", "-"),
    ]
    assert {"mIoU", "published_mIoU"} < {*result.rows[0]}
    assert "\n\nPublished: A paper, table 1\n\n-> " in result.out
    rows = synthesize(tmp_path, "--all", "--sort", "published_mIoU").rows
    assert [row["name"] for row in rows] == ["new", "seven", "any name", "nine"]


def test_published_figures_are_for_the_runs_of_their_folder_alone(tmp_path):
    for name in ("a", "b"):
        experiment(tmp_path / name / "run", [0.5])
    publish(tmp_path / "a", FIGURE)
    rows = named(tmp_path, "a", "b").rows
    assert {row["name"]: row["published_mIoU"] for row in rows} == {"a/run": "0.700", "b/run": "-"}


@pytest.mark.parametrize(
    "content, words",
    [
        ([], 'must hold one object with "source" and "results"'),
        ({"source": "x", "results": None}, 'must hold one object with "source" and "results"'),
        ({"source": "x", "results": [{"params": {"kernal_size": 7}, "mIoU": 0.7}]}, 'unknown key "kernal_size"'),
        ({"source": "x", "results": [FIGURE, {"params": {}, "miou": 0.7}]}, "from 0 to 1 mIoU, pixel_accuracy"),
    ],
)
def test_faulty_published_figures_are_named(tmp_path, content, words):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_published(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


PAPER = sorted((ROOT / "experiments").glob("paper_*"))


@pytest.mark.parametrize("sweep", PAPER, ids=lambda sweep: sweep.name)
def test_the_trials_of_the_paper_can_be_built_and_every_figure_has_one(sweep):
    import torch

    from model.net import FCN_GCN

    base = json.loads((sweep / "params.json").read_text())
    trials = grid(read_spaces(sweep / "search_space.json"), base, sweep)
    params = [Params.parse(base | values, sweep) for values in trials.values()]
    assert all(each.stem_maxpool and each.gcn_padding == "same" and each.pretrained for each in params)
    assert all((each.resize, each.image_size, each.train_split) == ("letterbox", 512, "trainaug") for each in params)
    assert {each.encoder for each in params} == {"resnet50" if sweep.name == "paper_table6" else "resnet152"}
    published = read_published(sweep / "published.json")
    assert "1703.02719" in published["source"]
    found = [published_columns(published, vars(each)) for each in params]
    for result in published["results"]:
        assert found.count(published_columns({"results": [result]}, result["params"])) == 1
    for each in (params[0], params[-1]):
        with torch.device("meta"):  # shapes alone, as some have 200 million parameters
            FCN_GCN(**each.network_options(), pretrained=False)


# ---------------------------------------------------------------------------------------- several seeds


def test_over_seeds_has_a_row_for_runs_that_differ_in_their_seed_only(tmp_path):
    sweep = tmp_path / "sweep"
    for seed, value in ((1, 0.1), (2, 0.2), (3, 0.6)):
        own_size = {"val": {"mIoU": value + 0.1}} | ({"test": {"mIoU": 0.3}} if seed == 1 else {})
        experiment(sweep / f"batch_size_8__seed_{seed}", [value, 0.05], batch_size=8, seed=seed, own_size=own_size)
    experiment(sweep / "batch_size_8__seed_4", [0.9], batch_size=8, seed=4, num_epochs=2)
    experiment(sweep / "batch_size_8__seed_5", batch_size=8, seed=5, num_epochs=2)
    experiment(sweep / "alone", [0.4, 0.5], seed=7)
    (experiment(sweep / "batch_size_8__seed_6") / "params.json").write_text("{")
    publish(sweep, FIGURE)
    result = synthesize(sweep, "--over_seeds", "--all", render=True)
    rows = result.rows
    assert [row["name"] for row in rows] == ["alone", "batch_size_8", "batch_size_8__seed_6"]
    expected = {
        "state": "3 finished, 1 failed, 1 not started",  # unfinished runs count in no mean
        "mIoU": "0.300 ± 0.265",  # sqrt((0.2^2 + 0.1^2 + 0.3^2) / (3 - 1))
        "test at own size": "-",  # a mean over one of three
        "val at own size": "0.400 ± 0.265",
        "seeds": "1 2 3",
        "batch_size": "8",
        "published_mIoU": "0.700",
    }
    assert [*rows[1].items()][1:8] == [*expected.items()], "in the order of what is looked for first"
    assert float(result.file[1]["mIoU_std"]) == pytest.approx(0.2646, abs=1e-4)
    assert [rows[0][key] for key in ("seeds", "mIoU", "best_epoch")] == ["7", "0.500", "2.0"]
    assert rows[2]["state"] == "1 unreadable" and "seed" not in rows[0]
    assert [row["name"] for row in results_csv(sweep)] == ["alone", "batch_size_8", "batch_size_8__seed_6"]
    finished_only = (sweep / "results.png").read_bytes()
    write_history(sweep / "batch_size_8__seed_4", [epoch(1, 0.3)])
    synthesize(sweep, "--over_seeds", "--all", render=True)
    assert (sweep / "results.png").read_bytes() == finished_only, "the plot is of the runs that the table counts"


def test_what_changes_no_result_is_in_no_table_and_what_a_run_began_from_is(tmp_path):
    for seed, options in ((1, {"num_workers": 0}), (2, {"num_workers": 2, "compile": True, "num_channels": 32})):
        experiment(tmp_path / f"a__seed_{seed}", [0.2 * seed], seed=seed, **options)
        folder = experiment(tmp_path / f"b__seed_{seed}", [0.3 * seed], seed=seed)
        argv = [["train.py", "--init_from=y.pth.tar"], ["train.py", "--init_from", "x.pth.tar"]][seed - 1]
        began = {"argv": argv} | ({"init_from": "0123456789abcdef"} if seed == 1 else {})
        (folder / "run.json").write_text(json.dumps(began))
    rows = {row["name"]: row for row in synthesize(tmp_path).rows}
    assert [rows[f"{name}__seed_{seed}"]["init_from"] for name in "ab" for seed in (1, 2)] == [
        *("-", "-", "y.pth.tar", "x.pth.tar")
    ]
    assert not {"num_workers", "compile", "num_channels"} & {*rows["a__seed_1"]}
    rows = {row["name"]: row for row in synthesize(tmp_path, "--over_seeds").rows}
    assert {name: row["seeds"] for name, row in rows.items()} == {"a": "1 2", "b__seed_1": "1", "b__seed_2": "2"}


def test_a_run_and_its_copy_are_one_seed(tmp_path):
    for name in ("a copy of it", "it"):
        experiment(tmp_path / name, [0.3], seed=1, num_epochs=1 + (name != "it"))
    experiment(tmp_path / "third", [0.5], seed=2)
    shutil.copytree(tmp_path / "it", tmp_path / "twin")
    result = synthesize(tmp_path, "--over_seeds", "--sort", "seeds")
    assert [(row["seeds"], row["mIoU"]) for row in result.rows if row["seeds"] == "1 2"] == [("1 2", "0.400 ± 0.141")]
    assert "twin: finished, not counted, for it has another run of its seed" in result.err
    assert result.err.count("not counted") == 1 and "not counted" not in synthesize(tmp_path).err


@pytest.mark.parametrize(
    "names, expected",  # "name:batch_size", the batch size in place of all that is not the seed
    [
        (["zero:4", "seed_1__zero:8", "seed_2__zero:8"], {"zero": 1, "seed_1__zero": 2}),
        (["seed_1__zero:8", "seed_2__zero:8", "zero:8"], {"zero": 3}),
        (["a__seed_1:4", "a__seed_2:8"], {"a__seed_1": 1, "a__seed_2": 1}),
        (["seed_1/a:4", "seed_2/a:4", "seed_1/b:8"], {"a": 2, "b": 1}),
        (["seed_1:4", "seed_2:4", "TOP:8"], {"seed_1": 2, "TOP": 1}),
        (["seed_1:4", "seed_2:4"], {"TOP": 2}),
        (["gcn_seed_1:4", "mine_seed_1:4", "gcn_seed_2:4", "other:4"], {"gcn": 2, "mine": 1, "other": 1}),  # other code
    ],
)
def test_runs_over_seeds_are_called_by_what_they_share_if_that_is_theirs_alone(tmp_path, names, expected):
    runs = []
    for name, batch_size in (name.split(":") for name in names):
        seed = int(*re.findall(r"seed_(\d)", name)) if "seed_" in name else 9
        runs.append(Run(tmp_path, name.replace("TOP", tmp_path.name), {"seed": seed, "batch_size": batch_size}))
    groups = by_seed(runs, tmp_path.name)
    assert {name.replace(tmp_path.name, "TOP"): len(group) for name, group in groups.items()} == expected
    assert without_seed("deep/precision_bf16__seed_3__head_gcn", 3, "") == "deep/precision_bf16__head_gcn"
    assert without_seed("Mine_Seed=3", 3, "") == "Mine"
    names = {"my_seed_1": "my", "lr3_s1": "lr3", "lr3-seed1": "lr3", "classes1": "classes1", "s12": "s12"}
    assert {name: without_seed(name, 1, "") for name in names} == names


# ---------------------------------------------------------------------------------------- differences


def scored(folder: Path, run: Counts, *splits: str, **params) -> Path:
    """A finished experiment whose best epoch evaluate.py has scored at the photos' own size."""
    total = run.pixels.sum(0)
    metrics = {"mIoU": float(mIoU(total)), "pixel_accuracy": np.trace(total) / total.sum()}
    experiment(folder, [0.5], own_size=dict.fromkeys(splits, metrics), **params)
    cells = [np.stack([each.nonzero()[0], each[each > 0]], 1) for each in run.pixels.reshape(len(run.ids), -1)]
    for split in splits:
        write_counts(folder / f"counts_{split}_best_original_size.npz", run.ids, run.class_names, cells)
    return folder


def test_what_is_of_the_photos_own_size_ranks_among_all_image_sizes(tmp_path):
    runs = [Run(tmp_path, str(size), {"image_size": size}, own_size={"val": {"images": 3}}) for size in (32, 64)]
    for column in ("boundary_mIoU", "published_boundary_mIoU", "val_original_size_mIoU", "val_mIoU_low"):
        assert task(runs[0], column) == task(runs[1], column)
    assert task(runs[0], "mIoU") != task(runs[1], "mIoU")


def test_val_is_optimistic_and_train_was_trained_on_in_whatever_folder():
    splits = ("val", "val@voc", "train", "trainaug@voc", "val2", "test")
    assert [doubt(split) for split in splits] == [*["optimistic"] * 2, *["trained on"] * 2, "", ""]


def test_every_row_is_compared_with_the_baseline_on_every_split(tmp_path):
    rng = np.random.default_rng(0)
    first = simulated(rng, 60, quality=0.2)
    first.pixels[9:, 3] = 0  # a class in few photos
    shared, sweep = first.labelled, tmp_path / "a"
    scored(sweep / "old", first, "val", "test")
    scored(sweep / "good", better := simulated(rng, 60, quality=0.9, shared=shared), "val", "test")
    scored(sweep / "alike", simulated(rng, 60, quality=0.21, shared=shared), "val")
    scored(sweep / "sample", simulated(rng, 20, quality=0.5), "test", dataset="sample")
    experiment(sweep / "unscored", [0.5])
    result = synthesize(sweep, "--baseline", "old", "--by_class")
    file = {row["name"]: row for row in result.file}
    assert {name: (row["val_mIoU_verdict"], row["test_mIoU_verdict"]) for name, row in file.items()} == {
        "old": ("", ""),
        "good": ("better (optimistic, one seed)", "better (one seed)"),
        "alike": ("open", ""),
        "sample": ("", ""),
        "unscored": ("", ""),
    }
    difference = mIoU(better.pixels.sum(0)) - mIoU(first.pixels.sum(0))
    low, high = (float(file["good"][f"test_mIoU_{end}"]) for end in ("low", "high"))
    assert float(file["good"]["test_mIoU_difference"]) == pytest.approx(difference) and 0 < low < difference < high
    said = f"{difference:+.3f} ({low:+.3f} to {high:+.3f}) better (one seed)"
    rows = {row["name"]: row for row in result.rows}
    assert [*rows["good"].items()][1] == ("test: difference", said), "what chose no epoch comes first"
    on_val = "val: difference (optimistic)"
    assert [*rows["old"].items()][1:3] == [("test: difference", "baseline"), (on_val, "baseline")]
    assert rows["alike"]["test: difference"] == "-" and rows["good"][on_val].endswith(") better (one seed)")
    assert "not scored on test by evaluate.py --original_size: alike, unscored" in result.err
    assert "with 95 % intervals (docs/COMPARING.md)" in result.out
    classes = table(result.out.split("\n\n")[-2])
    assert [row["IoU on val"] for row in classes] == NAMES
    of_good = [row["good (optimistic, one seed)"] for row in classes]
    assert [cell.split(" ", 4)[-1] for cell in of_good[:3]] == ["better"] * 3
    assert of_good[3].endswith(" few photos") and "(" not in of_good[3]
    by_folder = synthesize(sweep, "--baseline", str(sweep / "old"), "--metric", "pixel_accuracy", "mIoU")
    file = {row["name"]: row for row in by_folder.file}
    assert file["good"]["test_mIoU_verdict"] == file["good"]["test_pixel_accuracy_verdict"] == "better (one seed)"
    accuracy = [np.trace(run.pixels.sum(0)) / run.pixels.sum() for run in (better, first)]
    assert float(file["good"]["test_pixel_accuracy_difference"]) == pytest.approx(accuracy[0] - accuracy[1])
    assert "test: pixel_accuracy difference" in by_folder.rows[0]
    for pattern, word in (("^.", "better (one seed)"), ("^[0-5]?", "few groups")):  # ten groups, seven
        grouped = synthesize(sweep, "--baseline", "old", "--group", pattern)
        assert {row["name"]: row["test_mIoU_verdict"] for row in grouped.file}["good"] == word
    file = sweep / "old" / "metrics_test_best_original_size.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"group": "^[0-5]?"}))
    note = "test has 7 groups, photos for whose names `^[0-5]?` captures the same text."
    for flags, word in (((), "few groups"), (("--group", ".*"), "better (one seed)")):
        grouped = synthesize(sweep, "--baseline", "old", *flags)
        assert {row["name"]: row["test_mIoU_verdict"] for row in grouped.file}["good"] == word
        assert (note in grouped.out) == (note in (sweep / "results.html").read_text()) == (not flags)
    other = (
        sweep / "good" / file.name
    )  # the note of any row counts, as others may have been scored before there was one
    for noted in ({"old": None, "good": "^[0-5]?"}, {"old": "^.", "good": "^[0-5]?"}):
        for path, group in ((file, noted["old"]), (other, noted["good"])):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"group": group}))
        if noted["old"]:
            with pytest.raises(
                UserError, match=r"scored on test in several groups \(\^\., \^\[0-5\]\?\); give --group"
            ):
                synthesize(sweep, "--baseline", "old")
        else:
            assert note in synthesize(sweep, "--baseline", "old").out
    with pytest.raises(UserError, match="--group '5' does not match '0'"):
        synthesize(sweep, "--baseline", "old", "--group", "5")


def test_scores_of_other_weights_than_the_best_epochs_are_not_shown_nor_compared(tmp_path):
    """As after a resume from an earlier checkpoint, where the number of the best epoch is the same again."""
    rng = np.random.default_rng(3)
    first = simulated(rng, 60, quality=0.2)
    for name, quality in (("old", 0.2), ("new", 0.9)):
        scored(tmp_path / name, simulated(rng, 60, quality=quality, shared=first.labelled), "val")
        digest(tmp_path / name, "metrics_val_best_weights.json", name)
        digest(tmp_path / name, "metrics_val_best_original_size.json", name)
    rows = {row["name"]: row for row in synthesize(tmp_path, "--baseline", "old").file}
    assert rows["new"]["val_mIoU_verdict"].startswith("better")
    digest(tmp_path / "new", "metrics_val_best_weights.json", "of another network")
    result = synthesize(tmp_path, "--baseline", "old")
    rows = {row["name"]: row for row in result.rows}
    assert rows["new"]["val at own size"] == "-" and rows["new"]["val: difference (optimistic)"] == "-"
    assert result.err == (
        "not scored on val by evaluate.py --original_size: new\n"
        "new: finished, metrics_val_best_original_size.json: not of the weights of the best epoch; "
        "score again with evaluate.py\n"
    )
    with pytest.raises(UserError, match=r"new \(finished\): it needs finished runs with counts of photos; score each"):
        synthesize(tmp_path, "--baseline", "new")


def digest(folder: Path, file: str, weights: str) -> None:
    """Let a file of metrics be of weights."""
    metrics = json.loads((folder / file).read_text()) if (folder / file).exists() else {"epoch": 1}
    (folder / file).write_text(json.dumps(metrics | {"weights": weights}))


def test_train_comes_last_and_is_said_to_be_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    first = simulated(rng, 60, quality=0.2)
    for name, run in (("old", first), ("new", simulated(rng, 60, quality=0.9, shared=first.labelled))):
        scored(tmp_path / name, run, "train", "val", "a test")
    result = synthesize(tmp_path, "--baseline", "old")
    columns = ["a test: difference", "val: difference (optimistic)", "train: difference (trained on)"]
    assert [*result.rows[0]][1:4] == columns
    assert [result.rows[0][column].split(") ")[1] for column in columns] == ["better (one seed)"] * 3
    assert result.file[0]["train_mIoU_verdict"] == "better (trained on, one seed)"


def test_counts_that_are_damaged_cost_no_table(tmp_path):
    run = simulated(np.random.default_rng(0), 20, quality=0.5)
    for name in ("a", "b"):
        scored(tmp_path / name, run, "val")
    (tmp_path / "a" / "counts_val_best_original_size.npz").write_text("junk")
    result = synthesize(tmp_path)
    assert len(result.rows) == 2 and "a: finished, " in result.err and "is damaged" in result.err
    page = (tmp_path / "results.html").read_text()
    assert "Confusion of b" in page and "Confusion of a" not in page
    shutil.rmtree(tmp_path / "b")
    for file in tmp_path.glob("results.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"--gallery test: no run was scored on it by .*, only on val"):
        synthesize(tmp_path, "--gallery", "test")
    assert not [*tmp_path.glob("results.*")]


def test_nothing_is_said_of_few_photos(tmp_path):
    rng = np.random.default_rng(0)
    shared = simulated(rng, 9, quality=0.2).labelled
    for name, quality in (("old", 0.1), ("new", 0.9)):
        scored(tmp_path / name, simulated(rng, 9, quality=quality, shared=shared), "val")
    result = synthesize(tmp_path, "--baseline", "old")
    (new, _), (said, _) = result.file, result.rows
    assert new["val_mIoU_verdict"] == "few photos" and "val_mIoU_low" not in new
    assert float(new["val_mIoU_difference"]) > 0.2 and said["val: difference (optimistic)"].count(" ") == 2


def test_seeds_are_compared_as_one(tmp_path):
    rng = np.random.default_rng(1)
    shared = simulated(rng, 60, quality=0.4).labelled
    for name, quality in (("old", 0.4), ("new", 0.7)):
        for seed in (1, 2, 3):
            run = simulated(rng, 60, quality=quality + seed / 100, shared=shared)
            scored(tmp_path / f"{name}__seed_{seed}", run, "test", seed=seed, batch_size=1 + (name == "old"))
    rows = synthesize(tmp_path, "--over_seeds", "--baseline", "old").file
    assert [(row["name"], row["seeds"], row["test_mIoU_verdict"]) for row in rows] == [
        ("new", "1 2 3", "better"),
        ("old", "1 2 3", ""),
    ]
    # Run by run: what a seed changes is known from the others.
    rows = synthesize(tmp_path, "--baseline", "old__seed_1").file
    assert {row["name"]: row["test_mIoU_verdict"] for row in rows} == {
        "old__seed_1": "",
        **{f"old__seed_{seed}": "open" for seed in (2, 3)},
        **{f"new__seed_{seed}": "better" for seed in (1, 2, 3)},
    }
    (tmp_path / "new__seed_2" / "counts_test_best_original_size.npz").unlink()
    rows = synthesize(tmp_path, "--over_seeds", "--baseline", "old").rows
    assert {row["test: difference"] for row in rows} == {"baseline", "-"}, "not by the two that were counted"


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    rng = np.random.default_rng(2)
    scored(tmp_path / "old", simulated(rng, 9, quality=0.5), "val")
    scored(tmp_path / "other", simulated(rng, 8, quality=0.5), "val")
    experiment(tmp_path / "bare", [0.5])
    for name, said in (
        ("older", "--baseline older: the table has no row of that name"),
        ("bare", r"--baseline bare \(finished\): it needs finished runs with counts of photos; score each"),
        ("old", "old and other were scored on different photos"),
    ):
        with pytest.raises(UserError, match=said):
            synthesize(tmp_path, "--baseline", name)
    with pytest.raises(SystemExit):
        synthesize(tmp_path, "--by_class")
    old, other = (tmp_path / name / "counts_val_best_original_size.npz" for name in ("old", "other"))
    old.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=f"{old} is of another evaluation than the metrics"):
        synthesize(tmp_path, "--baseline", "old")
    assert not list(tmp_path.glob("results.*"))


def test_the_table_shows_what_was_trained_with_and_names_what_was_edited_since(trained, tmp_path):
    """People edit params.json to begin the next run."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"learning_rate": 0.5, "num_epochs": 99}))
    run = read(folder, tmp_path)
    assert (run.params["learning_rate"], run.state) == (1e-6, "finished")
    assert run.problem.endswith("the table does not show it: learning_rate, num_epochs")


def test_runs_on_other_photos_or_masks_of_one_folder_are_not_ranked_among_each_other(tmp_path):
    """As after new lists, or masks that were corrected, between two runs."""
    for name, score, share in (("a", 0.5, 0.25), ("b", 0.7, 0.5), ("c", 0.6, 0.25)):
        metrics = {"images": 3, "frequency": {"cat": share, "dog": 1 - share}}
        folder = experiment(tmp_path / name, [score], own_size={"val": {"mIoU": score} | metrics})
        (folder / "metrics_val_best_weights.json").write_text(json.dumps(metrics))
    for column in ("mIoU", "val_original_size_mIoU"):
        found = synthesize(tmp_path, "--sort", column)
        assert [row["name"] for row in found.rows] == ["c", "a", "b"]
        assert found.err == "b: finished, val had other photos or masks than for a: not comparable\n"


# ---------------------------------------------------------------------------------------- what is asked for


def test_runs_can_be_named_and_the_table_fits_a_terminal(tmp_path, monkeypatch):
    """With twenty rows that differ in a dozen keys; folders of other places are called by what is not common."""
    for number in range(20):
        options = {"learning_rate": 0.1 / (number + 1), "batch_size": number + 1, "image_size": 32 + number}
        options |= {"weight_decay": number / 100, "momentum": number / 100, "seed": number}
        own_size = {split: {"mIoU": number / 30} for split in ("val", "test")}
        experiment(tmp_path / "sweep" / f"learning_rate_{number}", [number / 20], own_size=own_size, **options)
    experiment(tmp_path / "other" / "run", [0.7])
    experiment(tmp_path / "unnamed", [0.8])
    monkeypatch.chdir(tmp_path)
    command = ["synthesize_results.py", "sweep", "other/run", "other/run/"]
    monkeypatch.setattr(sys, "argv", command)
    with redirect_stdout(io.StringIO()) as out:
        synthesize_results.main(synthesize_results.parse_args())
    assert max(map(len, out.getvalue().splitlines())) <= 120
    rows = table(out.getvalue().split("\n\n")[0])
    assert len(rows) == 21 and {"other/run", "sweep/learning_rate_3"} < {row["name"] for row in rows}
    assert [*rows[0]][:4] == ["name", "mIoU", "test at own size", "val at own size"]
    left_out = out.getvalue().split("\n\n")[1]
    assert left_out.startswith("results.html and .csv also have ") and "weight_decay" in left_out.replace("\n", " ")
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {
        *("results.html", "results.md", "results.csv", "results.tex", "results.png")
    }
    latex = (tmp_path / "results" / "results.tex").read_text()
    assert latex.count(r"\\") == 22 and r"sweep/learning\_rate\_3 " in latex and r"\toprule" in latex
    monkeypatch.setattr(sys, "argv", [*command, "--parent_dir", "other"])
    with pytest.raises(SystemExit):
        synthesize_results.parse_args()


def test_names_begin_where_the_folders_part_also_below_a_link_and_one_table_can_be_sorted_alone(tmp_path):
    for name, rate, data in (("a", 0.2, "voc"), ("b", 0.1, "voc"), ("c", 0.1, "sample")):
        experiment(tmp_path / "real" / "deep" / name, [rate], learning_rate=rate, dataset=data)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert [row["name"] for row in named(tmp_path, "link/a", "link/b").rows] == ["a", "b"]
    rows = named(tmp_path, "link", "link/a", "--sort", "learning_rate").rows
    assert [row["name"] for row in rows] == ["link/b", "link/a", "link/c"]
