import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from model import UserError
from params import Params
from sweep import study
from sweep.study import Range, Study, distributions, grid, open_storage, read_spaces, trial_name
from utils import ROOT, is_locked, lock


def space_file(folder: Path, content) -> Path:
    path = folder / "search_space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def open_study(folder: Path, trials=None, *, base=None, storage=None, **options) -> Study:
    """A study of learning rates, in a journal or the database of a URL; every process of a sweep opens its own."""
    grid_of = {trial_name(values): values for values in trials} if trials is not None else None
    return Study(open_storage(folder, storage), folder, base or {}, grid=grid_of, shared=storage is not None, **options)


RATES = [{"learning_rate": rate} for rate in (0.1, 0.01, 0.001)]

# ---------------------------------------------------------------------------------------- search space


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "must hold an object"),
        ("[{}]", "must hold an object"),
        ("3", "must hold an object"),
        ({"learning_rat": [0.1]}, 'did you mean "learning_rate"?'),
        ({"learning_rat": {"low": 0.1, "high": 1}}, 'did you mean "learning_rate"?'),
        ({"learning_rate": 0.1}, "allowed: a list of values, or a range"),
        ({"learning_rate": []}, "allowed: a list of values, or a range"),
        ({"learning_rate": [0.1, 0.2, -1]}, '"learning_rate" is -1; allowed: a number above 0'),
        ({"learning_rate": [0.1, 1e-1]}, "lists 0.1 twice"),
        ({"optimizer": ["sgd", "adam"]}, '"optimizer" is "adam"'),
        ({"optimizer": {"low": 1, "high": 2}}, '"optimizer" is 1'),
        ({"augment": {"low": False, "high": True}}, '"augment" needs numbers'),
        ({"learning_rate": {"low": 0.1}}, 'needs both "low" and "high"'),
        ({"clip_grad_norm": {"low": None, "high": 1}}, "needs numbers"),
        ({"learning_rate": {"low": 0.1, "hihg": 1}}, 'did you mean "high"?'),
        ({"learning_rate": {"low": 1, "high": 0.1}}, '"low" must be less than "high"'),
        ({"learning_rate": {"low": -1, "high": 0.1}}, '"learning_rate" is -1'),
        ({"weight_decay": {"low": 0, "high": 0.1, "log": True}}, '"log" is true; allowed'),
        ({"weight_decay": {"low": 0, "high": 0.1, "log": "yes"}}, '"log" is "yes"; allowed'),
        ({"weight_decay": {"low": 0, "high": 0.1, "step": 0}}, '"step" is 0; allowed: a number that divides 0.1'),
        ({"weight_decay": {"low": 0, "high": 0.1, "step": 0.04}}, "allowed: a number that divides 0.1"),
        ({"weight_decay": {"low": 0, "high": 0.1, "step": 1e-300}}, "allowed: a number that divides 0.1"),
        ({"batch_size": {"low": 2, "high": 8, "step": 1.5}}, "allowed: a whole number that divides 6"),
        (
            {"kernel_size": {"low": 3, "high": 15}},
            '"kernel_size" is 4; allowed: an integer of at least 3 and at most 255 that is odd',
        ),
        ({"batch_size": [1, 0], "num_epochs": [0]}, '"num_epochs" is 0'),
    ],
)
def test_a_faulty_search_space_is_refused(tmp_path, content, words):
    path = space_file(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_spaces(path)
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_search_space_the_error_shows_one(tmp_path):
    with pytest.raises(UserError, match=r"no .*search_space\.json; a sweep has one, as \{\"learning_rate\""):
        read_spaces(tmp_path / "search_space.json")


def test_a_grid_has_every_combination_once(tmp_path):
    path = space_file(tmp_path, {"batch_size": [4, 8], "learning_rate": [0.0001, 1e-3], "head": ["gcn"]})
    trials = grid(read_spaces(path), {}, path)
    assert list(trials) == [
        f"learning_rate_{rate}__batch_size_{size}__head_gcn" for size in (4, 8) for rate in (0.0001, 0.001)
    ]
    combinations = [(values["learning_rate"], values["batch_size"]) for values in trials.values()]
    assert combinations == [(rate, size) for size, rate in itertools.product((4, 8), (0.0001, 0.001))]


def test_a_list_of_spaces_joins_their_grids(tmp_path):
    path = space_file(tmp_path, [{"head": ["conv1x1"]}, {"kernel_size": [3, 5]}, {"kernel_size": [5, 7]}])
    assert list(grid(read_spaces(path), {}, path)) == [
        "head_conv1x1",
        "kernel_size_3",
        "kernel_size_5",
        "kernel_size_7",
    ]


def test_a_name_in_a_space_begins_the_folders_of_its_trials(tmp_path):
    spaces = [
        {"name": "original", "optimizer": ["sgd"], "learning_rate": [0.001], "seed": [1, 2]},
        {"name": "ours", "optimizer": ["adamw"]},
        {"seed": [3]},
    ]
    path = space_file(tmp_path, spaces)
    trials = grid(read_spaces(path), {}, path)
    assert trials == {
        "original__seed_1": {"optimizer": "sgd", "learning_rate": 0.001, "seed": 1},
        "original__seed_2": {"optimizer": "sgd", "learning_rate": 0.001, "seed": 2},
        "ours": {"optimizer": "adamw"},
        "seed_3": {"seed": 3},
    }
    for refused, words in (
        (lambda: distributions(read_spaces(path)[:1], {}, path), '"name" is for grids'),
        (lambda: read_spaces(space_file(tmp_path, [{"name": "a/b", "seed": [1]}])), r'"name" is "a/b"; allowed'),
        (lambda: read_spaces(space_file(tmp_path, [{"name": 3, "seed": [1]}])), r'"name" is 3; allowed'),
        (lambda: read_spaces(space_file(tmp_path, [{"name": "ü", "seed": [1]}])), r'"name" is "\\u00fc"; allowed'),
        (lambda: read_spaces(space_file(tmp_path, [{"name": "results.md", "seed": [1]}])), r'"results.md"; allowed'),
        (lambda: read_spaces(space_file(tmp_path, [{"name": "alone"}])), "must hold an object"),
        (
            lambda: read_spaces(space_file(tmp_path, 2 * [{"name": "twice", "seed": [1]}])),
            'two objects are called "twice"',
        ),
    ):
        with pytest.raises(UserError, match=words):
            refused()
    path = space_file(tmp_path, [{"name": "a", "seed": [1, 2]}, {"name": "b", "seed": [2]}])
    with pytest.raises(UserError, match="a__seed_2 and b are the same trial"):
        grid(read_spaces(path), {}, path)


def test_named_trials_are_known_by_their_names_when_a_sweep_starts_again(tmp_path):
    path = space_file(tmp_path, [{"name": "first", "seed": [1, 2]}, {"name": "second", "seed": [3]}])
    trials = grid(read_spaces(path), {}, path)
    study = Study(open_storage(tmp_path, None), tmp_path, {}, grid=trials)
    study.enqueue_missing()
    claim = study.claim()
    assert (claim.name, claim.values) == ("first__seed_1", {"seed": 1})
    (tmp_path / claim.name).mkdir()
    study.finish(claim.trial.number, TrialState.COMPLETE, 0.5)
    claim.lock.release()
    again = Study(open_storage(tmp_path, None), tmp_path, {}, grid=trials)
    again.enqueue_missing()
    assert again.standing()["first__seed_1"].value == 0.5
    claims = [again.claim(), again.claim()]
    assert [claim.name for claim in claims] == ["first__seed_2", "second"] and again.claim() is None


def test_a_trial_keeps_its_folder_however_the_search_space_calls_it_later(tmp_path):
    def study_of(*spaces) -> Study:
        path = space_file(tmp_path, list(spaces))
        return Study(open_storage(tmp_path, None), tmp_path, {}, grid=grid(read_spaces(path), {}, path))

    study = study_of({"name": "short", "seed": [1]}, {"name": "other", "seed": [2]})
    study.enqueue_missing()
    first, second = study.claim(), study.claim()
    study_of({"name": "later", "seed": [1, 2]}).take_over()  # finds them locked
    for claim in (first, second):
        (tmp_path / claim.name).mkdir()
        assert study._now(claim.trial.number).state == TrialState.RUNNING
        claim.lock.release()
    study.finish(first.trial.number, TrialState.COMPLETE, 0.5)
    study.put_back(second.trial.number, second.values)
    again = study_of({"name": "longer", "seed": [1, 2, 3]})
    again.enqueue_missing()
    assert list(again.grid) == ["short", "other", "longer__seed_3"] and again.standing()["short"].value == 0.5
    assert [again.claim().name, again.claim().name, again.claim()] == ["other", "longer__seed_3", None]
    with pytest.raises(UserError, match="keeps the folder short, in which it has begun"):
        study_of({"name": "new", "seed": [1]}, {"name": "short", "seed": [4]})
    sampled = Study(open_storage(tmp_path, None), tmp_path, {}, space={"seed": IntDistribution(1, 1)}, n_trials=1)
    assert list(sampled.attempts()) == ["short", "other", "longer__seed_3"]


def test_a_grid_holds_every_combination_against_the_base(tmp_path):
    path = space_file(tmp_path, {"warmup_epochs": [1, 3], "num_epochs": [9, 3]})
    with pytest.raises(UserError, match='num_epochs_3__warmup_epochs_3: "warmup_epochs" is 3'):
        grid(read_spaces(path), {}, path)
    with pytest.raises(UserError, match='"warmup_epochs" is 3'):
        distributions(read_spaces(path), {}, path)
    range_path = space_file(tmp_path, {"warmup_epochs": {"low": 0, "high": 40}})
    with pytest.raises(UserError, match='"warmup_epochs" is 40'):
        distributions(read_spaces(range_path), {}, range_path)


def test_a_grid_takes_no_range_and_a_sampler_no_list_of_spaces(tmp_path):
    path = space_file(tmp_path, {"learning_rate": {"low": 0.1, "high": 1}})
    with pytest.raises(UserError, match="learning_rate is a range; list its values, or use --sampler"):
        grid(read_spaces(path), {}, path)
    path = space_file(tmp_path, [{"learning_rate": [1]}, {"momentum": [0.9]}])
    with pytest.raises(UserError, match="need a single object"):
        distributions(read_spaces(path), {}, path)


def test_trials_that_would_share_a_folder_are_refused(tmp_path):
    path = space_file(tmp_path, {"train_split": ["a b", "a-b"]})
    with pytest.raises(UserError, match="share the folder train_split_a-b"):
        grid(read_spaces(path), {}, path)


def test_names_are_legible_stable_and_fit_a_file_system():
    assert trial_name({"batch_size": 8, "learning_rate": 1e-3}) == trial_name({"learning_rate": 0.001, "batch_size": 8})
    assert trial_name({"learning_rate": 0.00031415926535897}) == "learning_rate_0.000314159"
    assert trial_name({"learning_rate": 0.12345678}) == "learning_rate_0.12345678"
    assert trial_name({"learning_rate": 1.0, "augment": True, "clip_grad_norm": None}) == (
        "learning_rate_1__augment_true__clip_grad_norm_null"
    )
    assert trial_name({"loss_weights": {"bce": 0.5, "dice": 1}}) == "loss_weights_bce_0.5+dice_1"
    assert trial_name({"train_split": "straße/.."}) == "train_split_stra-e-.."
    long = [trial_name({"train_split": "a" * 300 + end}, "a" * 60) for end in "xy"]
    assert len(set(long)) == 2 and max(map(len, long)) < 200


def test_ranges_and_lists_become_the_distributions_they_mean(tmp_path):
    weights = {"cross_entropy": 1}
    path = space_file(
        tmp_path,
        {
            "learning_rate": {"low": 1e-5, "high": 0.1, "log": True},
            "kernel_size": {"low": 3, "high": 15, "step": 2},
            "optimizer": ["sgd", "adamw"],
            "loss_weights": [weights, {"bce": 1}],
        },
    )
    assert read_spaces(path)[0]["kernel_size"] == Range(3, 15, step=2)
    assert distributions(read_spaces(path), {}, path) == {
        "learning_rate": FloatDistribution(1e-5, 0.1, log=True),
        "kernel_size": IntDistribution(3, 15, step=2),
        "optimizer": CategoricalDistribution(["sgd", "adamw"]),
        "loss_weights": CategoricalDistribution([json.dumps(weights), '{"bce": 1}']),
    }


@pytest.mark.parametrize("sweep", sorted(path.parent for path in (ROOT / "experiments").glob("*/search_space.json")))
def test_the_ready_sweeps_are_sound(sweep):
    base = json.loads((sweep / "params.json").read_text())
    trials = grid(read_spaces(sweep / "search_space.json"), base, sweep)
    names = {
        "learning_rate": [f"learning_rate_{rate}" for rate in (0.0001, 0.001, 0.01)],
        "paper_table1": ["head_conv1x1", *(f"kernel_size_{k}" for k in (3, 5, 7, 9, 11, 13, 15))],
    }
    assert list(trials) == names.get(sweep.name, list(trials))


def differing(one: dict, other: dict) -> set[str]:
    return {key for key in one if one[key] != other[key]}


def test_the_recipe_sets_out_from_the_original():
    sweep = ROOT / "experiments" / "recipe"
    base = json.loads((sweep / "params.json").read_text())
    trials = grid(read_spaces(sweep / "search_space.json"), base, sweep)
    small = {"pretrained": False, "image_size": 112, "num_epochs": 10, "num_workers": 0}
    for seed in (1, 2, 3):
        params = Params.parse(base | trials[f"0_original__seed_{seed}"], sweep)
        assert params == Params(**small, seed=seed), "every key is the default"
    changes = ["stem_maxpool", "gcn_padding", "optimizer learning_rate weight_decay", "loss_weights", "batch_size"]
    changes += ["schedule warmup_epochs", "zero_init_residual", "loss_weights", "augment"]
    runs = {name: asdict(Params.parse(base | values, sweep)) for name, values in trials.items()}
    rungs = [runs[name] for name in runs if name.endswith("__seed_1") and "_with_" not in name]
    for change, before, after in zip(changes, rungs[:-1], rungs[1:], strict=True):
        assert differing(before, after) == set(change.split())
    side_steps = {
        "8_with_learning_rate_x2": "learning_rate",
        "9_with_constant_rate": "schedule warmup_epochs",
        "9_with_ema": "ema_decay",
        "9_with_trainaug": "train_split num_epochs warmup_epochs",
        "9_with_raw_colours": "normalize",
    }
    for name, change in side_steps.items():
        assert differing(rungs[int(name[0])], runs[f"{name}__seed_1"]) == set(change.split())
    assert len(runs) == 3 * (len(rungs) + len(side_steps))
    last = base | trials["9_augment__seed_1"] | {"num_epochs": 60}
    best = Params.load(ROOT / "experiments" / "best" / "params.json")
    assert replace(Params.parse(last, sweep), seed=best.seed, num_workers=best.num_workers) == best


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["low", "high", "log", "step"]), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*study.KINDS, "typo"]), json_values, min_size=1, max_size=3))
def test_any_search_space_is_either_refused_or_usable(tmp_path_factory, space):
    path = space_file(tmp_path_factory.mktemp("fuzz"), space)
    try:
        spaces = read_spaces(path)
        distributions(spaces, {}, path)
        trials = grid(spaces, {}, path)
    except UserError:
        return
    assert all(Params.parse(values, name) for name, values in trials.items())


