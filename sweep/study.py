"""The trials of a sweep: which there are, which are still to run, and the Optuna study that remembers them."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from engine.folders import better_of
from model import UserError
from params import Params
from sweep.space import Values, choice, suggest, trial_name
from utils import RunFailed

FIRST_DRAWS = 10  # trials drawn at random, before TPE has something to learn from
DUPLICATES = 1000  # draws in a row of known trials, after which a space has no others
ENTRY = b'{"op_code"'  # what a line of a journal begins with


class NotRun(Exception):
    """An entry of the study that is not run: it was drawn before, has left the grid, or the sweep is to stop."""


class Journal(JournalFileBackend):
    """Optuna's journal, for one process; half a last line is removed. Raises ValueError for a file that is none."""

    def __init__(self, path: Path):
        lock: Any = threading.Lock()  # Optuna's own would outlive a kill by 30 s
        super().__init__(str(path), lock_obj=lock)
        self.failure: RunFailed | None = None  # to append
        with open(path, "rb+") as stream:  # a kill or a full disk may have left half a line
            content = stream.read()
            if not ENTRY.startswith(content[: len(ENTRY)]):
                raise ValueError("it is no journal of Optuna")
            stream.truncate(content.rfind(b"\n") + 1)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries, one per line. Raises RunFailed where the file cannot be written, from then on."""
        try:
            if self.failure is None:
                return super().append_logs(logs)
        except OSError as error:
            self.failure = RunFailed(f"{self._file_path}: {error.strerror}; the same command resumes the sweep")
        raise self.failure


@dataclass
class Study:
    """The trials of a sweep, which one coordinator runs.

    A trial waits in the study's queue until it is run; trial_name() of its values tells it from others. An entry of the
    study is an attempt at a trial, of which the last counts; its user attribute "values" is what the trial sets,
    "folder" where it has begun. Raises UserError if the base has changed, or the choices that samplers draw from.
    """

    parent_dir: Path
    base: Values  # the keys of params.json that every trial begins with
    space: dict[str, BaseDistribution]  # what a sampler draws from, and what the values of a grid are recorded with
    grid: dict[str, Values]  # all trials by name, {} to draw n_trials from space
    n_trials: int = 0
    tpe: bool = False  # draw with TPE, not at random

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        params = Params(**self.base)
        self.metric, self.seed = params.best_metric, params.seed % 2**32  # as NumPy takes it
        self.study = self._open(self.parent_dir / "study.journal")
        self._refuse_changes()
        self.study.set_user_attr("base", self.base)
        self.names = {trial_name(values): name for name, values in self.grid.items()}
        begun = [entry.user_attrs for entry in self._entries() if "folder" in entry.user_attrs]
        kept = {attempt["folder"]: trial_name(attempt["values"]) for attempt in begun}  # the last that began there
        self.names |= {trial: name for name, trial in kept.items() if (self.parent_dir / name / "params.json").exists()}
        self.grid = {self._name(values): values for values in self.grid.values()}
        self._drawing = threading.Lock()
        self._queue()

    def _open(self, path: Path) -> optuna.Study:
        direction: Any = "maximize" if better_of(self.metric) is max else "minimize"
        try:
            self.journal = Journal(path)
            storage = JournalStorage(self.journal)
            return optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); move it away: a grid finds its finished trials") from None

    def _entries(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _refuse_changes(self) -> None:
        remedy = "set it back, or start a sweep in another folder"
        old, new = self.study.user_attrs.get("base", self.base), self.base
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changes := ", ".join(f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in changed):
            raise UserError(f"{self.parent_dir}/params.json has changed since this sweep began ({changes}): {remedy}")
        drawn_from = {} if self.grid else {k: d for entry in self._entries() for k, d in entry.distributions.items()}
        for key in drawn_from.keys() & self.space:
            try:
                check_distribution_compatibility(drawn_from[key], self.space[key])
            except ValueError:
                file, rule = self.parent_dir / "search_space.json", "samplers can only move the ends of a range"
                raise UserError(f'{file}: "{key}" was drawn from other choices before, and {rule}; {remedy}') from None

    def _name(self, values: Values) -> str:
        return self.names.get(trial_name(values), trial_name(values))

    def trials(self) -> dict[str, FrozenTrial]:
        """Return the attempt that counts of every trial that is in the grid, or has been drawn, by name."""
        counted = [e for e in self._entries() if {TrialState.FAIL: "folder"}.get(e.state, "values") in e.user_attrs]
        named = {self._name(entry.user_attrs["values"]): entry for entry in counted}
        return {name: entry for name, entry in named.items() if name in (self.grid or named)}

    def _queue(self) -> None:
        """Queue what is new, has failed or was cut short, and what was finished in a folder that is gone."""
        for entry in self._entries(TrialState.RUNNING):  # whose coordinator is dead
            self.study.tell(entry.number, state=TrialState.FAIL)
        trials = self.trials()
        needed = self.grid or {name: trial.user_attrs["values"] for name, trial in trials.items()}
        for name, values in needed.items():
            state = trials[name].state if name in trials else TrialState.FAIL
            if state == TrialState.FAIL or (state != TrialState.WAITING and not (self.parent_dir / name).exists()):
                self._enqueue(values)
        draws = min(self.n_trials, FIRST_DRAWS) if self.tpe else self.n_trials
        self._enqueue(*self._draw(draws - len(trials)))

    def _enqueue(self, *trials: Values) -> None:
        for values in trials:
            self.study.enqueue_trial({key: choice(value) for key, value in values.items()}, {"values": values})

    def _draw(self, count: int) -> list[Values]:
        """Draw trials at random that are new, the same ones every time; fewer if the space has no more."""
        study, known, duplicates = optuna.create_study(sampler=RandomSampler(self.seed)), self.trials(), 0
        drawn: dict[str, Values] = {}
        while len(drawn) < count and duplicates < DUPLICATES:
            trial = study.ask()
            values = {key: suggest(trial, key, distribution) for key, distribution in self.space.items()}
            name = self._name(values)
            duplicates = duplicates + 1 if name in known or name in drawn else 0
            drawn |= {} if duplicates else {name: values}
        return list(drawn.values())

    def left(self) -> int:
        """Return how many trials are to be run, now that none is at work: fewer than n_trials if there are no more."""
        waiting, new = len(self._entries(TrialState.WAITING)), self.n_trials - len(self.trials())
        return waiting + (new if new > 0 and self._draw(1) else 0)

    def optimize(self, objective: Callable[[Trial], float], count: int, jobs: int, catch: Any) -> None:
        """Let Optuna run count trials. Raises RunFailed if the journal cannot be written."""
        seed = (self.seed + len(self._entries())) % 2**32  # another every time, or TPE would repeat its draws
        self.study.sampler = TPESampler(seed=seed, constant_liar=True)  # running trials count as bad
        try:
            self.study.optimize(objective, count, n_jobs=jobs, catch=catch)
        finally:
            if self.journal.failure:  # of which Optuna may have made an AssertionError
                raise self.journal.failure

    def begin(self, trial: Trial) -> tuple[Path, Values]:
        """Return the folder and the values of a trial whose turn has come. Raises NotRun if it is not to be run."""
        with self._drawing:
            if (values := trial.user_attrs.get("values")) is None:
                values = {key: suggest(trial, key, distribution) for key, distribution in self.space.items()}
                if self._name(values) in self.trials():
                    self._enqueue(*(other := self._draw(1)))
                    if not other:
                        self.study.stop()
                    raise NotRun
                trial.set_user_attr("values", values)
        name = self._name(values)
        if self.grid and name not in self.grid:
            raise NotRun
        for key in self.space.keys() & values:
            with suppress(ValueError):  # the grid had other choices before: not in the plots
                suggest(trial, key, self.space[key])
        trial.set_user_attr("folder", name)
        return self.parent_dir / name, values

    def keep_pictures(self, trial: Trial, folder: Path) -> None:
        """Copy a trial's pictures to where optuna-dashboard finds them."""
        (artifacts := self.parent_dir / ".artifacts").mkdir(exist_ok=True)
        store = FileSystemArtifactStore(artifacts)
        for file in filter(Path.exists, (folder / "samples.png", folder / "curves.png")):
            upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)
