"""The search space of a sweep: what may vary, and what the folder of a trial is called."""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from model import UserError
from params import Params
from utils import read_json

Values = dict[str, Any]  # keys of params.json with a trial's values; in a space with a list of them, or a range
Space = dict[str, BaseDistribution]  # the same, as Optuna has it

KINDS = Params.__annotations__  # by key
WHOLE, NUMBERS = (int, int | None), (int, int | None, float, float | None)
RANGE = 'a range of numbers {"low": a, "high": b}, a <= b, with "log": true for a > 0 or a "step" that divides b - a'


def read_spaces(path: Path) -> list[Values]:
    """Read search_space.json: one object of lists and ranges, or a list of such objects, whose grids are joined.

    "name" in an object begins the folders of its trials. Raises UserError naming every fault, those of Params included.
    """
    content = read_json(path, if_absent='a sweep has one, as {"learning_rate": [0.0001, 0.001, 0.01]}')
    spaces = content if isinstance(content, list) else [content]
    if not spaces or not all(isinstance(space, dict) and space.keys() - {"name"} for space in spaces):
        raise UserError(f'{path} must hold an object with a key that varies, as {{"seed": [1, 2]}}, or a list of such')
    if faults := [fault for space in spaces for key, options in space.items() for fault in _faults(key, options)]:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(faults))}")
    return spaces


def _faults(key: str, options: Any) -> list[str]:
    if key == "name":
        named = isinstance(options, str) and re.fullmatch(r"\w[\w+-]{0,59}", options, flags=re.ASCII)
        return [] if named else [f'"name" is {json.dumps(options)}; allowed: up to 60 of letters, digits and _ + -']
    if key == "best_metric":
        return ['"best_metric" is what the trials are compared by; set it in params.json']
    if key not in KINDS:
        return [str(Params.fault(key, options))]
    values = _ends(key, options) if isinstance(options, dict) else options
    if not isinstance(values, list) or not values:
        return [f'"{key}" is {json.dumps(options)}; allowed: a list of values, or {RANGE}']
    return [fault for value in values if (fault := Params.fault(key, value))]


def _ends(key: str, options: dict[str, Any]) -> list[Any]:
    """Return the first two values of a range, for keys that take odd numbers only, and its last; [] for no range."""
    with warnings.catch_warnings(action="ignore"), suppress(TypeError, ValueError, ArithmeticError):  # of Optuna
        found = _distribution(key, options)
        as_written = all(getattr(found, k) == v and isinstance(v, bool) == (k == "log") for k, v in options.items())
        if as_written and KINDS[key] in NUMBERS:
            return [found.low, min(found.low + (found.step or 0), found.high), found.high]
    return []


def _distribution(key: str, options: Any) -> Any:
    if isinstance(options, list):
        return CategoricalDistribution(list(dict.fromkeys(map(choice, options))))
    return IntDistribution(**options) if KINDS[key] in WHOLE else FloatDistribution(**options)


def trial_name(values: Values, title: str | None = None) -> str:
    """Return the folder of a trial, as learning_rate_0.001__batch_size_8, whatever the order of the keys."""
    parts = [f"{key}_{_spelling(values[key])}" for key in sorted(values, key=list(KINDS).index)]
    name = "__".join(parts if title is None else [title, *parts])
    name = re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)
    return name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _spelling(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}_{_spelling(item)}" for key, item in sorted(value.items()))
    if isinstance(value, float):  # as written where that is short, and six digits of what a sampler has drawn
        return f"{value:g}" if float(f"{value:g}") == value or len(repr(value)) > 12 else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def grid(spaces: list[Values], base: Values, path: Path) -> dict[str, Values]:
    """Return every combination, by the name of its folder. Raises UserError for one that Params refuses."""
    trials: dict[str, Values] = {}
    for space in spaces:
        title, lists = space.get("name"), {key: options for key, options in space.items() if key != "name"}
        if ranges := [key for key, options in lists.items() if isinstance(options, dict)]:
            raise UserError(f"{path}: {', '.join(ranges)} is a range; list its values, or use --sampler random or tpe")
        for combination in itertools.product(*lists.values()):
            values = dict(zip(lists, combination, strict=True))
            shown = {key: value for key, value in values.items() if title is None or len(lists[key]) > 1}
            name = trial_name(shown, title)
            if trials.setdefault(name, values) != values:
                raise UserError(f"{path}: two trials would share the folder {name}; choose values that differ more")
            Params.parse(base | values, f"{path}, {name}")
    return trials


def distributions(spaces: list[Values], path: Path) -> Space:
    """Return what a sampler draws from. Raises UserError for what only a grid can have."""
    if len(spaces) > 1 or "name" in spaces[0]:
        raise UserError(f'{path}: a list of objects and "name" are for grids; --sampler random and tpe take one object')
    return {key: _distribution(key, options) for key, options in spaces[0].items()}


def grid_distributions(trials: Collection[Values]) -> Space:
    """Return the choices of a grid, as Optuna records them."""
    keys = dict.fromkeys(key for values in trials for key in values)
    return {key: _distribution(key, [values[key] for values in trials if key in values]) for key in keys}


def choice(value: Any) -> Any:
    """Return a value as Optuna takes it, which knows no objects: they become JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def suggest(trial: Trial, key: str, distribution: Any) -> Any:
    """Let Optuna draw the value of a key, or return the one that the trial was queued with."""
    if isinstance(distribution, CategoricalDistribution):
        drawn = trial.suggest_categorical(key, distribution.choices)
        return json.loads(str(drawn)) if KINDS[key] == dict[str, float] else drawn
    draw = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return draw(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
