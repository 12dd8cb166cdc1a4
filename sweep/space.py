"""The search space of a sweep: what may vary, and what the folder of a trial is called."""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import Trial

from model import UserError
from params import Params
from utils import is_number, read_json

Values = dict[str, Any]  # what a trial sets: keys of params.json and their values
Space = dict[str, Any]  # key: a list of values, or a distribution; "name": what its trials are called by

KINDS = {f.name: f.type for f in fields(Params)}
WHOLE, NUMBERS = (int, int | None), (int, int | None, float, float | None)
RANGE = 'a range is {"low": a, "high": b}, numbers a < b, with "log": true for a > 0 or a "step" that divides b - a'
DUPLICATES = 1000  # draws in a row of known trials, after which a space has no others


def read_spaces(path: Path) -> list[Space]:
    """Read search_space.json: one object of lists and ranges, or a list of such objects, whose grids are joined.

    "name" in an object is what the folders of its trials begin with. Raises UserError naming every fault: each value,
    and both ends of each range, is held against Params.
    """
    content = read_json(path, if_absent='a sweep has one, as {"learning_rate": [0.0001, 0.001, 0.01]}')
    spaces = content if isinstance(content, list) else [content]
    if not spaces or not all(isinstance(space, dict) and space.keys() - {"name"} for space in spaces):
        raise UserError(
            f'{path} must hold an object, as {{"learning_rate": [0.001, 0.01]}}, or a list of such objects, '
            'each with a key that varies besides "name"'
        )
    faults = [fault for space in spaces for key, options in space.items() for fault in _faults(key, options)]
    names = [space["name"] for space in spaces if "name" in space]
    faults += [f'"name": two objects are called {json.dumps(name)}' for name in names if names.count(name) > 1]
    if faults:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(faults))}")
    return [
        {key: _range(key, options) if isinstance(options, dict) else options for key, options in space.items()}
        for space in spaces
    ]


def _faults(key: str, options: Any) -> list[str]:
    if key == "name":
        named = isinstance(options, str) and re.fullmatch(r"\w[\w+-]{0,59}", options, flags=re.ASCII)
        return [] if named else [f'"name" is {json.dumps(options)}; allowed: up to 60 of letters, digits and _ + -']
    if key == "best_metric":
        return ['"best_metric" is what the trials are compared by; set it in params.json']
    if isinstance(options, dict):
        return _range_faults(key, options)
    if not isinstance(options, list) or not options:
        return [f'"{key}" is {json.dumps(options)}; allowed: a list of values, or a range, {{"low": a, "high": b}}']
    twice = [value for index, value in enumerate(options) if value in options[:index]]
    faults = [fault for value in options if (fault := Params.fault(key, value))]
    return faults or [f'"{key}" lists {json.dumps(value)} twice' for value in twice]


def _range(key: str, options: dict[str, Any]) -> FloatDistribution | IntDistribution:
    return IntDistribution(**options) if KINDS[key] in WHOLE else FloatDistribution(**options)


def _range_faults(key: str, options: dict[str, Any]) -> list[str]:
    low: Any = options.get("low")
    high: Any = options.get("high")
    step = options.get("step")
    ends = [end for end in (low, high) if end is not None] or [None]
    if faults := [fault for end in ends if (fault := Params.fault(key, end))]:
        return faults
    sound = options.keys() <= {"low", "high", "log", "step"} and is_number(low) and is_number(high) and low < high
    sound &= KINDS[key] in NUMBERS and isinstance(options.get("log", False), bool)
    sound &= step is None or type(step) is int or (is_number(step) and KINDS[key] not in WHOLE)
    with (
        warnings.catch_warnings(action="error", category=UserWarning),
        suppress(ValueError, ArithmeticError, UserWarning),
    ):
        if sound and (found := _range(key, options)):
            second = low + (step or 1)  # odd numbers only, for one
            return [fault] if isinstance(found, IntDistribution) and (fault := Params.fault(key, second)) else []
    return [f'"{key}" is {json.dumps(options)}; {RANGE}']


