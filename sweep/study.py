"""The trials of a sweep: which there are, which are still to run, and the Optuna study that remembers them."""

import json
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from engine.folders import better_of
from model import UserError
from params import Params
from sweep.space import Values, canonical, choice, random_trials, suggest, trial_name
from utils import RunFailed

FIRST_DRAWS = 10  # trials drawn at random, before TPE has something to learn from


class NotRun(Exception):
    """An entry of the study that is not run: it was drawn before, has left the grid, or the sweep is to stop."""


class Journal(JournalFileBackend):
    """A journal that writes nothing after a line that a full disk has cut short."""

    failure: RunFailed | None = None  # to append

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

    A trial waits in the study's queue until it is run. An entry of the study is an attempt at a trial, of which the
    last counts. Its user attribute "values" is what the trial sets, "folder" where it has begun.

    Raises UserError if what was there before does not go with it: another base, or other choices to draw from.
    """

    parent_dir: Path
    base: Values  # the keys of params.json that every trial begins with
    space: dict[str, BaseDistribution]  # what a sampler draws from, and what the values of a grid are recorded with
    grid: dict[str, Values]  # all trials by name, {} to draw n_trials from space
    n_trials: int = 0
    tpe: bool = False  # draw with TPE, not at random

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.metric = self.base.get("best_metric", Params.best_metric)
        self.study = self._open(self.parent_dir / "study.journal")
        with warnings.catch_warnings(action="ignore"):  # that this is experimental
            self.study.set_metric_names([self.metric])  # for optuna-dashboard
        begun = [entry.user_attrs for entry in self._entries() if entry.user_attrs.keys() >= {"values", "folder"}]
        self.names = {canonical(values): name for name, values in self.grid.items()}
        self.names |= {canonical(attempt["values"]): attempt["folder"] for attempt in begun}  # which a trial keeps
        grid = {self.name(values): values for values in self.grid.values()}
        if len(grid) < len(self.grid):
            space_file = self.parent_dir / "search_space.json"
            raise UserError(f'{space_file}: a new trial has the name of one that has begun; choose another "name"')
        self.grid, self._drawing = grid, threading.Lock()
        self._check()
        self.study.set_user_attr("base", self.base)
        self._queue(min(self.n_trials, FIRST_DRAWS) if self.tpe else self.n_trials)

    def _open(self, path: Path) -> optuna.Study:
        direction: Any = "maximize" if better_of(self.metric) is max else "minimize"
        lock: Any = threading.Lock()  # one process writes; Optuna's own would outlive a kill by 30 s
        self.journal, pruner = Journal(str(path), lock_obj=lock), optuna.pruners.MedianPruner()
        with open(path, "rb+") as stream:  # a kill may have left a part of the last line
            stream.truncate(stream.read().rfind(b"\n") + 1)
        try:
            storage = optuna.storages.JournalStorage(self.journal)
            return optuna.create_study(
                storage=storage, pruner=pruner, study_name="sweep", direction=direction, load_if_exists=True
            )
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(
                f"{path} is damaged ({error}); move it away: a grid finds its finished trials again"
            ) from None

    def _entries(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _check(self) -> None:
        before = self.study.user_attrs.get("base", self.base)
        if changed := [key for key in {**before, **self.base} if before.get(key) != self.base.get(key)]:
            changes = [f"{key} {json.dumps(before.get(key))} -> {json.dumps(self.base.get(key))}" for key in changed]
            raise UserError(
                f"{self.parent_dir / 'params.json'} has changed since this sweep began ({', '.join(changes)}): "
                "set it back, or start a sweep in another folder"
            )
        drawn_from = {} if self.grid else {k: d for entry in self._entries() for k, d in entry.distributions.items()}
        for key in drawn_from.keys() & self.space:
            try:
                check_distribution_compatibility(drawn_from[key], self.space[key])
            except ValueError:
                raise UserError(
                    f'{self.parent_dir / "search_space.json"}: "{key}" was drawn from other choices before, and '
                    "samplers can only move the ends of a range; set it back, or start a sweep in another folder"
                ) from None

    def name(self, values: Values) -> str:
        """Return the folder of a trial."""
        return self.names.get(canonical(values)) or trial_name(values)

    def trials(self) -> dict[str, FrozenTrial]:
        """Return the attempt that counts of every trial that is in the grid, or has been drawn, by name."""
        needed = {TrialState.FAIL: {"values", "folder"}}  # without a folder it has never begun
        counted = [entry for entry in self._entries() if entry.user_attrs.keys() >= needed.get(entry.state, {"values"})]
        named = {self.name(entry.user_attrs["values"]): entry for entry in counted}
        return {name: entry for name, entry in named.items() if not self.grid or name in self.grid}

    def _queue(self, draws: int) -> None:
        """Queue what is new, has failed or was cut short, and what was finished in a folder that is gone."""
        for entry in self._entries():
            if entry.state == TrialState.RUNNING:  # its coordinator is dead
                self.study.tell(entry.number, state=TrialState.FAIL)
        trials = self.trials()
        drawn = {name: entry.user_attrs["values"] for name, entry in trials.items()}
        for name, values in (drawn | self.grid).items():
            state = trials[name].state if name in trials else TrialState.FAIL
            if state == TrialState.FAIL or (state != TrialState.WAITING and not (self.parent_dir / name).exists()):
                self._enqueue(values)
        if not self.grid:
            self._enqueue(*self._draw(draws - len(trials)))

    def _enqueue(self, *trials: Values) -> None:
        for values in trials:
            self.study.enqueue_trial({key: choice(value) for key, value in values.items()}, {"values": values})

    def _draw(self, count: int) -> list[Values]:
        return random_trials(self.space, count, seed=self.base.get("seed", Params.seed), known=self.trials())

    def is_exhausted(self) -> bool:
        """Return whether n_trials is more than there are to draw."""
        return len(self.trials()) < self.n_trials and not self._draw(1)

    def left(self) -> int:
        """Return how many trials are to be run, now that none is at work."""
        waiting = sum(entry.state == TrialState.WAITING for entry in self._entries())
        return waiting + (0 if self.is_exhausted() else max(0, self.n_trials - len(self.trials())))

    def optimize(self, objective: Callable[[Trial], float], count: int, jobs: int, catch: Any) -> None:
        """Let Optuna run count trials, from another seed at every start, or TPE would repeat its draws."""
        seed = (self.base.get("seed", Params.seed) + len(self._entries())) % 2**32
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # running trials count as bad
        try:
            self.study.optimize(objective, count, n_jobs=jobs, catch=catch)
        finally:
            if self.journal.failure:  # of which Optuna may have made an AssertionError
                raise self.journal.failure

    def begin(self, trial: Trial) -> tuple[str, Values]:
        """Return the folder and the values of a trial whose turn has come. Raises NotRun if it is not to be run."""
        with self._drawing:
            if (values := trial.user_attrs.get("values")) is None:
                values = {key: suggest(trial, key, distribution) for key, distribution in self.space.items()}
                if self.name(values) in self.trials():
                    self._enqueue(*(other := self._draw(1)))
                    if not other:
                        self.study.stop()
                    raise NotRun
                trial.set_user_attr("values", values)
        name = self.name(values)
        if self.grid and name not in self.grid:
            raise NotRun
        for key in self.space.keys() & values:
            with suppress(ValueError):  # the grid had other choices before: not in the plots
                suggest(trial, key, self.space[key])
        trial.set_user_attr("folder", name)
        return name, values

    def keep_pictures(self, trial: Trial, folder: Path) -> None:
        """Copy a trial's pictures to where optuna-dashboard finds them."""
        (artifacts := self.parent_dir / ".artifacts").mkdir(exist_ok=True)
        store = FileSystemArtifactStore(artifacts)
        for file in filter(Path.exists, (folder / "samples.png", folder / "curves.png")):
            upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)