# ---------------------------------------------------------------------------------------- claims


def test_every_trial_of_a_grid_is_claimed_once(tmp_path):
    first, second = (open_study(tmp_path, RATES) for _ in range(2))
    first.enqueue_missing()
    second.enqueue_missing()
    claims = [process.claim() for process in (first, second, first, second)]
    assert [claim.values for claim in claims[:3]] == RATES and claims[3] is None
    assert all(is_locked(claim.lock.path) for claim in claims[:3])
    assert second.left() == 2, "those of the first"
    for claim in claims[:3]:
        first.finish(claim.trial.number, TrialState.COMPLETE, 0.5)
    assert first.claim() is None and second.left() == 0


def test_a_queue_that_two_processes_filled_at_once_runs_each_trial_once(tmp_path):
    first, second = (open_study(tmp_path, RATES) for _ in range(2))
    for values in RATES:
        first._enqueue(values, replaces=[])
        second._enqueue(values, replaces=[])
    names = [claim.name for process in (first, second) * 4 if (claim := process.claim())]
    assert sorted(names) == sorted(map(trial_name, RATES))
    assert len(first.mine | second.mine) == 3 and first._elsewhere(TrialState.WAITING) == []


def test_a_trial_that_two_starts_queued_is_not_run_a_second_time_when_it_fails(tmp_path):
    first, second = (open_study(tmp_path, RATES[:1]) for _ in range(2))
    for process in (first, second):
        process._enqueue(RATES[0], replaces=[])
    claim = first.claim()
    first.fail(claim.trial, ["broken"])
    claim.lock.release()
    assert first.claim() is None and second.claim() is None and first.left() == 0
    assert first.standing()[claim.name].user_attrs["error"] == ["broken"]


