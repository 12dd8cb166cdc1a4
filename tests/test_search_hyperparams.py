"""Whole sweeps, with a train.py for every trial."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY, make_data, paused, run_script, start_script

import search_hyperparams
from model import UserError
from utils import read_history, write_history, write_json


def make_sweep(folder: Path, space, **params) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(TINY | {"num_epochs": 1, "gcn_padding": "same"} | params))
    (folder / "search_space.json").write_text(json.dumps(space))
    return folder


def arguments(sweep: Path, data: Path, *more) -> list[str]:
    return ["--parent_dir", str(sweep), "--data_dir", str(data), *map(str, more)]


def start(sweep: Path, data: Path, *more) -> subprocess.Popen:
    return start_script("search_hyperparams.py", *arguments(sweep, data, *more))


def search(sweep: Path, data: Path, *more, check: int = 0) -> subprocess.CompletedProcess:
    return run_script("search_hyperparams.py", *arguments(sweep, data, *more), check=check)


def trials(sweep: Path) -> list[str]:
    return sorted(path.parent.name for path in sweep.glob("*/params.json"))


def logged(trial: Path, words: str) -> int:
    """How often a trial's train.log says something."""
    log = trial / "train.log"
    return len(re.findall(words, log.read_text())) if log.exists() else 0


