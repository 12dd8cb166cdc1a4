"""Which trials a sweep runs: each once, whatever happened before. No train.py here; see test_search_hyperparams.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from model import UserError
from sweep.coordinator import Coordinator, drawn_before, outcome
from sweep.space import Values, grid_distributions, trial_name
from utils import read_history, write_history

RATES = [{"learning_rate": rate} for rate in (0.1, 0.01, 0.001)]
NAMES = [trial_name(values) for values in RATES]
SPACE = {
    "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adamw"]),
}
FAILS = None  # instead of a score


class Process:
    """A train.py that has ended."""

    terminate = wait = lambda self: None

    def __init__(self, code: int):
        self.poll = lambda: code


class Sweep(Coordinator):
    """A sweep whose train.py gives every epoch the same score."""

    def start(self, folder: Path, gpu: str | None) -> Process:
        self.order.append(folder.name)
        score = self.score(self.trials[folder.name])
        if score is FAILS:
            (folder / "train.log").write_text("train.py: error: nothing goes\n")
            return Process(2)
        write_history(folder, [{"epoch": epoch + 1, "val": {"mIoU": score}} for epoch in range(self.epochs)])
        return Process(0)

    def results(self) -> dict[str, str]:
        return {name: outcome(self.parent_dir / name)[0] for name in self.trials}


def start(folder: Path, grid: list[Values] = (), *, base=None, space=None, n_trials=0, tpe=False, jobs=1) -> Sweep:
    """Begin a sweep, or go on with it, as every start of the command does."""
    trials = {trial_name(values): values for values in grid} if grid else drawn_before(folder, space)
    space = space or grid_distributions(trials.values())
    base = {"num_epochs": 2} | (base or {})
    return Sweep(folder, folder, base, space, trials, n_trials, tpe, jobs, [], None, None)


def run(sweep: Sweep, score: Callable[[Values], float | None] = lambda values: 0.5, epochs: int = 2) -> list[str]:
    """Run all that is left, and return the names in the order in which they began."""
    sweep.order, sweep.score, sweep.epochs = [], score, epochs
    sweep.run()
    return sweep.order


@pytest.mark.parametrize("jobs", [1, 4])
def test_every_trial_of_a_grid_runs_once_in_its_order(tmp_path, jobs):
    trials = [{"batch_size": size} for size in range(1, 13)]
    began = run(start(tmp_path, trials, jobs=jobs))
    assert sorted(began) == sorted(map(trial_name, trials)) and (jobs > 1 or began == list(map(trial_name, trials)))
    assert run(start(tmp_path, trials)) == []


def test_a_failed_trial_leaves_the_others_and_runs_again_at_the_next_start(tmp_path, capsys):
    sweep = start(tmp_path, RATES)
    assert run(sweep, lambda values: FAILS if values == RATES[1] else 0.5) == NAMES
    assert sweep.results() == dict(zip(NAMES, ["finished", "failed", "finished"], strict=True))
    assert f"{NAMES[1]}: failed, exit status 2\n    train.py: error: nothing goes\n" in capsys.readouterr().out
    again = start(tmp_path, RATES)
    assert run(again) == [NAMES[1]] and set(again.results().values()) == {"finished"}


def test_what_was_begun_deleted_or_damaged_runs_again_and_what_was_pruned_does_not(tmp_path):
    trials = [*RATES, {"learning_rate": 1}, {"learning_rate": 2}]
    names = list(map(trial_name, trials))
    run(start(tmp_path, trials))
    (tmp_path / names[0] / "trial.json").unlink()  # as where the coordinator was killed
    shutil.rmtree(tmp_path / names[1])
    (tmp_path / names[2] / "trial.json").write_text('{"state": "pruned", "reason": []}')
    (tmp_path / names[3] / "history.jsonl").write_text("nonsense\n")
    again = start(tmp_path, trials)
    assert run(again) == [names[0], names[1], names[3]]
    assert again.results()[names[2]] == "pruned"


def test_every_trial_at_work_has_a_gpu_or_its_share_of_the_cores(tmp_path, monkeypatch):
    seen, at_work = [], set()

    def start_train(folder, data_dir, environment):
        gpu = environment.get("CUDA_VISIBLE_DEVICES")
        seen.append((gpu, environment["OMP_NUM_THREADS"]))
        assert gpu not in at_work
        at_work.add(gpu)
        write_history(folder, [{"epoch": 1, "val": {"mIoU": 0.5}}])
        process = Process(0)
        process.wait = lambda: at_work.discard(gpu)
        return process

    monkeypatch.setattr("sweep.coordinator.start_train", start_train)
    monkeypatch.setattr("sweep.coordinator.cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = tmp_path, tmp_path, {}, grid_distributions(RATES), dict(zip(NAMES, RATES, strict=True)), 0, False
    sweep = Coordinator(*arguments, jobs=2, gpus=["5", "GPU-7"], cluster=None, prune_from=None)
    sweep.run()
    assert {gpu for gpu, _ in seen} <= {"5", "GPU-7"} and [cores for _, cores in seen] == ["3"] * 3
    assert sorted(sweep.gpus) == ["5", "GPU-7"]


def test_a_grid_can_grow_and_shrink(tmp_path):
    run(start(tmp_path, RATES[:2]))
    other = start(tmp_path, RATES[1:])
    assert run(other) == NAMES[2:] and list(other.trials) == NAMES[1:]


def test_a_changed_base_is_refused_before_anything_is_written(tmp_path):
    run(start(tmp_path, RATES))
    with pytest.raises(UserError, match=r"params\.json is of another experiment than this trial; set .* back, move"):
        start(tmp_path, RATES, base={"num_epochs": 3})


@pytest.mark.parametrize(
    ("key", "values", "metric", "tpe", "refused"),
    [
        ("loss_weights", [{"bce": 1}, {"dice": 1}], "loss", False, 'take another "best_metric"'),
        ("focal_gamma", [1, 2], "loss", False, 'take another "best_metric"'),
        ("image_size", [32, 64], "mIoU", True, "run a grid, without --prune"),
        ("image_size", [32, 64], "mIoU", False, None),
        ("loss_weights", [{"bce": 1}, {"dice": 1}], "mIoU", True, None),
        ("image_size", [32], "mIoU", True, None),
    ],
)
def test_trials_that_their_metric_cannot_rank_are_refused_or_not_ranked(tmp_path, key, values, metric, tpe, refused):
    trials = [{key: value} for value in values]
    options = {"base": {"best_metric": metric}, "tpe": tpe, "n_trials": len(values) if tpe else 0}
    if refused:
        with pytest.raises(UserError, match=f'trials of different {key} cannot be .*"{metric}"; {refused}, or a sweep'):
            start(tmp_path, trials, **options)
    else:
        assert start(tmp_path, trials, **options).mixed == [key] * (key == "image_size" and len(values) > 1)


def test_the_journal_is_made_anew_from_the_folders(tmp_path):
    trials = [{"learning_rate": rate, "loss_weights": {"dice": rate}} for rate in (0.1, 0.01)]
    (tmp_path / "study.journal").write_text('{"half a li')
    for _ in range(2):
        run(start(tmp_path, trials), lambda values: values["learning_rate"])
        journal = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
        study = optuna.load_study(study_name="sweep", storage=journal)
        assert [trial.value for trial in study.trials] == [0.1, 0.01]
        assert study.trials[0].params == {"learning_rate": 0.1, "loss_weights": '{"dice": 0.1}'}
        assert study.trials[0].intermediate_values == {1: 0.1, 2: 0.1}


@pytest.mark.parametrize("prune_from, warmup, first", [(0, 2, 3), (4, 0, 4)])
def test_pruning_ends_a_trial_below_the_median_but_not_before_its_first_epoch(
    tmp_path, monkeypatch, capsys, prune_from, warmup, first
):
    class Slow:
        """A train.py that ends an epoch at every look, and is never better than 0.1."""

        def __init__(self, folder):
            self.folder, self.wait = folder, lambda: None

        def poll(self):
            if len(history := read_history(self.folder)) == 10:
                return 0
            write_history(self.folder, [*history, {"epoch": len(history) + 1, "val": {"mIoU": 0.1}}])

        def terminate(self):
            self.ended = len(read_history(self.folder))

    monkeypatch.setattr("sweep.coordinator.POLL", 0)
    base = {"num_epochs": 10, "warmup_epochs": warmup}
    rates = [{"learning_rate": rate} for rate in range(1, 7)]
    run(start(tmp_path, rates[:5], base=base), epochs=10)
    sweep = start(tmp_path, rates, base=base)
    sweep.prune_from, slow = prune_from, Slow(tmp_path / "learning_rate_6")
    monkeypatch.setattr(sweep, "start", lambda folder, gpu: slow)
    sweep.run()
    assert slow.ended == first and sweep.results()["learning_rate_6"] == "pruned"
    words = "learning_rate_6: pruned, mIoU worse than the median of the other trials after epoch"
    assert f"{words} {first}\n" in capsys.readouterr().out
    assert run(start(tmp_path, rates, base=base)) == []


# ---------------------------------------------------------------------------------------- samplers

both = pytest.mark.parametrize("tpe", [False, True], ids=["random", "tpe"])


@pytest.mark.parametrize("tpe, jobs", [(False, 1), (True, 3)])
def test_samplers_run_n_trials_in_all_within_the_space_and_never_the_same_twice(tmp_path, tpe, jobs):
    options = {"space": SPACE, "tpe": tpe, "jobs": jobs, "base": {"seed": 2**62}}  # more than Optuna takes
    began = run(start(tmp_path, n_trials=12, **options), lambda values: values["learning_rate"])
    assert len(began) == 12
    again = start(tmp_path, n_trials=16, **options)
    began += run(again, lambda values: values["learning_rate"])
    assert len(set(began)) == len(began) == len(again.trials) == 16
    for name, values in again.trials.items():
        assert 1e-4 <= values["learning_rate"] <= 0.1 and trial_name(values) == name
    assert {values["optimizer"] for values in again.trials.values()} == {"sgd", "adamw"}
    assert run(start(tmp_path, n_trials=16, **options)) == []


@both
def test_a_sweep_draws_the_same_every_time(tmp_path, tpe):
    draws = []
    for name, seed, jobs in (("one", 5, 1), ("same", 5, 3), ("other", 6, 1)):
        (tmp_path / name).mkdir()
        draws.append(set(run(start(tmp_path / name, space=SPACE, tpe=tpe, n_trials=8, base={"seed": seed}, jobs=jobs))))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("tpe, jobs", [(False, 1), (True, 3)])
def test_a_finite_space_ends_with_its_last_trial(tmp_path, tpe, jobs):
    space = {
        "kernel_size": IntDistribution(3, 9, step=2),
        "dropout_rate": FloatDistribution(0, 0.2, step=0.1),
        "loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}']),
    }
    sweep = start(tmp_path, space=space, tpe=tpe, n_trials=100, jobs=jobs)
    began = run(sweep, lambda values: values["kernel_size"] / 10)
    assert len(set(began)) == len(began) == len(sweep.trials) == 4 * 3 * 2
    assert json.loads((tmp_path / began[0] / "params.json").read_text())["loss_weights"] in ({"bce": 1}, {"dice": 1})


def test_tpe_prefers_what_was_good_also_before_a_restart(tmp_path):
    space = {"momentum": FloatDistribution(0, 0.9)}
    began = []
    for n_trials in (15, 30):
        sweep = start(tmp_path, space=space, tpe=True, n_trials=n_trials)
        began += run(sweep, lambda values: 1 - abs(values["momentum"] - 0.7))
    far = [abs(sweep.trials[name]["momentum"] - 0.7) for name in began]
    assert sum(far[-10:]) < sum(far[:10]) / 2


def test_a_sampler_counts_the_trials_of_a_grid_and_of_a_narrower_range_and_no_other_experiment(tmp_path):
    run(start(tmp_path, RATES))
    (tmp_path / "by hand").mkdir()
    (tmp_path / "by hand" / "params.json").write_text('{"learning_rate": 0.5}')
    sweep = start(tmp_path, space={"learning_rate": FloatDistribution(0.05, 1, log=True)}, tpe=True, n_trials=5)
    assert len(run(sweep)) == 2 and {*NAMES} < {*sweep.trials} and len(sweep.trials) == 5


@both
def test_a_draw_that_failed_is_run_again_with_its_values_whatever_the_space_holds_now(tmp_path, tpe):
    space = {
        "loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}']),
        "momentum": FloatDistribution(0, 0.5),
    }
    failed = run(start(tmp_path, space=space, tpe=tpe, n_trials=12), lambda values: FAILS)
    other = {"loss_weights": CategoricalDistribution(['{"lovasz": 1}']), "momentum": FloatDistribution(0.6, 0.9)}
    again = start(tmp_path, space=other, tpe=tpe, n_trials=13)
    began = run(again)
    assert sorted(began[:12]) == sorted(failed) and len(failed) == 12
    assert again.trials[began[12]]["loss_weights"] == {"lovasz": 1}
    assert set(again.results().values()) == {"finished"}


def test_a_draw_that_params_refuses_fails_alone(tmp_path, capsys):
    sweep = start(tmp_path, space={"warmup_epochs": IntDistribution(0, 3)}, n_trials=4)
    assert len(run(sweep)) == 2 and [*sweep.results().values()].count("failed") == 2
    assert "warmup_epochs_3: failed, " in (said := capsys.readouterr().out) and '"warmup_epochs" is 3; allowed' in said


@pytest.mark.parametrize("ended", [True, False])
def test_a_sweep_neither_ranks_nor_resumes_trials_that_were_trained_on_other_data(tmp_path, ended):
    run(start(tmp_path, RATES))
    if not ended:
        (tmp_path / NAMES[0] / "trial.json").unlink()
    record = tmp_path / NAMES[0] / "run.json"
    record.write_text(json.dumps({"data_dir": str(tmp_path / "gone")}))
    assert run(start(tmp_path, RATES)) == [] if ended else NAMES[:1], "the data have moved"
    (other := tmp_path / "other").mkdir()
    record.write_text(json.dumps({"data_dir": str(other)}))
    with pytest.raises(UserError, match=f"was trained on {other}; give --data_dir"):
        start(tmp_path, RATES)
