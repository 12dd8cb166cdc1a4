"""Which trials a sweep has and who runs which: the search space, and the Optuna study that processes share.

Importing this module does not import torch.
"""

import difflib
import hashlib
import itertools
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from engine.folders import LOCK_PATIENCE, TRIAL_LOCKS
from model import UserError
from params import Params
from utils import Lock, RunFailed, lock, read_json

Values = dict[str, Any]  # what a trial sets: keys of params.json and their values

DEAD_AFTER = 60.0  # seconds without a heartbeat
DUPLICATES = 5  # draws in a row of known trials, before an unknown one is picked from what is left
ENUMERABLE = 100_000  # trials of a space; in larger ones duplicates are no matter
KINDS = {f.name: f.type for f in fields(Params)}
WHOLE, NUMBERS = (int, int | None), (int, int | None, float, float | None)


# ---------------------------------------------------------------------------------------------------- search space


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included, drawn evenly or, with log, evenly in their logarithm."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


Space = dict[str, list | Range | str]  # the last is "name", where its trials are to be called by one


def read_spaces(path: Path) -> list[Space]:
    """search_space.json: one object of lists and ranges, or a list of such objects, whose grids are joined.

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
        {key: Range(**options) if isinstance(options, dict) else options for key, options in space.items()}
        for space in spaces
    ]


def _faults(key: str, options: Any) -> list[str]:
    if key == "name":
        named = isinstance(options, str) and re.fullmatch(r"\w[\w+-]{0,59}", options, flags=re.ASCII)
        return [] if named else [f'"name" is {json.dumps(options)}; allowed: up to 60 of letters, digits and _ + -']
    if isinstance(options, dict):
        return _range_faults(key, options)
    if not isinstance(options, list) or not options:
        return [f'"{key}" is {json.dumps(options)}; allowed: a list of values, or a range, {{"low": a, "high": b}}']
    twice = [value for index, value in enumerate(options) if value in options[:index]]
    faults = [fault for value in options if (fault := Params.fault(key, value))]
    return faults or [f'"{key}" lists {json.dumps(value)} twice' for value in twice]


def _range_faults(key: str, options: dict[str, Any]) -> list[str]:
    names = [f.name for f in fields(Range)]
    if unknown := [name for name in options if name not in names]:
        nearest = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f'did you mean "{nearest[0]}"?' if nearest else f"a range has {', '.join(names)}"
        return [f'"{key}": unknown {json.dumps(unknown[0])}; {hint}']
    if not {"low", "high"} <= options.keys():
        return [f'"{key}": a range needs both "low" and "high"']
    low, high, log, step = (options.get(name) for name in names)
    if faults := [fault for end in (low, high) if (fault := Params.fault(key, end))]:
        return faults
    if KINDS[key] not in NUMBERS or low is None or high is None:
        return [f'"{key}" needs numbers for "low" and "high", or a list of values']
    whole = KINDS[key] in WHOLE
    if low >= high:
        return [f'"{key}" goes from {low} to {high}; "low" must be less than "high"']
    if log not in (None, True, False) or (log and (low <= 0 or step is not None)):
        return [f'"{key}": "log" is {json.dumps(log)}; allowed: true or false, true for "low" above 0 without "step"']
    if step is not None and (type(step) not in ((int,) if whole else (int, float)) or not _divides(step, high - low)):
        return [f'"{key}": "step" is {json.dumps(step)}; allowed: a{" whole" * whole} number that divides {high - low}']
    if whole:  # odd numbers only, for one
        return [fault for value in (low, low + (step or 1)) if (fault := Params.fault(key, value))]
    return []


def _divides(step: float, span: float) -> bool:
    return step > 0 and span / step < ENUMERABLE and abs(span / step - round(span / step)) < 1e-6


def trial_name(values: Values, title: str | None = None) -> str:
    """The folder of a trial, as learning_rate_0.001__batch_size_8, whatever order the keys were given in."""
    order = list(KINDS)
    parts = [f"{key}_{_spelling(values[key])}" for key in sorted(values, key=order.index)]
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
    """Every combination, by the name of its folder. Raises UserError for one that Params refuses."""
    trials: dict[str, Values] = {}
    for space in spaces:
        title, lists = space.get("name"), {key: options for key, options in space.items() if key != "name"}
        if ranges := [key for key, options in lists.items() if isinstance(options, Range)]:
            raise UserError(f"{path}: {', '.join(ranges)} is a range; list its values, or use --sampler random or tpe")
        for combination in itertools.product(*lists.values()):
            values = dict(zip(lists, combination, strict=True))
            shown = {key: value for key, value in values.items() if title is None or len(lists[key]) > 1}
            name = trial_name(shown, title)
            if trials.setdefault(name, values) != values:
                raise UserError(f"{path}: two trials would share the folder {name}; choose values that differ more")
            Params.parse(base | values, f"{path}, {name}")
    same = Counter(map(_canonical, trials.values()))
    if twice := [name for name, values in trials.items() if same[_canonical(values)] > 1]:
        raise UserError(f"{path}: {' and '.join(twice[:2])} are the same trial; remove one of them")
    return trials


def _canonical(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def distributions(spaces: list[Space], base: Values, path: Path) -> dict[str, BaseDistribution]:
    """The space as Optuna's samplers take it. Raises UserError if some combination is one that Params refuses."""
    if len(spaces) > 1:
        raise UserError(f"{path}: a list of objects joins grids; --sampler random and tpe need a single object")
    if "name" in spaces[0]:
        raise UserError(f'{path}: "name" is for grids; --sampler random and tpe name trials by their values')
    worst, result = dict(base), {}
    for key, options in spaces[0].items():
        ends = [options.low, options.high] if isinstance(options, Range) else options
        if key in ("warmup_epochs", "num_epochs"):  # the two keys with a rule between them
            worst[key] = max(ends) if key == "warmup_epochs" else min(ends)
        if not isinstance(options, Range):
            result[key] = CategoricalDistribution([_choice(value) for value in options])
        elif KINDS[key] in WHOLE:
            result[key] = IntDistribution(options.low, options.high, log=bool(options.log), step=options.step or 1)
        else:
            result[key] = FloatDistribution(options.low, options.high, log=bool(options.log), step=options.step)
    Params.parse(worst, path)
    return result


