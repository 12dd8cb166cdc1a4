"""Whole sweeps, with a train.py for every trial."""

import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_data, make_experiment, paused, run_script, start_script

from sweep.space import trial_name
from sweep.study import Study
from utils import is_locked, lock, read_history


def make_sweep(folder: Path, space, **params) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(TINY | {"num_epochs": 1, "stem_maxpool": True} | params))
    (folder / "search_space.json").write_text(json.dumps(space))
    return folder


def arguments(sweep: Path, data: Path, *more) -> list[str]:
    return ["--parent_dir", str(sweep), "--data_dir", str(data), *map(str, more)]


def start(sweep: Path, data: Path, *more) -> subprocess.Popen:
    return start_script("search_hyperparams.py", *arguments(sweep, data, *more))


def search(sweep: Path, data: Path, *more, check: int = 0, **environment: str) -> subprocess.CompletedProcess:
    return run_script("search_hyperparams.py", *arguments(sweep, data, *more), check=check, **environment)


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
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.001, 0.0001]}, num_epochs=2)
    process = start(sweep, data_dir)
    first, second, third = (sweep / f"learning_rate_{rate}" for rate in (0.01, 0.001, 0.0001))
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


def test_an_interrupt_ends_the_trial_and_the_same_command_goes_on(tmp_path, data_dir):
    """Nothing is forked here: Python starts for the sweep and for its trial, as for a user."""
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01]}, num_epochs=15)
    (sweep / ".locks").mkdir()
    other = lock(sweep / ".locks" / f"gpu-{platform.node()}-5")  # as of a trial that has this GPU
    command = [sys.executable, str(ROOT / "search_hyperparams.py"), *arguments(sweep, data_dir)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "5,GPU-7"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    trial = sweep / "learning_rate_0.01"
    wait_until((trial / "last.pth.tar").exists)
    (number,) = train_processes(sweep)
    assert "CUDA_VISIBLE_DEVICES=GPU-7" in Path(f"/proc/{number}/environ").read_text().split("\0")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not train_processes(sweep)
    assert stderr == "interrupted; the same command resumes the sweep\n", stdout
    other.release()
    assert not any(is_locked(path) for path in (sweep / ".locks").iterdir())

    assert "1 trial: 1 finished" in search(sweep, data_dir).stdout
    assert [epoch["epoch"] for epoch in read_history(trial)] == list(range(1, 16))
    assert logged(trial, "epoch 1/15") == 1 and logged(trial, "continuing after epoch") == 1


def test_what_is_wrong_with_the_folder_of_a_trial_does_not_hinder_the_others(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01, 0.001, 2]})
    (sweep / "learning_rate_0.1").write_text("in the way\n")
    (sweep / "learning_rate_2").mkdir()
    os.mkfifo(sweep / "learning_rate_2" / "train.log")
    busy = sweep / "learning_rate_0.01"
    busy.mkdir()
    (busy / "run.json").write_text("{}")
    (busy / "train.log").write_text("what an earlier attempt said\n")
    held = lock(busy / ".lock")  # as a train.py that was started by hand
    result = search(sweep, data_dir, check=1)
    held.release()
    assert "learning_rate_0.1: failed, [Errno " in result.stdout
    assert "train.log is not a regular file" in result.stdout and "earlier attempt" not in result.stdout
    assert f"another train.py is at work in {busy}; wait for it, or stop it first" in result.stdout
    assert "4 trials: 1 finished, 3 failed" in result.stdout and (busy / "run.json").exists()


@pytest.mark.slow
def test_results_without_a_last_checkpoint_are_taken_up_from_the_best_one(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1]})
    search(sweep, data_dir)
    trial = sweep / "learning_rate_0.1"
    (trial / "last.pth.tar").unlink()
    (trial / "metrics_test_best.json").write_text("{}")
    before = {path: path.read_bytes() for path in trial.iterdir()}
    (sweep / "study.journal").unlink()
    assert "1 trial: 1 finished" in search(sweep, data_dir).stdout
    assert {path: path.read_bytes() for path in trial.iterdir()} == before


def score_elsewhere(sweep: Path, data_dir: Path, rates: list[float], *, epochs: int, mIoU: float) -> None:
    """Let trials of a grid have finished, each epoch with the same mIoU."""
    base = json.loads((sweep / "params.json").read_text())
    names = {trial_name(values): values for values in ({"learning_rate": rate} for rate in rates)}
    study = Study(sweep, base, {}, grid=names)

    def objective(trial):
        folder, _ = study.begin(trial)
        folder.mkdir()
        for epoch in range(1, epochs + 1):
            trial.report(mIoU, epoch)
        return mIoU

    study.optimize(objective, len(rates), 1, ())


@pytest.mark.parametrize("prune, warmup, first", [(["--prune"], 2, 3), (["--prune", 4], 0, 4)])
def test_prune_ends_a_trial_below_the_median_but_not_before_its_first_epoch(tmp_path, data_dir, prune, warmup, first):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [1e-9, *range(1, 6)]}, num_epochs=30, warmup_epochs=warmup)
    score_elsewhere(sweep, data_dir, [*range(1, 6)], epochs=30, mIoU=0.9)
    result = search(sweep, data_dir, *prune)
    hopeless = sweep / "learning_rate_1e-09"
    words = "pruned, mIoU worse than the median of the other trials after epoch"
    epoch = int(re.search(f"{hopeless.name}: {words} (.*)\n", result.stdout)[1])
    assert first <= epoch <= len(read_history(hopeless)) < 30
    assert "6 trials: 5 finished, 1 pruned; best mIoU 0.9000" in result.stdout
    assert json.loads((hopeless / "trial.json").read_text())["state"] == "pruned"


