"""Which trials a sweep has and who runs which: the search space, and the Optuna study that processes share.

Importing this module does not import torch.
"""

import difflib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from model import UserError
from utils import LOCK_PATIENCE, Params, RunFailed, lock, read_json, unlock

Values = dict[str, Any]  # what a trial sets: keys of params.json and their values

DEAD_AFTER = 60.0  # seconds without a heartbeat
DRAWS = 100  # in a row that gave a known trial, before the space counts as exhausted
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


Space = dict[str, list | Range]


def read_spaces(path: Path) -> list[Space]:
    """search_space.json: one object of lists and ranges, or a list of such objects, whose grids are joined.

    Raises UserError naming every fault: each value, and both ends of each range, is held against Params.
    """
    content = read_json(path, if_absent='a sweep has one, as {"learning_rate": [0.0001, 0.001, 0.01]}')
    spaces = content if isinstance(content, list) else [content]
    if not spaces or not all(isinstance(space, dict) and space for space in spaces):
        raise UserError(f'{path} must hold an object, as {{"learning_rate": [0.001, 0.01]}}, or a list of such objects')
    if faults := [fault for space in spaces for key, options in space.items() for fault in _faults(key, options)]:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(faults))}")
    return [
        {key: Range(**options) if isinstance(options, dict) else options for key, options in space.items()}
        for space in spaces
    ]


def _faults(key: str, options: Any) -> list[str]:
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
    if step is not None and (type(step) not in ((int,) if whole else (int, float)) or not 0 < step <= high - low):
        return [f'"{key}": "step" is {json.dumps(step)}; allowed: a{" whole" * whole} number up to {high - low}']
    if whole:  # odd numbers only, for one
        return [fault for value in (low, low + (step or 1)) if (fault := Params.fault(key, value))]
    return []


def trial_name(values: Values) -> str:
    """The folder of a trial, as learning_rate_0.001__batch_size_8, whatever order the keys were given in."""
    order = list(KINDS)
    name = "__".join(f"{key}_{_spelling(values[key])}" for key in sorted(values, key=order.index))
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
        if ranges := [key for key, options in space.items() if isinstance(options, Range)]:
            raise UserError(f"{path}: {', '.join(ranges)} is a range; list its values, or use --sampler random or tpe")
        for combination in itertools.product(*space.values()):
            values = dict(zip(space, combination, strict=True))
            name = trial_name(values)
            if trials.setdefault(name, values) != values:
                raise UserError(f"{path}: two trials would share the folder {name}; choose values that differ more")
            Params.parse(base | values, f"{path}, {name}")
    return trials


def distributions(spaces: list[Space], base: Values, path: Path) -> dict[str, BaseDistribution]:
    """The space as Optuna's samplers take it. Raises UserError if some combination is one that Params refuses."""
    if len(spaces) > 1:
        raise UserError(f"{path}: a list of objects joins grids; --sampler random and tpe need a single object")
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


def _value(key: str, choice: Any) -> Any:
    return json.loads(choice) if KINDS[key] == dict[str, float] else choice


# ---------------------------------------------------------------------------------------------------- the study


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the errors of a database into RunFailed."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause.__cause__ or cause).split("\n")[0].split())
        raise RunFailed(
            f"the database of --storage cannot be used ({reason}); the same command goes on later"
        ) from None


def open_storage(parent_dir: Path, url: str | None) -> BaseStorage:
    """The database of a URL, or study.journal in the sweep's folder; made if need be."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        return _journal(parent_dir / "study.journal")
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    with storage_errors():
        for remaining in reversed(range(5)):
            try:
                return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
            except (ImportError, ArgumentError, ValueError) as error:
                reason = " ".join(str(error.__cause__ or error).split("\n")[0].split())
                raise UserError(
                    f"--storage: {reason}; give a URL as postgresql+psycopg2://user@host/database"
                ) from None
            except SQLAlchemyError:  # two processes that make the tables at the same time trip over each other
                if not remaining:
                    raise
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
        raise UserError(
            f"{path} is damaged ({error}); move it away: trials are then taken up from their folders"
        ) from None


@dataclass
class Claim:
    """A trial that is this process's to run, and the lock of its folder as (file, descriptor)."""

    trial: Trial
    name: str
    values: Values
    lock: tuple[Path, int]