def _choice(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value  # objects are no choices of Optuna's


def unknown_trials(space: dict[str, BaseDistribution], known: Collection[str]) -> list[Values] | None:
    """The trials of a space that are not known by name; None if there is no end of them."""
    lists = [_points(distribution) for distribution in space.values()]
    if not all(lists) or math.prod(map(len, lists)) > ENUMERABLE:
        return None
    points = (zip(space, point, strict=True) for point in itertools.product(*lists))
    trials = ({key: _value(key, choice) for key, choice in point} for point in points)
    return [values for values in trials if trial_name(values) not in known]


def _points(distribution: BaseDistribution) -> list:
    """Every value of a distribution, [] for those that are continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + index * distribution.step for index in range(count + 1)]
    return []


def _value(key: str, choice: Any) -> Any:
    return json.loads(choice) if KINDS[key] == dict[str, float] else choice


# ---------------------------------------------------------------------------------------------------- the study


STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


def storage_failure(error: Exception) -> RunFailed:
    """What to say of a database that does not answer."""
    reason = _reason(error.__cause__ or error)
    return RunFailed(f"the database of --storage cannot be used ({reason}); the same command goes on later")


def _reason(error: BaseException) -> str:
    """The first line of an error, or of the one behind it."""
    return " ".join(str(error.__cause__ or error).split("\n")[0].split())


def open_storage(parent_dir: Path, url: str | None) -> BaseStorage:
    """The database of a URL, or study.journal in the sweep's folder; made if need be."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        return _journal(parent_dir / "study.journal")
    from optuna.storages import RDBStorage

    if url.startswith("sqlite"):  # it cannot lock a row, and two processes would take the same trial
        raise UserError("--storage: SQLite cannot be shared; without --storage, processes share the sweep's folder")
    for remaining in reversed(range(5)):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (ImportError, ArgumentError, ValueError, RuntimeError) as error:  # the last: tables of an older Optuna
            raise UserError(
                f"--storage: {_reason(error)}; give a URL as postgresql+psycopg2://user@host/database"
            ) from None
        except STORAGE_ERRORS as error:  # two processes that make the tables at the same time trip over each other
            if not remaining:
                raise storage_failure(error) from None
            time.sleep(0.5)


def _journal(path: Path) -> BaseStorage:
    guard = FileLock(f"{path}.lock")  # an operating system's lock ends with its process; Optuna's own lasts 30 s longer
    with guard, open(path, "ab+") as stream:
        stream.seek(0)
        if rest := stream.read().rpartition(b"\n")[2]:  # of a write that was cut short
            stream.truncate(stream.tell() - len(rest))
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=guard))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away: folders of finished trials are kept") from None