def test_a_damaged_history_fails_its_trial_only(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01]})
    base = json.loads((sweep / "params.json").read_text())
    for rate in (0.1, 0.01):
        trial = make_experiment(sweep / f"learning_rate_{rate}", **base, learning_rate=rate)
        run_script("train.py", "--model_dir", trial, "--data_dir", data_dir)
    damaged = sweep / "learning_rate_0.1"
    (damaged / "history.jsonl").write_text("nonsense\n")
    (damaged / "last.pth.tar").unlink()
    result = search(sweep, data_dir, check=1)
    assert f"{damaged.name}: failed, {damaged / 'history.jsonl'} is damaged" in result.stdout
    assert "2 trials: 1 finished, 1 failed" in result.stdout and not train_processes(sweep)


def test_a_second_start_is_refused_and_the_first_goes_on_until_it_is_ended_with_every_trial(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.001]}, num_epochs=1000)
    flags = "search_hyperparams.py", *arguments(sweep, data_dir, "--jobs", 2)
    process = start_script(*flags, CUDA_VISIBLE_DEVICES="5,GPU-7")
    for rate in (0.01, 0.001):
        wait_until(lambda rate=rate: logged(sweep / f"learning_rate_{rate}", "epoch 1/1000"))
    with paused(*train_processes(sweep)):
        result = search(sweep, data_dir, check=2)
    assert result.stderr == (
        f"search_hyperparams.py: error: another search_hyperparams.py is at work in {sweep}; "
        "wait for it, or stop it first\n"
    )
    assert process.poll() is None
    held = sorted(path.name for path in (sweep / ".locks").glob("gpu-*") if is_locked(path))
    assert held == [f"gpu-{platform.node()}-{device}" for device in ("5", "GPU-7")]
    threads = {int(thread.name) for thread in Path(f"/proc/{process.pid}/task").iterdir()}
    os.kill(max(threads - {process.pid}), signal.SIGTERM)  # as the system may, not to the main one
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and not train_processes(sweep)
    assert "learning_rate_0.01: epoch 1/1000, mIoU 0." in stdout
    assert stderr == "interrupted; the same command resumes the sweep\n"
    assert not any(is_locked(path) for path in (sweep / ".locks").iterdir())


def test_the_gpu_of_a_trial_that_outlives_its_coordinator_is_not_used_by_another(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.001]}, num_epochs=8)
    flags = "search_hyperparams.py", *arguments(sweep, data_dir)
    process = start_script(*flags, CUDA_VISIBLE_DEVICES="5")
    first, second = (sweep / f"learning_rate_{rate}" for rate in (0.01, 0.001))
    wait_until(lambda: logged(first, "epoch 2/8"))
    process.kill()
    process.communicate()
    # The first trial is still at work, and now its turn comes after the second's.
    (sweep / "search_space.json").write_text('{"learning_rate": [0.001, 0.01]}')
    again = start_script(*flags, CUDA_VISIBLE_DEVICES="5")
    while again.poll() is None:
        assert not (train_processes(first) and train_processes(second))
        time.sleep(0.05)
    assert "2 trials: 2 finished" in again.communicate()[0]
    for trial in (first, second):
        assert [epoch["epoch"] for epoch in read_history(trial)] == list(range(1, 9))


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_moments_runs_every_trial_once(tmp_path, data_dir):
    """Half of the kills are of the coordinator alone, the others of its trials too."""
    sweep = make_sweep(tmp_path / "sweep", {"seed": [1, 2, 3, 4, 5, 6]}, num_epochs=6)
    for kill in range(20):
        process = start(sweep, data_dir, "--jobs", 2)
        time.sleep(random.uniform(0, 8))
        process.kill()
        process.communicate()
        if kill % 2:
            for number in train_processes(sweep):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
    result = search(sweep, data_dir, "--jobs", 2)
    assert "6 trials: 6 finished" in result.stdout and not train_processes(sweep)
    for trial in sweep.glob("seed_*"):
        assert [epoch["epoch"] for epoch in read_history(trial)] == [1, 2, 3, 4, 5, 6]
        assert logged(trial, "trained 6 of 6 epochs; best") <= 1, "none was trained again"


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
    assert "learning_rate_0.01/params.json is of another experiment than this trial; move" in result.stderr
    assert {path.name for path in sweep.iterdir()} == {"params.json", "search_space.json", "learning_rate_0.01"}


def test_a_new_trial_never_takes_the_folder_that_another_one_keeps(tmp_path, data_dir):
    sweep = make_sweep(tmp_path / "sweep", {"name": "short", "seed": [1]})
    search(sweep, data_dir)
    before = {path: path.read_bytes() for path in sweep.glob("*/*")}
    (sweep / "search_space.json").write_text('[{"name": "new", "seed": [1]}, {"name": "short", "seed": [4]}]')
    assert "short/params.json is of another experiment than this trial; move" in search(sweep, data_dir, check=2).stderr
    (sweep / "search_space.json").write_text('{"name": "new", "seed": [1]}')
    assert "1 trial: 1 finished" in search(sweep, data_dir).stdout
    assert {path: path.read_bytes() for path in sweep.glob("*/*")} == before