def train_processes(folder: Path) -> list[int]:
    """The train.py processes of the trials in a folder or below: their stderr is the log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            log = Path(os.readlink(process / "fd" / "2").removesuffix(" (deleted)"))
            if log.name == "train.log" and folder in log.parents:
                found.append(int(process.name))
    return found


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data")


def test_a_sweep_trains_every_trial_and_those_that_fail_do_not_hinder_the_others(tmp_path):
    data_dir = make_data(tmp_path / "data")
    sweep = make_sweep(tmp_path / "my sweep; $(echo)", {"batch_size": [7, 2, 3, 4]})
    (sweep / "batch_size_4").write_text("in the way\n")
    result = search(sweep, data_dir, "--jobs", 2, check=1)
    assert trials(sweep) == ["batch_size_2", "batch_size_3", "batch_size_7"]
    best = {size: read_history(sweep / f"batch_size_{size}")[0]["val"]["mIoU"] for size in (2, 3)}
    for size, mIoU in best.items():
        assert f"batch_size_{size}: finished, best mIoU {mIoU:.4f} at epoch 1\n" in result.stdout
        resolved = json.loads((sweep / f"batch_size_{size}" / "run.json").read_text())["params"]
        assert resolved["batch_size"] == size and resolved["gcn_padding"] == "same"
    fault = 'train.py: error: "batch_size" is 7, but train has 6 images; lower it'
    assert f"batch_size_7: failed, exit status 2\n    {fault}\n" in result.stdout
    trial = json.loads((sweep / "batch_size_7" / "trial.json").read_text())
    assert trial == {"state": "failed", "reason": ["exit status 2", fault]}
    assert "batch_size_4: failed, [Errno " in result.stdout and result.stderr == ""
    winner = max(best, key=best.get)
    assert f"4 trials: 2 finished, 2 failed; best mIoU {best[winner]:.4f} by batch_size_{winner}\n" in result.stdout
    assert f"own size: python evaluate.py --model_dir '{sweep}' --original_size\n" in result.stdout
    assert result.stdout.endswith(f"synthesize_results.py --parent_dir '{sweep}'\n")

    # Again: the failed ones alone, which by now can succeed.
    (sweep / "batch_size_4").unlink()
    before = {trial: (sweep / trial / "last.pth.tar").stat() for trial in ("batch_size_2", "batch_size_3")}
    shutil.rmtree(data_dir)
    result = search(sweep, make_data(data_dir, train=14))
    assert "4 trials: 4 finished; best mIoU" in result.stdout and "batch_size_2: finished" not in result.stdout
    assert {trial: (sweep / trial / "last.pth.tar").stat() for trial in before} == before


def test_a_sweep_killed_midway_and_started_again_finishes_each_trial_once(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.001, 0.0001]}, num_epochs=2)
    process = start(sweep, data_dir)
    first, second, third = (sweep / f"learning_rate_{rate}" for rate in (0.01, 0.001, 0.0001))
    wait_until(lambda: logged(second, "on cpu in fp32"))
    with paused(*train_processes(second)):
        process.kill()
        process.communicate()
        assert len(read_history(first)) == 2 and not third.exists()
        refusal = search(sweep, data_dir, check=2).stderr
        assert refusal.endswith(f"another train.py is at work in {second}; wait for it, or stop it first\n")
    wait_until(lambda: not train_processes(sweep))
    assert "3 trials: 3 finished" in search(sweep, data_dir).stdout
    for trial in (first, second, third):
        assert [epoch["epoch"] for epoch in read_history(trial)] == [1, 2]
        assert [logged(trial, f"epoch {epoch}/2") for epoch in (1, 2)] == [1, 1]


def test_an_interrupt_ends_every_trial_and_the_same_command_resumes_them(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.001]}, num_epochs=8)
    process = start(sweep, data_dir, "--jobs", 2)
    folders = [sweep / f"learning_rate_{rate}" for rate in (0.01, 0.001)]
    wait_until(lambda: all((trial / "last.pth.tar").exists() for trial in folders))
    with paused(*train_processes(sweep)):
        refusal = search(sweep, data_dir, check=2).stderr
    assert refusal.endswith(f"another search_hyperparams.py is at work in {sweep}; wait for it, or stop it first\n")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and not train_processes(sweep)
    assert stderr == "search_hyperparams.py: error: interrupted; the same command resumes the sweep\n", stdout

    assert "2 trials: 2 finished" in search(sweep, data_dir).stdout
    for trial in folders:
        assert [epoch["epoch"] for epoch in read_history(trial)] == list(range(1, 9))
        assert logged(trial, "epoch 1/8") == 1


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_moments_runs_every_trial_once(tmp_path, data_dir):
    """Half of the kills are of the coordinator alone, the others of its trials too."""
    sweep = make_sweep(tmp_path / "sweep", {"seed": {"low": 1, "high": 99}}, encoder="resnet18", num_epochs=6)
    command = sweep, data_dir, "--jobs", 2, "--sampler", "random", "--n_trials", 6
    for kill in range(20):
        process = start(*command)
        time.sleep(random.uniform(0, 8))
        process.kill()
        process.communicate()
        for number in train_processes(sweep) if kill % 2 else ():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        wait_until(lambda: not train_processes(sweep))
    assert "6 trials: 6 finished" in search(*command).stdout
    assert len(trials(sweep)) == 6
    for trial in sweep.glob("seed_*"):
        assert [epoch["epoch"] for epoch in read_history(trial)] == [1, 2, 3, 4, 5, 6]
        assert logged(trial, "trained 6 of 6 epochs; best") <= 1, "none was trained again"


@pytest.mark.parametrize(
    "space, values, metric, said",
    [  # the values of seeds 1, 2, 3, then those of the next setting
        (
            {"seed": [1, 2, 3], "momentum": [0.5, 0.9]},
            [0.9, 0.1, 0.2, 0.5, 0.5, None],
            "mIoU",
            "0.5000 by momentum_0.9, mean of 2 seeds",
        ),
        (
            {"seed": [1, 2, 3], "momentum": [0.5, 0.9]},
            [0.9, 0.1, 0.2, 0.5, 0.5, 0.5],
            "loss",
            "0.4000 by momentum_0.5, mean of 3 seeds",
        ),
        ({"seed": [1, 2, 3]}, [0.1, 0.2, 0.6], "mIoU", "0.3000 by sweep, mean of 3 seeds"),
        ({"name": "new", "seed": [1, 2]}, [0.1, 0.2], "mIoU", "0.1500 by new, mean of 2 seeds"),
        ({"momentum": [0.5, 0.9]}, [0.9, 0.1], "mIoU", "0.9000 by momentum_0.5"),
    ],
)
def test_the_best_of_a_sweep_is_a_mean_over_seeds_where_they_vary(
    tmp_path, data_dir, monkeypatch, capsys, space, values, metric, said
):
    sweep = make_sweep(tmp_path / "sweep", space, best_metric=metric)
    base = json.loads((sweep / "params.json").read_text())
    monkeypatch.setattr("sys.argv", ["search_hyperparams.py", *arguments(sweep, data_dir)])
    args = search_hyperparams.parse_args()
    trials = search_hyperparams.make_coordinator(args).trials
    for name, value in zip(sorted(trials), values, strict=True):  # momentum before seed, as in the names
        (folder := sweep / name).mkdir()
        write_json(folder / "params.json", base | trials[name])
        write_json(folder / "trial.json", {"state": "failed" if value is None else "finished"})
        write_history(folder, [{"epoch": 1, "val": {metric: value}}])
    assert search_hyperparams.print_summary(search_hyperparams.make_coordinator(args)) == (None in values)
    out = capsys.readouterr().out
    assert f"; best {metric} {said}\n" in out
    assert f"evaluate.py --model_dir {sweep} --original_size\n" in out
    assert out.endswith(f"--parent_dir {sweep}{' --over_seeds' * ('seed' in space)}\n")


@pytest.mark.parametrize(
    "space, more, words",
    [
        ({"seed": [1]}, ["--sampler", "random"], "--n_trials goes with --sampler random or tpe"),
        ({"seed": [1]}, ["--n_trials", "3"], "--n_trials goes with --sampler random or tpe"),
        ({"seed": [1]}, ["--sampler", "tpe", "--n_trials", "0"], "'0' is not a number of at least 1"),
        ({"seed": [1]}, ["--jobs", "3"], "--jobs 3: every trial has a GPU to itself, and there are 2; lower it"),
        ({"seed": [1]}, ["--data_dir", "nowhere"], "no folder nowhere; say where the data set is with --data_dir"),
        ({"seed": [1]}, ["--parent_dir", "nowhere"], "no nowhere/params.json"),
        ({"seed": [1], "batch_size": [2, "4"]}, [], '"batch_size" is "4"; allowed: an integer'),
    ],
)
def test_a_mistake_is_named_and_starts_nothing(tmp_path, data_dir, monkeypatch, capsys, space, more, words):
    sweep = make_sweep(tmp_path / "sweep", space)
    before = sorted(sweep.rglob("*"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("sys.argv", ["search_hyperparams.py", *arguments(sweep, data_dir, *more)])
    with pytest.raises((UserError, SystemExit)) as error:
        search_hyperparams.main(search_hyperparams.parse_args())
    assert words in capsys.readouterr().err + str(error.value) and sorted(sweep.rglob("*")) == before