def test_a_trial_whose_folder_was_deleted_runs_again(tmp_path):
    process = open_study(tmp_path, RATES[:2])
    process.enqueue_missing()
    for score, claim in ((0.5, process.claim()), (0.7, process.claim())):
        process.finish(claim.trial.number, TrialState.COMPLETE, score)
        claim.lock.release()
    (tmp_path / trial_name(RATES[0])).mkdir()
    again = open_study(tmp_path, RATES[:2])
    again.enqueue_missing()
    assert again.standing()[trial_name(RATES[1])].state == TrialState.WAITING, "its old result does not count"
    claim = again.claim()
    assert claim.values == RATES[1] and again.claim() is None
    again.finish(claim.trial.number, TrialState.COMPLETE, 0.6)
    assert again.standing()[claim.name].value == 0.6


def test_a_finished_attempt_counts_whatever_else_was_queued(tmp_path):
    process = open_study(tmp_path, RATES[:1])
    process._enqueue(RATES[0], replaces=[])
    claim = process.claim()
    process.finish(claim.trial.number, TrialState.COMPLETE, 0.5)
    process._enqueue(RATES[0], replaces=[])
    assert process.standing()[claim.name].value == 0.5
    process.enqueue_missing()


def test_a_trial_that_is_taken_over_before_its_lock_is_held_is_not_run(tmp_path):
    slow, quick = (open_study(tmp_path, RATES[:1]) for _ in range(2))
    slow.enqueue_missing()
    held = lock(tmp_path / ".locks" / trial_name(RATES[0]))
    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(slow.claim)  # takes the trial, and waits for the lock
        while not (running := quick._elsewhere(TrialState.RUNNING)):
            time.sleep(0.01)
        quick.put_back(running[0].number, RATES[0])
        held.release()
        claim = claim.result()
    assert claim.trial.number != running[0].number and quick.claim() is None