class Study:
    """The trials of a sweep, shared by any number of processes; each trial is run by one of them.

    Optuna's study draws the values, numbers the trials and knows the state of each. A process may run a trial if it has
    taken it from the study and holds the lock of its folder. train.py inherits that lock and so keeps it when the sweep
    is killed: if a running trial's folder can be locked, nobody works there any more. Processes that share a database
    may have folders on different machines; there, the trial's heartbeat must have stopped too.

    Args:
        storage: see open_storage().
        parent_dir: folder of the sweep.
        base: the keys of params.json that every trial begins with.
        grid: all trials by name, or None to draw n_trials from space with the sampler "random" or "tpe".
        shared: whether the storage is a database.
        prune: whether should_prune() compares trials.

    Raises UserError if base has changed since the study began: its trials could not be compared.
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
            study_name=parent_dir.resolve().name,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        )
        self.locks = parent_dir / ".locks"
        self.locks.mkdir(exist_ok=True)
        self.base, self.grid, self.space, self.n_trials = base, grid, space or {}, n_trials
        self.sampler, self.shared = sampler, shared
        self.mine: set[int] = set()  # numbers of the trials that run here
        self.exhausted = False
        self.heartbeats: dict[int, tuple[Any, float]] = {}  # of trials elsewhere: the last one, and when it was new
        began_with = self.study.user_attrs.get("base", base)
        if began_with != base:
            keys = [key for key in {**began_with, **base} if began_with.get(key) != base.get(key)]
            changes = [f"{key} {json.dumps(began_with.get(key))} -> {json.dumps(base.get(key))}" for key in keys]
            raise UserError(
                f"{parent_dir / 'params.json'} has changed since this sweep began ({', '.join(changes)}): "
                "set it back, or start a sweep in another folder"
            )
        self.study.set_user_attr("base", base)

    def attempts(self) -> dict[str, list[FrozenTrial]]:
        """Of every trial by name: the attempts at it, oldest first."""
        result: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            values = trial.user_attrs.get("values")
            if values and "discarded" not in trial.user_attrs:
                result.setdefault(trial_name(values), []).append(trial)
        return result if self.grid is None else {name: result[name] for name in self.grid if name in result}

    def wanted(self) -> dict[str, Values]:
        """What every trial that is known by now sets, by name."""
        known = {name: attempts[0].user_attrs["values"] for name, attempts in self.attempts().items()}
        return known | (self.grid or {})

    def standing(self) -> dict[str, FrozenTrial]:
        """The attempt that counts of every trial that was begun or queued: one that finished, else the latest."""
        rank = {TrialState.COMPLETE: 2, TrialState.PRUNED: 1}
        return {
            name: max(attempts, key=lambda trial: (rank.get(trial.state, 0), trial.number))
            for name, attempts in self.attempts().items()
        }

    def expected(self) -> int:
        """How many trials the sweep will have."""
        return len(self.wanted()) if self.exhausted else max(len(self.wanted()), self.n_trials)

    def enqueue_missing(self) -> None:
        """Queue what the grid lacks, and every trial that has only failed so far."""
        attempts = self.attempts()
        for name, values in self.wanted().items():
            if all(attempt.state == TrialState.FAIL for attempt in attempts.get(name, [])):
                self._enqueue(values)

    def _enqueue(self, values: Values) -> None:
        drawn = {key: _choice(value) for key, value in values.items()} if self.grid is None else {}
        self.study.enqueue_trial(drawn, user_attrs={"values": values})

    def claim(self) -> Claim | None:
        """Take a trial that nobody else has; None if there is none at present."""
        for _ in range(DRAWS):
            attempts = self.attempts()
            queued = any(attempt.state == TrialState.WAITING for trial in attempts.values() for attempt in trial)
            if not queued and (self.grid is not None or len(attempts) >= self.n_trials):
                return None
            self.study.sampler = self._next_sampler()
            trial = self.study.ask(self.space)
            values = trial.user_attrs.get("values")
            if fresh := values is None:
                values = {key: _value(key, choice) for key, choice in trial.params.items()}
                trial.set_user_attr("values", values)
            if not self._has_right_of_way(trial.number, values, fresh=fresh):
                trial.set_user_attr("discarded", True)
                self.finish(trial.number, TrialState.FAIL)
                continue
            path = self.locks / trial_name(values)
            if (descriptor := _patient_lock(path)) is None:
                self.fail(trial, ["a train.py of an earlier sweep is still at work in this folder"])
            elif self._state(trial.number) == TrialState.RUNNING:
                self.mine.add(trial.number)
                return Claim(trial, path.name, values, (path, descriptor))
            else:  # somebody found the folder unlocked just before, and has queued the trial again
                unlock(path, descriptor)
        self.exhausted = True
        return None

    def _next_sampler(self) -> BaseSampler:
        # The seed moves on with the study: two processes, or one started again, must not draw the same numbers.
        seed = self.base.get("seed", Params.seed) + len(self.study.get_trials(deepcopy=False))
        if self.sampler == "tpe":
            return TPESampler(seed=seed % 2**32, constant_liar=True)
        return RandomSampler(seed=seed % 2**32)

    def _has_right_of_way(self, number: int, values: Values, *, fresh: bool) -> bool:
        """Whether this attempt, of several with the same values or one too many, is the one to run.

        Queued attempts have their values from the start, so the lowest number goes first. Fresh ones get theirs
        a moment later, so of two that see each other both step back, and draw again.
        """
        attempts, name = self.attempts(), trial_name(values)
        if self.grid is not None and name not in self.grid:
            return False
        same = [attempt for attempt in attempts.pop(name, []) if attempt.number != number]
        if fresh:
            return not same and len(attempts) < self.n_trials
        return not any(attempt.number < number and attempt.state != TrialState.FAIL for attempt in same)

    def _state(self, number: int) -> TrialState:
        return self.study.get_trials(deepcopy=False)[number].state

    def take_over(self) -> None:
        """Queue again the trials whose process is dead."""
        for trial in self._elsewhere(TrialState.RUNNING):
            path = self.locks / trial_name(trial.user_attrs["values"])
            if self._shows_life(trial) or (descriptor := lock(path)) is None:
                continue
            if self._state(trial.number) == TrialState.RUNNING:
                self.put_back(trial.number, trial.user_attrs["values"])
            unlock(path, descriptor)

    def _shows_life(self, trial: FrozenTrial) -> bool:
        """Whether the heartbeat of a trial in a database has changed of late, by the clock of this machine."""
        beat, now = trial.user_attrs.get("heartbeat"), time.monotonic()
        if trial.number not in self.heartbeats or self.heartbeats[trial.number][0] != beat:
            self.heartbeats[trial.number] = (beat, now)
        return self.shared and now - self.heartbeats[trial.number][1] < DEAD_AFTER

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
        self._enqueue(values)

    def fail(self, trial: Trial, reason: list[str]) -> None:
        """Write down a failure; the next start of the sweep tries again."""
        trial.set_user_attr("error", reason)
        self.finish(trial.number, TrialState.FAIL)

    def finish(self, number: int, state: TrialState, mIoU: float | None = None) -> None:
        """Write down how a trial ended, unless somebody else has."""
        self.mine.discard(number)
        self.study.tell(number, mIoU, state=state, skip_if_finished=True)


def _patient_lock(path: Path) -> int | None:
    deadline = time.monotonic() + LOCK_PATIENCE
    while (descriptor := lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return descriptor
