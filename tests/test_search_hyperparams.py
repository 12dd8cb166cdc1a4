"""Whole sweeps, with a train.py for every trial."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_data, run_script
from optuna.trial import TrialState

from sweep.study import Study, open_storage, trial_name
from utils import is_locked, lock, read_history


def make_sweep(folder: Path, space, **params) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(TINY | {"num_epochs": 1, "stem_maxpool": True} | params))
    (folder / "search_space.json").write_text(json.dumps(space))
    return folder


def arguments(sweep: Path, data: Path, *more) -> list[str]:
    return ["--parent_dir", str(sweep), "--data_dir", str(data), *map(str, more)]


def start(sweep: Path, data: Path, *more, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "search_hyperparams.py"), *arguments(sweep, data, *more)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def search(sweep: Path, data: Path, *more, check: int = 0, **environment: str) -> subprocess.CompletedProcess:
    return run_script("search_hyperparams.py", *arguments(sweep, data, *more), check=check, **environment)


def trials(sweep: Path) -> list[str]:
    return sorted(path.parent.name for path in sweep.glob("*/params.json"))


def logged(trial: Path, words: str) -> int:
    """How often a trial's train.log says something."""
    log = trial / "train.log"
    return len(re.findall(words, log.read_text())) if log.exists() else 0


