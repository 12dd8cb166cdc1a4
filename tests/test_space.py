"""Search spaces: what may be written, and which trials come of it."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from model import UserError
from params import Params
from sweep.space import KINDS, RANGE, distributions, grid, read_spaces, trial_name
from utils import ROOT


def space_file(folder: Path, content) -> Path:
    path = folder / "search_space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not valid JSON"),
        ("[{}]", "must hold an object"),
        ({"name": "alone"}, "must hold an object with a key that varies"),
        ({"name": "a/b", "seed": [1]}, '"name" is "a/b"; allowed'),
        ({"best_metric": ["mIoU", "loss"]}, "is what the trials are compared by"),
        ({"learning_rat": {"low": 0.1, "high": 1}}, 'did you mean "learning_rate"?'),
        ({"learning_rate": 0.1}, "allowed: a list of values, or a range"),
        ({"batch_size": [1, 0], "optimizer": ["sgd", "none"]}, '"batch_size" is 0; allowed: an integer of at least 1;'),
        ({"batch_size": [1, 0], "optimizer": ["sgd", "none"]}, '"optimizer" is "none"'),
        ({"optimizer": {"low": 1, "high": 2}}, RANGE),
        ({"learning_rate": {"low": 0.1, "hihg": 1}}, RANGE),
        ({"learning_rate": {"low": 1, "high": 0.1}}, RANGE),
        ({"learning_rate": {"low": -1, "high": 0.1}}, '"learning_rate" is -1'),
        ({"weight_decay": {"low": 0, "high": 0.1, "log": True}}, RANGE),
        ({"weight_decay": {"low": 0.01, "high": 0.1, "log": "no"}}, RANGE),
        ({"weight_decay": {"low": 0, "high": 0.1, "step": 0.04}}, RANGE),
        ({"batch_size": {"low": 2, "high": 8, "step": 1.5}}, RANGE),
        ({"kernel_size": {"low": 3, "high": 15}}, '"kernel_size" is 4; allowed: an odd integer from 3'),
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


def test_a_list_of_spaces_joins_their_grids_and_a_name_begins_the_folders_of_its_trials(tmp_path):
    spaces = [
        {"name": "original", "optimizer": ["sgd"], "learning_rate": [0.001], "seed": [1, 2]},
        {"name": "ours", "optimizer": ["adamw"]},
        {"seed": [3, 4, 3]},
        {"seed": [4, 5]},
    ]
    path = space_file(tmp_path, spaces)
    assert grid(read_spaces(path), {}, path) == {
        "original__seed_1": {"optimizer": "sgd", "learning_rate": 0.001, "seed": 1},
        "original__seed_2": {"optimizer": "sgd", "learning_rate": 0.001, "seed": 2},
        "ours": {"optimizer": "adamw"},
        **{f"seed_{seed}": {"seed": seed} for seed in (3, 4, 5)},
    }
    for refused in (spaces[:1], spaces[2:]):
        with pytest.raises(UserError, match='list of objects and "name" are for grids; --sampler random and tpe take'):
            distributions(refused, path)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"warmup_epochs": [1, 3], "num_epochs": [9, 3]}, 'num_epochs_3__warmup_epochs_3: "warmup_epochs" is 3'),
        ({"learning_rate": {"low": 0.1, "high": 1}}, "learning_rate is a range; list its values, or use --sampler"),
        ({"train_split": ["a b", "a-b"]}, "two trials would share the folder train_split_a-b; choose"),
        ([{"name": "a", "seed": [1]}, {"name": "a", "seed": [2]}], "two trials would share the folder a; choose"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, content, words):
    path = space_file(tmp_path, content)
    with pytest.raises(UserError, match=words):
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
            "optimizer": ["sgd", "adamw", "sgd"],
            "loss_weights": [weights, {"bce": 1}],
        },
    )
    assert distributions(read_spaces(path), path) == {
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["low", "high", "log", "step"]), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*KINDS, "typo"]), json_values, min_size=1, max_size=3))
def test_any_search_space_is_either_refused_or_usable(tmp_path_factory, space):
    path = space_file(tmp_path_factory.mktemp("fuzz"), space)
    try:
        spaces = read_spaces(path)
        distributions(spaces, path)
        trials = grid(spaces, {}, path)
    except UserError:
        return
    assert all(Params.parse(values, name) for name, values in trials.items())
