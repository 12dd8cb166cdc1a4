"""Which trials a sweep runs: each once, whatever happened before. No train.py here; see test_search_hyperparams.py."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from model import UserError
from sweep.space import Values, grid_distributions, trial_name
from sweep.study import Study
from utils import RunFailed

RATES = [{"learning_rate": rate} for rate in (0.1, 0.01, 0.001)]
NAMES = [trial_name(values) for values in RATES]
SPACE = {
    "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adamw"]),
}


def start(folder: Path, trials: list[Values] | dict[str, Values] = (), *, base=None, space=None, **options) -> Study:
    """Begin a sweep, or go on with it, as every start of the command does."""
    grid = trials if isinstance(trials, dict) else {trial_name(values): values for values in trials}
    return Study(folder, base or {}, space or grid_distributions(grid.values()), grid=grid, **options)


class Failure(Exception):
    pass


def run(study: Study, *, jobs: int = 1, score: Callable[[Values], float] = lambda values: 0.5) -> list[str]:
    """Run all that is left, and return the names in the order in which they began."""
    began, lock = [], threading.Lock()

    def objective(trial):
        folder, values = study.begin(trial)
        with lock:
            began.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "params.json").touch()
        return score(values)

    while left := study.left():
        study.optimize(objective, left, jobs, (Exception,))
    return began


def fail(values: Values) -> float:
    raise Failure


def states(study: Study) -> dict[str, str]:
    return {name: trial.state.name for name, trial in study.trials().items()}


# ---------------------------------------------------------------------------------------- a grid


@pytest.mark.parametrize("jobs", [1, 4])
def test_every_trial_of_a_grid_runs_once_in_its_order(tmp_path, jobs):
    trials = [{"batch_size": size} for size in range(1, 13)]
    began = run(start(tmp_path, trials), jobs=jobs)
    assert sorted(began) == sorted(map(trial_name, trials)) and (jobs > 1 or began == list(map(trial_name, trials)))
    assert run(start(tmp_path, trials)) == []


def test_a_failed_trial_runs_again_at_the_next_start_and_only_then(tmp_path):
    study = start(tmp_path, RATES)
    began = run(study, score=lambda values: fail(values) if values == RATES[1] else 0.5)
    assert began == NAMES and states(study) == dict(zip(NAMES, ["COMPLETE", "FAIL", "COMPLETE"], strict=True))
    again = start(tmp_path, RATES)
    assert run(again) == [NAMES[1]] and set(states(again).values()) == {"COMPLETE"}


def test_a_trial_whose_coordinator_was_killed_runs_again(tmp_path):
    killed = start(tmp_path, RATES)
    begun, drawn = killed.study.ask(), killed.study.ask()  # the second before it has begun
    killed.begin(begun)
    assert drawn.user_attrs["values"] == RATES[1]
    again = start(tmp_path, RATES)
    assert sorted(run(again)) == sorted(NAMES) and set(states(again).values()) == {"COMPLETE"}


def test_a_trial_whose_folder_was_deleted_runs_again_and_its_old_score_does_not_count(tmp_path):
    run(start(tmp_path, RATES), score=lambda values: 0.9)
    shutil.rmtree(tmp_path / NAMES[1])
    again = start(tmp_path, RATES)
    assert again.left() == 1 and states(again)[NAMES[1]] == "WAITING"
    assert run(again, score=lambda values: 0.6) == [NAMES[1]]
    assert again.trials()[NAMES[1]].value == 0.6


def test_a_grid_can_grow_and_shrink(tmp_path):
    start(tmp_path, RATES[:2])  # interrupted before the first
    other = start(tmp_path, RATES[1:])
    assert run(other) == NAMES[1:], "and not the one that is queued and no longer in the space"
    assert states(other) == dict.fromkeys(NAMES[1:], "COMPLETE")
    assert run(start(tmp_path, RATES)) == NAMES[:1]


def test_a_trial_keeps_its_folder_however_the_search_space_calls_it_later(tmp_path):
    run(start(tmp_path, {"short": {"seed": 1}, "other": {"seed": 2}}), score=lambda values: values["seed"] / 10)
    again = start(
        tmp_path, {"longer__seed_1": {"seed": 1}, "longer__seed_2": {"seed": 2}, "longer__seed_3": {"seed": 3}}
    )
    assert run(again) == ["longer__seed_3"]
    assert {name: trial.value for name, trial in again.trials().items()} == {
        "short": 0.1,
        "other": 0.2,
        "longer__seed_3": 0.5,
    }
    shutil.rmtree(tmp_path / "short")
    renamed = start(tmp_path, {"new": {"seed": 1}, "short": {"seed": 4}})
    assert run(renamed) == ["new", "short"], "for the first has no folder any more"
    again = start(tmp_path, {"new": {"seed": 1}, "short": {"seed": 4}})
    assert run(again) == [] and set(again.trials()) == {"new", "short"}, "which is the second's now"


def test_the_order_of_the_keys_of_an_object_makes_no_other_trial(tmp_path):
    run(start(tmp_path, [{"loss_weights": {"dice": 1, "bce": 0.5}}]))
    assert run(start(tmp_path, [{"loss_weights": {"bce": 0.5, "dice": 1}}])) == []


def test_a_seed_may_be_larger_than_optuna_takes(tmp_path):
    assert len(run(start(tmp_path, base={"seed": 2**62}, space=SPACE, n_trials=3))) == 3


def test_the_values_of_a_grid_are_recorded_for_plots_and_samplers(tmp_path):
    trials = [{"learning_rate": rate, "head": head} for rate in (0.1, 0.001) for head in ("gcn", "conv")]
    study = start(tmp_path, trials)
    run(study)
    assert [trial.params for trial in study.trials().values()] == trials
    grown = start(tmp_path, [*trials, {"learning_rate": 1, "head": "stack"}])  # a choice that Optuna does not take
    run(grown)
    assert list(grown.trials().values())[-1].params == {"learning_rate": 1}


def test_a_changed_base_is_refused_by_key(tmp_path):
    start(tmp_path, RATES, base={"num_epochs": 3, "seed": 1})
    with pytest.raises(UserError, match=r"has changed since .* \(num_epochs 3 -> 4, seed 1 -> null\): set it back"):
        start(tmp_path, RATES, base={"num_epochs": 4})


# ---------------------------------------------------------------------------------------- samplers

both = pytest.mark.parametrize("tpe", [False, True], ids=["random", "tpe"])


@both
@pytest.mark.parametrize("jobs", [1, 3])
def test_samplers_run_n_trials_in_all_within_the_space_and_never_the_same_twice(tmp_path, tpe, jobs):
    options = {"space": SPACE, "tpe": tpe}
    began = run(start(tmp_path, n_trials=15, **options), jobs=jobs, score=lambda values: values["learning_rate"])
    assert len(began) == 15
    again = start(tmp_path, n_trials=20, **options)
    began += run(again, jobs=jobs, score=lambda values: values["learning_rate"])
    assert len(set(began)) == len(began) == len(again.trials()) == 20
    for trial in again.trials().values():
        assert 1e-4 <= trial.params["learning_rate"] <= 0.1 and trial.params == trial.user_attrs["values"]
    assert {trial.params["optimizer"] for trial in again.trials().values()} == {"sgd", "adamw"}
    assert run(start(tmp_path, n_trials=20, **options)) == []


@both
def test_the_first_draws_are_the_same_every_time(tmp_path, tpe):
    draws = []
    for jobs in (1, 3):
        (folder := tmp_path / str(jobs)).mkdir()
        draws.append(run(start(folder, space=SPACE, tpe=tpe, n_trials=8, base={"seed": 5}), jobs=jobs))
    assert sorted(draws[0]) == sorted(draws[1])
    (tmp_path / "other").mkdir()
    assert set(run(start(tmp_path / "other", space=SPACE, tpe=tpe, n_trials=8, base={"seed": 6}))) != set(draws[0])


@both
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_finite_space_ends_with_its_last_trial(tmp_path, tpe, jobs):
    space = {
        "kernel_size": IntDistribution(3, 9, step=2),
        "dropout_rate": FloatDistribution(0, 0.2, step=0.1),
        "loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}']),
    }
    study = start(tmp_path, space=space, tpe=tpe, n_trials=100)
    began = run(study, jobs=jobs, score=lambda values: values["kernel_size"] / 10)
    assert len(set(began)) == len(began) == len(study.trials()) == 4 * 3 * 2 and study.left() == 0
    assert study.trials()[began[0]].user_attrs["values"]["loss_weights"] in ({"bce": 1}, {"dice": 1})


def test_tpe_prefers_what_was_good(tmp_path):
    study = start(tmp_path, space={"momentum": FloatDistribution(0, 0.9)}, tpe=True, n_trials=40)
    run(study, score=lambda values: -abs(values["momentum"] - 0.7))
    drawn = [trial.params["momentum"] for trial in study.trials().values()]
    far = [sum(abs(value - 0.7) for value in part) / len(part) for part in (drawn[:10], drawn[-10:])]
    assert far[1] < far[0] / 2


def test_tpe_goes_on_from_the_trials_of_a_grid(tmp_path):
    run(start(tmp_path, RATES))
    space = {"learning_rate": FloatDistribution(1e-5, 1, log=True)}
    study = start(tmp_path, space=space, tpe=True, n_trials=5)
    assert len(run(study)) == 2 and list(study.trials())[:3] == NAMES


def test_samplers_refuse_other_choices_than_before_and_take_other_ends(tmp_path):
    before = {"optimizer": CategoricalDistribution(["sgd"]), "momentum": FloatDistribution(0.5, 0.9)}
    run(start(tmp_path, space=before, n_trials=1))
    run(start(tmp_path, space=before | {"momentum": FloatDistribution(0.1, 0.95)}, n_trials=2))
    for other in (
        {"optimizer": CategoricalDistribution(["sgd", "adamw"])},
        {"momentum": FloatDistribution(0.5, 0.9, log=True)},
        {"momentum": CategoricalDistribution([0.9])},
    ):
        with pytest.raises(UserError, match=f'"{next(iter(other))}" was drawn from other choices before'):
            start(tmp_path, space=before | other, n_trials=3)


@both
def test_a_draw_that_failed_is_run_again_with_its_values(tmp_path, tpe):
    space = {
        "loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}']),
        "momentum": FloatDistribution(0, 0.9),
    }
    failed = run(start(tmp_path, space=space, tpe=tpe, n_trials=12), score=fail)
    again = start(tmp_path, space=space, tpe=tpe, n_trials=12)
    assert run(again) == failed and len(failed) == 12
    assert set(states(again).values()) == {"COMPLETE"}


# ---------------------------------------------------------------------------------------- the journal


def test_what_a_kill_left_of_a_line_is_removed_and_nothing_else_is_lost(tmp_path):
    study = start(tmp_path, RATES)
    run(study)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    assert run(start(tmp_path, RATES)) == NAMES[2:], "it had not finished after all"


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("appends", [1, 4, 6, 9])
def test_a_line_that_a_full_disk_cut_short_is_mended_at_the_next_start(tmp_path, monkeypatch, appends, jobs):
    """Whatever Optuna was about to write, its own errors about that included; and nothing comes after half a line."""
    written = []

    def until_full(journal, logs):
        written.append(logs)
        if len(written) < appends:
            return append(journal, logs)
        with open(tmp_path / "study.journal", "ab") as stream:
            stream.write(json.dumps(logs[0]).encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    study, append = start(tmp_path, RATES), JournalFileBackend.append_logs
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", until_full)
        with pytest.raises(RunFailed, match="No space left on device; the same command resumes the sweep"):
            run(study, jobs=jobs)
    assert len(written) == appends
    finished = {name for name, state in states(start(tmp_path, RATES)).items() if state == "COMPLETE"}
    assert set(run(start(tmp_path, RATES))) == {*NAMES} - finished
    assert all(json.loads(line) for line in (tmp_path / "study.journal").read_text().splitlines())
    assert states(start(tmp_path, RATES)) == dict.fromkeys(NAMES, "COMPLETE")


@pytest.mark.parametrize("length", [0, 1, 5, 40])
def test_a_journal_that_was_cut_short_in_its_first_line_begins_anew(tmp_path, length):
    start(tmp_path, RATES)
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:length])
    assert run(start(tmp_path, RATES)) == NAMES


@pytest.mark.parametrize("content", ["my notes", "my notes\nfor the paper", "nonsense\n", '{"my": "notes"}', "\0\0"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "study.journal").write_text(content)
    with pytest.raises(UserError, match=r"study\.journal is damaged .*move it away"):
        start(tmp_path, RATES)
    assert (tmp_path / "study.journal").read_text() == content


def test_a_damaged_journal_is_one_line(tmp_path):
    (tmp_path / "study.journal").write_text('{"op_code": 0}\nnonsense\n{"op_code": 1}\n')
    with pytest.raises(UserError, match=r"study\.journal is damaged .*move it away"):
        start(tmp_path, RATES)


def test_the_journal_of_an_earlier_version_goes_on(tmp_path):
    """There, attempts that were given up have no folder, and say which ones they replace."""
    earlier = start(tmp_path, [])
    for values, state, attributes in (
        (RATES[0], TrialState.COMPLETE, {"folder": NAMES[0]}),
        (RATES[0], TrialState.FAIL, {"replaces": [0]}),
        (RATES[1], TrialState.FAIL, {"folder": NAMES[1], "error": ["broken"]}),
    ):
        earlier.study.enqueue_trial(values, user_attrs={"values": values, "replaces": []} | attributes)
        trial = earlier.study.ask()
        earlier.study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
    (tmp_path / NAMES[0]).mkdir()
    assert run(start(tmp_path, RATES)) == NAMES[1:]