def train_processes(folder: Path) -> list[Path]:
    """/proc folders of the train.py processes that work in a folder or below."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        paths = [Path(argument) for argument in command.split("\0")]
        if ROOT / "train.py" in paths and any(path == folder or folder in path.parents for path in paths):
            found.append(process)
    return found


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data")


def test_a_sweep_trains_every_trial_and_one_that_fails_does_not_hinder_the_others(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "my sweep; $(echo)", {"batch_size": [7, 2, 3]})
    result = search(sweep, data_dir, "--jobs", 2, check=1)
    assert trials(sweep) == ["batch_size_2", "batch_size_3", "batch_size_7"]
    best = {size: read_history(sweep / f"batch_size_{size}")[0]["val"]["mIoU"] for size in (2, 3)}
    for size, mIoU in best.items():
        assert f"batch_size_{size}: finished, best mIoU {mIoU:.4f} at epoch 1\n" in result.stdout
        resolved = json.loads((sweep / f"batch_size_{size}" / "run.json").read_text())["params"]
        assert resolved["batch_size"] == size and resolved["stem_maxpool"] is True
    fault = 'train.py: error: "batch_size" is 7, but train has 6 images; lower it'
    assert f"batch_size_7: failed, exit status 2\n    {fault}\n" in result.stdout
    assert json.loads((sweep / "batch_size_7" / "trial.json").read_text())["reason"] == ["exit status 2", fault]
    winner = max(best, key=best.get)
    assert f"3 trials: 2 finished, 1 failed; best mIoU {best[winner]:.4f} by batch_size_{winner}\n" in result.stdout
    assert f"synthesize_results.py --parent_dir '{sweep}'" in result.stdout
    assert result.stderr == ""

    # Again: the failed one alone, which by now can succeed.
    before = {trial: (sweep / trial / "last.pth.tar").stat() for trial in ("batch_size_2", "batch_size_3")}
    more_data = make_data(tmp_path / "more", train=14)
    search(sweep, more_data)
    assert {trial: (sweep / trial / "last.pth.tar").stat() for trial in before} == before
    assert len(read_history(sweep / "batch_size_7")) == 1 and not (sweep / "batch_size_7" / "trial.json").exists()
    assert list((sweep / ".locks").iterdir()) == []

    # And again: nothing is left to do.
    result = search(sweep, more_data)
    assert "3 trials: 3 finished; best mIoU" in result.stdout and "batch_size_2: finished" not in result.stdout


def test_a_sweep_killed_midway_and_started_again_finishes_each_trial_once(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01, 0.001]}, num_epochs=2)
    process = start(sweep, data_dir)
    first, second, third = (sweep / f"learning_rate_{rate}" for rate in (0.1, 0.01, 0.001))
    wait_until(lambda: logged(second, "on cpu in fp32"))
    process.kill()
    process.communicate()
    assert len(read_history(first)) == 2 and not third.exists()
    assert train_processes(sweep), "the trial at work goes on by itself"
    assert is_locked(sweep / ".locks" / second.name), "and keeps others away"
    result = search(sweep, data_dir)
    assert "3 trials: 3 finished" in result.stdout
    for trial in (first, second, third):
        assert [epoch["epoch"] for epoch in read_history(trial)] == [1, 2]
        assert [logged(trial, f"epoch {epoch}/2") for epoch in (1, 2)] == [1, 1]
        assert logged(trial, "on cpu in fp32") == 1, "started once"
    assert not train_processes(sweep)


def test_an_interrupt_ends_every_trial_and_the_same_command_goes_on(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01]}, num_epochs=5)
    process = start(sweep, data_dir, "--jobs", 2, CUDA_VISIBLE_DEVICES="5,GPU-7")
    folders = [sweep / f"learning_rate_{rate}" for rate in (0.1, 0.01)]
    wait_until(lambda: all((folder / "last.pth.tar").exists() for folder in folders))
    devices = [
        variable
        for path in train_processes(sweep)
        for variable in (path / "environ").read_text().split("\0")
        if variable.startswith("CUDA_VISIBLE_DEVICES=")
    ]
    assert sorted(devices) == ["CUDA_VISIBLE_DEVICES=5", "CUDA_VISIBLE_DEVICES=GPU-7"]
    assert len(list((sweep / ".locks").glob("gpu-*"))) == 2
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not train_processes(sweep)
    assert stderr == "interrupted; trials stopped: 2; the same command goes on\n", stdout
    assert not any(is_locked(path) for path in (sweep / ".locks").iterdir())

    assert "2 trials: 2 finished" in search(sweep, data_dir, "--jobs", 2).stdout
    for folder in folders:
        assert [epoch["epoch"] for epoch in read_history(folder)] == [1, 2, 3, 4, 5]
        assert logged(folder, "epoch 1/5") == 1 and logged(folder, "continuing after epoch [1-4]") == 1


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_a_killed_trial_leaves_the_others(tmp_path, data_dir, postgresql):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01, 0.001, 0.0001]})
    storage = ("--storage", postgresql)
    processes = [start(sweep, data_dir, *storage) for _ in range(2)]
    victim = sweep / "learning_rate_0.1"
    wait_until(lambda: logged(victim, "on cpu"))
    for path in train_processes(victim):
        os.kill(int(path.name), signal.SIGKILL)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for stdout, stderr in outputs:
        assert stderr == "" and "4 trials: 3 finished, 1 failed" in stdout
        assert "learning_rate_0.1: failed, killed by SIGKILL: " in stdout
    said = "".join(stdout for stdout, _ in outputs)
    for rate in (0.01, 0.001, 0.0001):
        folder = sweep / f"learning_rate_{rate}"
        assert logged(folder, "on cpu") == 1 and said.count(f"{folder.name}: finished") == 1
    assert not (sweep / "study.journal").exists()


def test_a_trial_that_was_given_to_another_process_is_stopped(tmp_path, data_dir, postgresql):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1]}, num_epochs=1000)
    process = start(sweep, data_dir, "--storage", postgresql)
    trial = sweep / "learning_rate_0.1"
    wait_until(lambda: logged(trial, "epoch 1/1000"))
    base = json.loads((sweep / "params.json").read_text())
    other = Study(open_storage(sweep, postgresql), sweep, base, grid={trial.name: {"learning_rate": 0.1}}, shared=True)
    other.finish(0, TrialState.FAIL)
    wait_until(lambda: not train_processes(trial))
    stdout, stderr = process.communicate(timeout=60)
    assert f"{trial.name}: stopped, another process has taken it over" in stdout and stderr == ""


def test_what_is_wrong_with_the_folder_of_a_trial_does_not_hinder_the_others(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01, 0.001]})
    (sweep / "learning_rate_0.1").write_text("in the way\n")
    busy = sweep / "learning_rate_0.01"
    busy.mkdir()
    (busy / "run.json").write_text("{}")
    held = lock(busy / ".lock")  # as a train.py that was started by hand
    result = search(sweep, data_dir, check=1)
    held.release()
    assert "learning_rate_0.1: failed, [Errno " in result.stdout
    assert f"learning_rate_0.01: failed, another train.py is at work in {busy}" in result.stdout
    assert "3 trials: 1 finished, 2 failed" in result.stdout and (busy / "run.json").exists()


@pytest.mark.slow
def test_results_without_a_last_checkpoint_are_taken_up_from_the_best_one(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1]})
    search(sweep, data_dir)
    trial = sweep / "learning_rate_0.1"
    (trial / "last.pth.tar").unlink()
    (trial / "metrics_test_best.json").write_text("{}")
    before = {path: path.read_bytes() for path in trial.iterdir()}
    (sweep / "study.journal").unlink()
    assert "1 trials: 1 finished" in search(sweep, data_dir).stdout
    assert {path: path.read_bytes() for path in trial.iterdir()} == before


def test_prune_ends_a_trial_below_the_median(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [1e-9, *range(1, 6)]}, num_epochs=30)
    base = json.loads((sweep / "params.json").read_text())
    names = {trial_name(values): values for rate in range(1, 6) for values in [{"learning_rate": rate}]}
    for name in names:
        (sweep / name).mkdir()
    earlier = Study(open_storage(sweep, None), sweep, base, grid=names)
    earlier.enqueue_missing()
    for _ in names:
        claim = earlier.claim()
        for epoch in range(1, 31):
            claim.trial.report(0.9, epoch)
        earlier.finish(claim.trial.number, TrialState.COMPLETE, 0.9)
    result = search(sweep, data_dir, "--prune")
    hopeless = sweep / "learning_rate_1e-09"
    assert f"{hopeless.name}: pruned after epoch " in result.stdout
    assert "6 trials: 5 finished, 1 pruned; best mIoU 0.9000" in result.stdout
    assert 1 <= len(read_history(hopeless)) < 30
    assert json.loads((hopeless / "trial.json").read_text())["state"] == "pruned"


# ---------------------------------------------------------------------------------------- mistakes, before any trial


@pytest.mark.parametrize(
    "more, words",
    [
        (["--sampler", "random"], "--n_trials goes with --sampler random or tpe"),
        (["--n_trials", 3], "--n_trials goes with --sampler random or tpe"),
        (["--sampler", "tpe", "--n_trials", 0], "'0' is not a number of at least 1"),
        (["--jobs", "many"], "'many' is not a number of at least 1"),
        (["--sampler", "grit"], "invalid choice: 'grit'"),
        (["--jobs", 3], "--jobs 3: every trial has a GPU to itself, and there are 2; lower it"),
        (["--storage", "nonsense"], "--storage: Could not parse SQLAlchemy URL"),
        (["--data_dir", "nowhere"], "no folder nowhere; say where the data set is with --data_dir"),
        (["--parent_dir", "nowhere"], "no nowhere/params.json"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path, data_dir, more, words):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1]})
    before = sorted(sweep.rglob("*"))
    result = search(sweep, data_dir, *more, check=2, CUDA_VISIBLE_DEVICES="0,1")
    assert words in result.stderr and result.stderr.splitlines()[-1].startswith("search_hyperparams.py: error: ")
    assert "Traceback" not in result.stderr and sorted(sweep.rglob("*")) == before


def test_a_fault_anywhere_in_the_space_stops_the_sweep_before_it_begins(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01], "batch_size": [2, 3, "4"]})
    result = search(sweep, data_dir, check=2)
    assert result.stderr.count("\n") == 1 and '"batch_size" is "4"; allowed: an integer' in result.stderr
    assert trials(sweep) == [] and not (sweep / "study.journal").exists()


def test_a_folder_that_holds_another_experiment_is_left_alone(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01]})
    (sweep / "learning_rate_0.01").mkdir()
    (sweep / "learning_rate_0.01" / "params.json").write_text('{"learning_rate": 0.02}')
    result = search(sweep, data_dir, check=2)
    assert "learning_rate_0.01/params.json is not what base and search space say; move" in result.stderr
    assert {path.name for path in sweep.iterdir()} == {"params.json", "search_space.json", "learning_rate_0.01"}