def test_failed_trials_run_again_at_the_next_start_and_only_then(tmp_path):
    process = open_study(tmp_path, RATES)
    process.enqueue_missing()
    claims = [process.claim() for _ in RATES]
    for claim in claims:
        (tmp_path / claim.name).mkdir()
    process.finish(claims[0].trial.number, TrialState.COMPLETE, 0.5)
    process.fail(claims[1].trial, ["broken"])
    process.finish(claims[2].trial.number, TrialState.PRUNED)
    for claim in claims:
        claim.lock.release()
    assert process.claim() is None
    assert process.standing()[claims[1].name].user_attrs["error"] == ["broken"]
    again = open_study(tmp_path, RATES)
    again.enqueue_missing()
    assert again.claim().values == RATES[1] and again.claim() is None


def test_a_grid_can_grow_and_shrink(tmp_path):
    process = open_study(tmp_path, RATES[:2])
    process.enqueue_missing()
    process.claim().lock.release()
    other = open_study(tmp_path, RATES[2:])
    other.enqueue_missing()
    assert other.claim().values == RATES[2], "and not the one that is queued and no longer in the space"
    assert other.left() == 0


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_draw_n_trials_within_the_space_and_never_the_same_twice(tmp_path, sampler):
    space = {
        "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
        "optimizer": CategoricalDistribution(["sgd", "adamw"]),
    }
    first = open_study(tmp_path, space=space, sampler=sampler, n_trials=12)
    drawn = []
    for _ in range(6):
        drawn.append(first.claim())
        first.finish(drawn[-1].trial.number, TrialState.COMPLETE, drawn[-1].values["learning_rate"])
    second = open_study(tmp_path, space=space, sampler=sampler, n_trials=12)
    drawn += [claim for process in (second, first) * 6 if (claim := process.claim())]
    assert len({claim.name for claim in drawn}) == len(drawn) == 12
    assert all(1e-4 <= claim.values["learning_rate"] <= 0.1 for claim in drawn)
    assert {claim.values["optimizer"] for claim in drawn} == {"sgd", "adamw"}
    assert drawn[0].trial.params == drawn[0].values