@dataclass
class Claim:
    """A trial that is this process's to run, and the lock of its folder."""

    trial: Trial
    name: str
    values: Values
    lock: Lock


class Study:
    """The trials of a sweep, shared by any number of processes; each trial is run by one of them.

    Optuna's study draws the values, numbers the attempts at each trial and knows their states. A process may run a
    trial if it has taken it from the study and holds the lock of its folder. train.py inherits that lock and so keeps
    it when the sweep is killed: if a running trial's folder can be locked, nobody works there any more. Processes that
    share a database may have folders on different machines; there, the heartbeat must have stopped too.

    Args:
        storage: see open_storage().
        parent_dir: folder of the sweep.
        base: the keys of params.json that every trial begins with.
        grid: all trials by name, or None to draw n_trials from space with the sampler "random" or "tpe".
        shared: whether the storage is a database, where the sweep has the name of its folder.
        prune: whether should_prune() compares trials.

    Raises UserError if what was there before does not go with it: another base, or other choices to draw from.
    """

    def __init__(
        self,
        storage: BaseStorage,
        parent_dir: Path,
        base: Values,
        *,
        grid: dict[str, Values] | None = None,
        space: dict[str, BaseDistribution] | None = None,
        sampler: str = "random",
        n_trials: int = 0,
        shared: bool = False,
        prune: bool = False,
    ):
        self.study = optuna.create_study(
            storage=storage,
            study_name=parent_dir.resolve().name if shared else "sweep",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        )
        self.parent_dir, self.locks = parent_dir, parent_dir / TRIAL_LOCKS
        self.base, self.space, self.n_trials = base, space or {}, n_trials
        self.names = {_canonical(values): name for name, values in (grid or {}).items()} | self._folders()
        self.grid = None if grid is None else {self.name(values): values for values in grid.values()}
        self.sampler, self.shared = sampler, shared
        self.mine: set[int] = set()  # numbers of the attempts made here
        self.exhausted = False
        self.heartbeats: dict[int, tuple[Any, float]] = {}  # of attempts elsewhere: the last one, and when it was new
        self._check(grid)
        self.study.set_user_attr("base", base)
        self.locks.mkdir(exist_ok=True)

    def _folders(self) -> dict[str, str]:
        """The folders of the trials that have begun, by their values: they keep them, whatever they are called now."""
        attempts = [trial.user_attrs for trial in self.study.get_trials(deepcopy=False)]
        return {_canonical(attempt["values"]): attempt["folder"] for attempt in attempts if "folder" in attempt}

    def _check(self, grid: dict[str, Values] | None) -> None:
        before = self.study.user_attrs.get("base", self.base)
        if before != self.base:
            keys = [key for key in {**before, **self.base} if before.get(key) != self.base.get(key)]
            changes = [f"{key} {json.dumps(before.get(key))} -> {json.dumps(self.base.get(key))}" for key in keys]
            raise UserError(
                f"{self.parent_dir / 'params.json'} has changed since this sweep began ({', '.join(changes)}): "
                "set it back, or start a sweep in another folder"
            )
        if shared := [name for name, count in Counter(map(self.name, (grid or {}).values())).items() if count > 1]:
            raise UserError(
                f"{self.parent_dir / 'search_space.json'}: a trial that keeps the folder {shared[0]}, in which it has "
                'begun, and another one would share it; choose another "name"'
            )
        for trial in self.study.get_trials(deepcopy=False):
            for key, drawn_from in trial.distributions.items():
                now = self.space.get(key, drawn_from)
                same_kind = type(now) is type(drawn_from) and getattr(now, "log", 0) == getattr(drawn_from, "log", 0)
                if not same_kind or (isinstance(now, CategoricalDistribution) and now != drawn_from):
                    raise UserError(
                        f'{self.parent_dir / "search_space.json"}: "{key}" was drawn from other choices before, and '
                        "samplers can only move the ends of a range; set it back, or start a sweep in another folder"
                    )

    def name(self, values: Values) -> str:
        """The folder of a trial."""
        return self.names.get(_canonical(values)) or trial_name(values)

    def attempts(self) -> dict[str, list[FrozenTrial]]:
        """Of every trial by name: the attempts at it, oldest first, but for those given up before they began."""
        result: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            given_up = trial.state == TrialState.FAIL and not {"folder", "error"} & set(trial.user_attrs)
            if (values := trial.user_attrs.get("values")) and not given_up:
                result.setdefault(self.name(values), []).append(trial)
        return result if self.grid is None else {name: result[name] for name in self.grid if name in result}

    def standing(self) -> dict[str, FrozenTrial]:
        """Of every trial the attempt that counts: of those that none replaces, a finished one, or else the last."""
        result, rank = {}, {TrialState.COMPLETE: 2, TrialState.PRUNED: 1}
        for name, attempts in self.attempts().items():
            replaced = {number for attempt in attempts for number in attempt.user_attrs.get("replaces", [])}
            result[name] = max(
                (attempt for attempt in attempts if attempt.number not in replaced),
                key=lambda attempt: (rank.get(attempt.state, 0), attempt.number),
            )
        return result

    def wanted(self) -> dict[str, Values]:
        """What every trial that is known by now sets, by name."""
        known = {name: attempts[0].user_attrs["values"] for name, attempts in self.attempts().items()}
        return known | (self.grid or {})

    def expected(self) -> int:
        """How many trials the sweep will have."""
        return len(self.wanted()) if self.exhausted else max(len(self.wanted()), self.n_trials)

    def enqueue_missing(self) -> None:
        """Queue what the grid lacks, every trial that has only failed so far, and those whose folder was deleted."""
        attempts, standing = self.attempts(), self.standing()
        for name, values in self.wanted().items():
            state = standing[name].state if name in standing else None
            deleted = not self.shared and not (self.parent_dir / name).exists()
            if state in (None, TrialState.FAIL) or (deleted and state in (TrialState.COMPLETE, TrialState.PRUNED)):
                self._enqueue(values, replaces=[attempt.number for attempt in attempts.get(name, [])])

    def _enqueue(self, values: Values, *, replaces: list[int]) -> None:
        """Queue an attempt; replaces are the earlier ones at the same trial, as they were when this was decided."""
        choices = {key: _choice(value) for key, value in values.items()}
        self.study.enqueue_trial(choices, user_attrs={"values": values, "replaces": replaces})

    def claim(self) -> Claim | None:
        """Take a trial that nobody else has; None if there is none at present."""
        duplicates = 0
        while True:
            attempts = self.attempts()
            queued = any(attempt.state == TrialState.WAITING for trial in attempts.values() for attempt in trial)
            if not queued and (self.grid is not None or len(attempts) >= self.n_trials):
                return None
            if not queued and duplicates >= DUPLICATES:
                unknown = unknown_trials(self.space, attempts)
                self.exhausted = unknown == [] or duplicates > 100
                if self.exhausted:
                    return None
                if unknown:
                    self._enqueue(random.Random(len(attempts)).choice(unknown), replaces=[])
            self.study.sampler = self._next_sampler()
            trial = self.study.ask(self.space)
            values = trial.user_attrs.get("values")
            if fresh := values is None:
                values = {key: _value(key, choice) for key, choice in trial.params.items()}
                trial.set_user_attr("values", values)
            if self._has_right_of_way(trial.number, values, fresh=fresh):
                if claim := self._lock(trial, values):
                    return claim
            else:
                duplicates += fresh
                self.finish(trial.number, TrialState.FAIL)

    def _next_sampler(self) -> BaseSampler:
        # The seed moves on with the study: two processes, or one started again, must not draw the same numbers.
        seed = (self.base.get("seed", Params.seed) + len(self.study.get_trials(deepcopy=False))) % 2**32
        if self.sampler == "tpe":
            return TPESampler(seed=seed, constant_liar=True)  # running trials count as bad ones, or all would be alike
        return RandomSampler(seed=seed)

    def _has_right_of_way(self, number: int, values: Values, *, fresh: bool) -> bool:
        """Whether this attempt, of several with the same values or one too many, is the one to run.

        Queued attempts have their values from the start, so the lowest number goes first among those that replace the
        same ones. Fresh ones get theirs a moment later, so of two that see each other both step back, and draw again.
        A queued one that replaces none was picked by a process that may not have seen the last trials of the others.
        """
        attempts, name = self.attempts(), self.name(values)
        if self.grid is not None and name not in self.grid:
            return False
        same = attempts.pop(name, [])
        if fresh:
            return [attempt.number for attempt in same] == [number] and len(attempts) < self.n_trials
        replaced = next((attempt.user_attrs["replaces"] for attempt in same if attempt.number == number), None)
        if replaced is None:  # somebody has given it up
            return False
        earlier = sum(others[0].number < number for others in attempts.values())
        if self.grid is None and not replaced and earlier >= self.n_trials:
            return False
        return all(attempt.number in replaced for attempt in same if attempt.number < number)

    def _lock(self, trial: Trial, values: Values) -> Claim | None:
        """The claim to a trial, unless somebody found its folder unlocked just before, and has queued it again."""
        name = self.name(values)
        if (held := lock(self.locks / name, patience=LOCK_PATIENCE)) is None:
            self.fail(trial, ["a train.py of an earlier sweep is still at work in this folder"])
            return None
        try:
            with suppress(UpdateFinishedTrialError):  # queued again between the question and the note
                if self._now(trial.number).state == TrialState.RUNNING:
                    trial.set_user_attr("folder", name)
                    self.mine.add(trial.number)
                    return Claim(trial, name, values, held)
        finally:
            if trial.number not in self.mine:
                held.release()
        return None

    def _now(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def take_over(self) -> None:
        """Queue again the trials whose process is dead; one that was drawn and has not begun is given up instead."""
        for attempt in self._elsewhere(TrialState.RUNNING):
            values = attempt.user_attrs["values"]
            if self._shows_life(attempt) or (held := lock(self.locks / self.name(values))) is None:
                continue
            try:
                if (now := self._now(attempt.number)).state != TrialState.RUNNING:
                    continue
                drawn = self.grid is None and not now.user_attrs.get("replaces")
                if drawn and "folder" not in now.user_attrs:
                    self.finish(attempt.number, TrialState.FAIL)
                else:
                    self.put_back(attempt.number, values)
            finally:
                held.release()

    def _shows_life(self, attempt: FrozenTrial) -> bool:
        """Whether the heartbeat of an attempt in a database has changed of late, by the clock of this machine."""
        beat, now = attempt.user_attrs.get("heartbeat"), time.monotonic()
        if attempt.number not in self.heartbeats or self.heartbeats[attempt.number][0] != beat:
            self.heartbeats[attempt.number] = (beat, now)
        return self.shared and now - self.heartbeats[attempt.number][1] < DEAD_AFTER

    def _elsewhere(self, *states: TrialState) -> list[FrozenTrial]:
        attempts = (attempt for trial in self.attempts().values() for attempt in trial)
        return [attempt for attempt in attempts if attempt.state in states and attempt.number not in self.mine]

    def left(self) -> int:
        """How many trials are neither finished nor here."""
        undrawn = 0 if self.grid is not None or self.exhausted else max(0, self.n_trials - len(self.attempts()))
        return undrawn + len(self._elsewhere(TrialState.RUNNING, TrialState.WAITING))

    def put_back(self, number: int, values: Values) -> None:
        """Queue a trial again that was cut short through no fault of its own."""
        self.finish(number, TrialState.FAIL)
        attempts = self.attempts().get(self.name(values), [])
        self._enqueue(values, replaces=[attempt.number for attempt in attempts if attempt.number <= number])

    def fail(self, trial: Trial, reason: list[str]) -> None:
        """Write down a failure; the next start of the sweep tries again."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr("error", reason)
        self.finish(trial.number, TrialState.FAIL)

    def finish(self, number: int, state: TrialState, mIoU: float | None = None) -> None:
        """Write down how an attempt ended, unless somebody else has."""
        with suppress(UpdateFinishedTrialError):
            self.study.tell(number, mIoU, state=state, skip_if_finished=True)