def trial_name(values: Values, title: str | None = None) -> str:
    """Return the folder of a trial, as learning_rate_0.001__batch_size_8, whatever the order of the keys."""
    parts = [f"{key}_{_spelling(values[key])}" for key in sorted(values, key=list(KINDS).index)]
    name = "__".join(parts if title is None else [title, *parts])
    name = re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)
    return name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _spelling(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}_{_spelling(item)}" for key, item in value.items())
    if isinstance(value, float):  # as written where that is short, and six digits of what a sampler has drawn
        return f"{value:g}" if float(f"{value:g}") == value or len(repr(value)) > 12 else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def grid(spaces: list[Space], base: Values, path: Path) -> dict[str, Values]:
    """Return every combination, by the name of its folder. Raises UserError for one that Params refuses."""
    trials: dict[str, Values] = {}
    names: dict[str, str] = {}
    for space in spaces:
        title, lists = space.get("name"), {key: options for key, options in space.items() if key != "name"}
        if ranges := [key for key, options in lists.items() if isinstance(options, BaseDistribution)]:
            raise UserError(f"{path}: {', '.join(ranges)} is a range; list its values, or use --sampler random or tpe")
        for combination in itertools.product(*lists.values()):
            values = dict(zip(lists, combination, strict=True))
            shown = {key: value for key, value in values.items() if title is None or len(lists[key]) > 1}
            name = trial_name(shown, title)
            if trials.setdefault(name, values) != values:
                raise UserError(f"{path}: two trials would share the folder {name}; choose values that differ more")
            if (other := names.setdefault(canonical(values), name)) != name:
                raise UserError(f"{path}: {other} and {name} are the same trial; remove one of them")
            Params.parse(base | values, f"{path}, {name}")
    return trials


def canonical(values: Values) -> str:
    """Return what is equal for equal trials."""
    return json.dumps(values, sort_keys=True)


def distributions(spaces: list[Space], base: Values, path: Path) -> dict[str, BaseDistribution]:
    """Return the space that a sampler draws from. Raises UserError if Params refuses some combination."""
    if len(spaces) > 1 or "name" in spaces[0]:
        raise UserError(f'{path}: a list of objects and "name" are for grids; --sampler random and tpe take one object')
    space, worst = spaces[0], dict(base)
    for key, end in {"warmup_epochs": max, "num_epochs": min}.items():  # the two keys with a rule between them
        if options := space.get(key):
            worst[key] = end(options if isinstance(options, list) else (options.low, options.high))
    Params.parse(worst, path)
    lists = {key: options for key, options in space.items() if isinstance(options, list)}
    return space | {key: CategoricalDistribution(list(map(choice, options))) for key, options in lists.items()}


def grid_distributions(trials: Iterable[Values]) -> dict[str, BaseDistribution]:
    """Return what the values of a grid are recorded with: for plots, and for a sampler that comes after it."""
    options: dict[str, list[Any]] = {}
    for key, value in (item for values in trials for item in values.items()):
        options.setdefault(key, []).append(choice(value))
    ranges = {
        key: _range(key, {"low": min(drawn), "high": max(drawn), "log": 0 < 10 * min(drawn) <= max(drawn)})
        for key, drawn in options.items()
        if KINDS[key] in NUMBERS and None not in drawn
    }
    return {key: ranges.get(key) or CategoricalDistribution(list(dict.fromkeys(options[key]))) for key in options}


def choice(value: Any) -> Any:
    """Return a value as Optuna takes it: objects are no choices of its."""
    return json.dumps(value) if isinstance(value, dict) else value


def suggest(trial: Trial, key: str, distribution: Any) -> Any:
    """Let Optuna draw the value of a key, or record the one that the trial was queued with."""
    if isinstance(distribution, CategoricalDistribution):
        drawn = trial.suggest_categorical(key, distribution.choices)
        return json.loads(str(drawn)) if KINDS[key] == dict[str, float] else drawn
    draw = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return draw(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def random_trials(space: dict[str, BaseDistribution], count: int, *, seed: int, known: Collection[str]) -> list[Values]:
    """Draw trials that are not known by name, the same ones for the same seed; fewer if the space has no more."""
    study, duplicates = optuna.create_study(sampler=RandomSampler(seed=seed)), 0
    drawn: dict[str, Values] = {}
    while len(drawn) < count and duplicates < DUPLICATES:
        trial = study.ask()
        values = {key: suggest(trial, key, distribution) for key, distribution in space.items()}
        name = trial_name(values)
        duplicates = duplicates + 1 if name in known or name in drawn else 0
        drawn |= {} if duplicates else {name: values}
    return list(drawn.values())