def test_the_first_draws_are_the_same_every_time(tmp_path):
    draws = []
    for name in "ab":
        (tmp_path / name).mkdir()
        process = open_study(
            tmp_path / name, space={"learning_rate": FloatDistribution(1e-4, 0.1)}, n_trials=3, base={"seed": 5}
        )
        draws.append([process.claim().values for _ in range(3)])
    assert draws[0] == draws[1]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_finite_space_is_drawn_to_its_last_trial(tmp_path, sampler):
    space = {
        "kernel_size": IntDistribution(3, 9, step=2),
        "dropout_rate": FloatDistribution(0, 0.2, step=0.1),
        "optimizer": CategoricalDistribution(["sgd", "adamw"]),
    }
    process = open_study(tmp_path, space=space, sampler=sampler, n_trials=100)
    names = set()
    while claim := process.claim():
        names.add(claim.name)
        process.finish(claim.trial.number, TrialState.COMPLETE, claim.values["kernel_size"] / 10)
        claim.lock.release()
    assert len(names) == 4 * 3 * 2 == process.expected() and process.exhausted and process.left() == 0


def test_samplers_refuse_other_choices_than_before_and_take_other_ends(tmp_path):
    before = {"optimizer": CategoricalDistribution(["sgd"]), "momentum": FloatDistribution(0.5, 0.9)}
    open_study(tmp_path, space=before, n_trials=1).claim()
    open_study(tmp_path, space=before | {"momentum": FloatDistribution(0.1, 0.95)}, n_trials=2).claim()
    for other in (
        {"optimizer": CategoricalDistribution(["sgd", "adamw"])},
        {"momentum": FloatDistribution(0.5, 0.9, log=True)},
        {"momentum": CategoricalDistribution([0.9])},
    ):
        with pytest.raises(UserError, match=f'"{next(iter(other))}" was drawn from other choices before'):
            open_study(tmp_path, space=before | other, n_trials=3)


def test_tpe_learns_from_the_trials_of_a_grid(tmp_path):
    process = open_study(tmp_path, RATES)
    process.enqueue_missing()
    process.fail(process.claim().trial, ["broken"])
    for path in (tmp_path / ".locks").iterdir():
        path.unlink()
    again = open_study(tmp_path, space={"learning_rate": FloatDistribution(1e-4, 1)}, sampler="tpe", n_trials=3)
    again.enqueue_missing()
    retried = [again.claim() for _ in RATES]
    assert {claim.values["learning_rate"] for claim in retried} == {0.1, 0.01, 0.001}
    assert all(claim.trial.params == claim.values for claim in retried)


def test_a_small_space_ends_when_every_trial_is_known(tmp_path):
    space = {"loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}'])}
    process = open_study(tmp_path, space=space, n_trials=50)
    claims = [process.claim() for _ in range(3)]
    assert claims[2] is None and process.exhausted
    assert {json.dumps(claim.values) for claim in claims[:2]} == {
        '{"loss_weights": {"bce": 1}}',
        '{"loss_weights": {"dice": 1}}',
    }
    assert process.expected() == 2


def test_a_trial_picked_before_the_last_was_seen_is_not_one_too_many(tmp_path):
    space = {"batch_size": IntDistribution(1, 3)}
    process, other = (open_study(tmp_path, space=space, n_trials=2) for _ in range(2))
    drawn = {process.claim().values["batch_size"], process.claim().values["batch_size"]}
    (unknown,) = {1, 2, 3} - drawn
    other._enqueue({"batch_size": unknown}, replaces=[])  # as when it saw one trial only
    assert other.claim() is None and process.claim() is None
    assert set(process.attempts()) == {f"batch_size_{size}" for size in drawn}


@pytest.mark.parametrize("picked", [False, True])
def test_a_draw_taken_for_dead_before_it_began_is_not_one_too_many(tmp_path, picked):
    space = {"batch_size": IntDistribution(1, 4)}
    process, other = (open_study(tmp_path, space=space, n_trials=2) for _ in range(2))
    begun = process.claim()
    unknown = sorted({1, 2, 3, 4} - {begun.values["batch_size"]})[:2]
    trials = []
    for size in unknown:  # two processes between asking and claiming
        process.study.enqueue_trial({"batch_size": size}, user_attrs={"replaces": []} if picked else None)
        trials.append(process.study.ask(space))
        trials[-1].set_user_attr("values", {"batch_size": size})
    other.take_over()
    for trial in trials:
        assert not process._has_right_of_way(trial.number, trial.user_attrs["values"], fresh=not picked)
    assert process.claim() and process.claim() is None and other.claim() is None
    assert len(process.attempts()) == process.expected() == 2


def test_a_retried_draw_keeps_its_values(tmp_path):
    space = {
        "loss_weights": CategoricalDistribution(['{"bce": 1}', '{"dice": 1}']),
        "momentum": FloatDistribution(0, 0.9),
    }
    process = open_study(tmp_path, space=space, n_trials=2)
    claim = process.claim()
    process.fail(claim.trial, ["broken"])
    claim.lock.release()
    again = open_study(tmp_path, space=space, n_trials=2)
    again.enqueue_missing()
    retried = again.claim()
    assert retried.values == claim.values and retried.trial.params == claim.trial.params
    assert again.claim().values != claim.values and again.claim() is None


def test_a_changed_base_is_refused_by_key(tmp_path):
    open_study(tmp_path, RATES, base={"num_epochs": 3, "seed": 1})
    with pytest.raises(UserError, match=r"has changed since .* \(num_epochs 3 -> 4, seed 1 -> null\): set it back"):
        open_study(tmp_path, RATES, base={"num_epochs": 4})


# ---------------------------------------------------------------------------------------- processes


def claim_all(folder: Path, names, storage=None, options=None) -> None:
    """Claim and finish trials until there are none, and put their names in a queue."""
    process = open_study(folder, storage=storage, **(options or {"trials": GRID}))
    process.enqueue_missing()
    while (claim := process.claim()) or process.left():
        if claim:
            names.put(claim.name)
            (folder / claim.name).mkdir()
            process.finish(claim.trial.number, TrialState.COMPLETE, 0.5)
            claim.lock.release()


GRID = [{"learning_rate": rate / 100} for rate in range(1, 21)]
DRAWN = {"space": {"batch_size": IntDistribution(1, 40)}, "n_trials": 20}


@pytest.mark.parametrize("options", [{"trials": GRID}, DRAWN], ids=["grid", "random"])
@pytest.mark.parametrize("database", [False, True], ids=["journal", "postgresql"])
def test_processes_that_share_a_study_never_take_the_same_trial(tmp_path, request, database, options):
    storage = request.getfixturevalue("postgresql") if database else None
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    processes = [context.Process(target=claim_all, args=(tmp_path, names, storage, options)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    counts = Counter(names.get() for _ in range(20))
    assert names.empty() and len(counts) == 20


def hold_a_claim(folder: Path, names, storage: str | None) -> None:
    process = open_study(folder, GRID[:1], storage=storage)
    process.enqueue_missing()
    names.put(process.claim().name)
    time.sleep(100)


@pytest.mark.parametrize("database", [False, True])
def test_the_trial_of_a_killed_process_is_queued_again_and_that_of_a_living_one_is_not(
    tmp_path, monkeypatch, request, database
):
    storage = request.getfixturevalue("postgresql") if database else None
    if database:  # in a folder of its own there is no need to wait for heartbeats
        monkeypatch.setattr(study, "DEAD_AFTER", 0.5)
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    other = context.Process(target=hold_a_claim, args=(tmp_path, names, storage))
    other.start()
    name = names.get(timeout=60)
    process = open_study(tmp_path, GRID[:1], storage=storage)
    process.enqueue_missing()
    for _ in range(3):
        process.take_over()
        time.sleep(0.3)
    assert process.claim() is None and process.left() == 1
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    process.take_over()
    assert process.claim().name == name and process.left() == 0


def test_a_heartbeat_in_a_database_keeps_a_trial_whose_lock_is_on_another_machine(tmp_path, monkeypatch, postgresql):
    storage = postgresql
    monkeypatch.setattr(study, "DEAD_AFTER", 1.0)
    for machine in ("one", "two"):
        (tmp_path / machine / "sweep").mkdir(parents=True)
    one, two = (open_study(tmp_path / machine / "sweep", GRID[:1], storage=storage) for machine in ("one", "two"))
    one.enqueue_missing()
    claim = one.claim()
    for beat in range(8):
        two.take_over()
        assert two.left() == 1 and two.claim() is None
        claim.trial.set_user_attr("heartbeat", beat)
        time.sleep(0.2)
    two.take_over()
    time.sleep(1.1)
    two.take_over()
    taken = two.claim()
    assert taken.name == claim.name
    one.finish(claim.trial.number, TrialState.COMPLETE, 0.1)  # too late
    two.finish(taken.trial.number, TrialState.COMPLETE, 0.7)
    assert one.standing()[claim.name].value == 0.7


def test_a_journal_that_was_cut_short_goes_on(tmp_path):
    process = open_study(tmp_path, RATES)
    process.enqueue_missing()
    claim = process.claim()
    process.finish(claim.trial.number, TrialState.COMPLETE, 0.5)
    claim.lock.release()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    again = open_study(tmp_path, RATES)
    again.enqueue_missing()
    again.take_over()
    assert sorted(again.claim().name for _ in RATES) == sorted(map(trial_name, RATES)), "it had not finished after all"


def test_a_damaged_journal_and_an_unusable_database_are_one_line(tmp_path):
    (tmp_path / "study.journal").write_text('{"op_code": 0}\nnonsense\n{"op_code": 1}\n')
    with pytest.raises(UserError, match=r"study\.journal is damaged .*move it away"):
        open_storage(tmp_path, None)
    for url in ("nonsense", "mydb://host/name"):
        with pytest.raises(UserError, match=r"--storage: .*; give a URL as postgresql"):
            open_storage(tmp_path, url)
    with pytest.raises(study.RunFailed, match="the database of --storage cannot be used"):
        open_storage(tmp_path, "postgresql+psycopg2://nobody@127.0.0.1:1/nothing")
    with pytest.raises(UserError, match="SQLite cannot be shared; without --storage"):
        open_storage(tmp_path, f"sqlite:///{tmp_path}/sweep.db")


def test_a_lock_is_held_once_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    held = lock(path)
    assert is_locked(path) and lock(path) is None
    held.release()
    assert not path.exists() and not is_locked(path)
    path.touch()
    assert not is_locked(path)
    lock(path).release()


def take_turns(path: Path, rounds: int) -> None:
    """Lock and release; whoever finds the mark of another inside fails."""
    mark = path.with_name("mark")
    for _ in range(rounds):
        held = lock(path, patience=60)
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        mark.unlink()
        held.release()


def test_two_processes_never_hold_a_lock_together(tmp_path):
    """Also in the moments in which its file is removed and made anew."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=take_turns, args=(tmp_path / "lock", 1500)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
