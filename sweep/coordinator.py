"""The coordinator of a sweep: Optuna's loop over an objective that runs one train.py.

A trial is its folder. What Optuna knows of earlier trials, and study.journal, are made from the folders at every start.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna import Trial, TrialPruned
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from engine.run import existing, trained_elsewhere
from engine.training import best_epoch, better_of, score
from model import UserError, cores
from params import Params, comparable_over
from sweep.space import Space, Values, choice, suggest, trial_name
from utils import ROOT, read_history, read_json, write_json, write_text

POLL = 0.2  # seconds between two looks at a trial
LOG_LINES = 5  # of a failed trial
MISSES = 1000  # draws in a row of known trials, after which a space has no others
ENDED = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}  # and not to be run again


class KnownTrial(Exception):
    """A draw of values that were drawn before."""


@dataclass
class Coordinator:
    """Runs the trials of a sweep, some at once. Raises UserError if a trial's folder holds another experiment."""

    parent_dir: Path
    data_dir: Path
    base: Values  # the keys of params.json that every trial begins with
    space: Space  # to draw from
    trials: dict[str, Values]  # by the names of their folders: all of a grid, or what a sampler has drawn before
    n_trials: int  # in all
    tpe: bool  # draw with TPE, not at random
    jobs: int  # trials at once
    gpus: list[str]  # that are free, as CUDA_VISIBLE_DEVICES calls them, one per trial; [] for the CPU
    cluster: Any  # a sweep.cluster.Cluster to run the trials on instead of this machine
    prune_from: int | None  # the first epoch after which a trial may be pruned; 0: the first after its warm-up

    def __post_init__(self) -> None:
        params = Params.parse(self.base, self.parent_dir / "params.json")
        self.metric, seed = params.best_metric, (params.seed + len(self.trials)) % 2**32  # as NumPy takes it
        vary = {key for key, options in self.space.items() if not options.single()}
        vary |= {key for values in self.trials.values() for key in self.space.keys() - values.keys()}
        self.mixed = [key for key in comparable_over(self.metric) if key in vary]
        if self.mixed and (self.metric == "loss" or self.tpe or self.prune_from is not None):
            remedy = 'take another "best_metric"' if self.metric == "loss" else "run a grid, without --prune"
            said = f'trials of different {", ".join(self.mixed)} cannot be compared by "best_metric": "{self.metric}"'
            raise UserError(f"{self.parent_dir}: {said}; {remedy}, or a sweep for each")
        self.begun, self.misses, self.beginning = 0, 0, threading.Lock()
        self.stopping = threading.Event()  # after a signal
        self.random, tpe = RandomSampler(seed), TPESampler(seed=seed, constant_liar=True)  # running trials count as bad
        for sampler in (self.random, tpe):  # Optuna would have threads draw what no seed repeats
            sampler.reseed_rng = lambda: None  # type: ignore[method-assign]
        self.sampler = tpe if self.tpe else self.random
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        direction: Any = "maximize" if better_of(self.metric) is max else "minimize"
        self.study = optuna.create_study(direction=direction, sampler=self.sampler)
        for name, values in self.trials.items():
            self.enter(name, values)

    def enter(self, name: str, values: Values) -> None:
        """Tell the study of a trial: of its epochs if it has ended, or else what to run."""
        folder = self.parent_dir / name
        if (file := folder / "params.json").exists() and read_json(file, if_absent="") != self.base | values:
            remedy = f"set {self.parent_dir}/params.json back, move {folder} away, or start a sweep in another folder"
            raise UserError(f"{file} is of another experiment than this trial; {remedy}")
        recorded: dict[str, Any] = {"params": {key: choice(value) for key, value in values.items()}}
        recorded["distributions"] = {key: self.space[key] for key in values}
        try:
            create_trial(value=0.0, **recorded)
        except ValueError:  # the ends of a range, or the choices, have changed: nothing that Optuna could learn from
            recorded = {"params": {}, "distributions": {}}
        trained = existing(folder) and self.base.get("dataset") != "sample"  # if only in part, it would be resumed
        if trained and (other := trained_elsewhere(folder, self.data_dir)):
            raise UserError(f"{folder} was trained on {other}; give --data_dir {other}, or move {folder} away")
        state, history = outcome(folder)
        if state not in ENDED:
            return self.study.enqueue_trial(recorded["params"], {"folder": name, "queued": [*recorded["params"]]})
        self.begun += 1
        scores = {epoch["epoch"]: score(epoch, self.metric) for epoch in history}
        best = score(best_epoch(history, self.metric), self.metric) if state == "finished" else None
        ended: dict[str, Any] = {"state": ENDED[state], "value": best, "intermediate_values": scores}
        self.study.add_trial(create_trial(**recorded, **ended, user_attrs={"folder": name}))

    def run(self) -> None:
        """Run until no trial is left. Raises KeyboardInterrupt after a signal."""
        self.journal = new_journal(self.parent_dir / "study.journal", self.study)
        options: dict[str, Any] = {"catch": (UserError, OSError, KnownTrial), "callbacks": [self.show]}
        while (left := max(self.n_trials, len(self.trials)) - self.begun) > 0 and self.misses < MISSES:
            with ThreadPoolExecutor(1) as pool:  # a signal interrupts the waiting, and leaving it waits for the trials
                trials = pool.submit(self.study.optimize, self.objective, left, n_jobs=self.jobs, **options)
                try:
                    trials.result()
                except KeyboardInterrupt:
                    self.stopping.set()
                    raise

    def show(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Add a trial that has ended to the journal."""
        if "folder" in trial.user_attrs:
            self.journal.add_trial(trial)

    def objective(self, trial: Trial) -> float:
        """Run one trial and return its best score. Raises UserError, OSError, TrialPruned or KnownTrial."""
        if self.stopping.is_set():
            raise KeyboardInterrupt
        with self.beginning:
            folder = self.parent_dir / self.begin(trial)
        try:
            best = self.train(trial, folder)
            value = score(best, self.metric)
            conclude(folder, "finished", f"best {self.metric} {value:.4f} at epoch {best['epoch']}")
        except (UserError, OSError, TrialPruned) as error:
            conclude(folder, "pruned" if isinstance(error, TrialPruned) else "failed", str(error))
            raise
        return value

    def begin(self, trial: Trial) -> str:
        """Return the name of the trial whose turn has come. Raises KnownTrial; the next draw is then at random."""
        if name := trial.user_attrs.get("folder"):
            for key in trial.user_attrs["queued"]:
                suggest(trial, key, self.space[key])
        else:
            values = {key: suggest(trial, key, distribution) for key, distribution in self.space.items()}
            known = (name := trial_name(values)) in self.trials
            self.misses, self.study.sampler = (self.misses + 1, self.random) if known else (0, self.sampler)
            if known:
                raise KnownTrial
            self.trials[name] = values
            trial.set_user_attr("folder", name)
        self.begun += 1
        return name

    def train(self, trial: Trial, folder: Path) -> dict:
        """Train, resume, or count what is trained already, and return the best epoch. Raises as objective() does."""
        values = self.base | self.trials[folder.name]
        folder.mkdir(exist_ok=True)
        write_text(folder / ".gitignore", "*\n")  # its params.json is made here, unlike those of other experiments
        write_json(folder / "params.json", values)
        (folder / "trial.json").unlink(missing_ok=True)
        params, gpu = Params.parse(values, folder), self.gpus.pop() if self.gpus else None
        try:
            code = self.follow(trial, self.start(folder, gpu), folder, params)
        finally:
            self.gpus += [gpu] if gpu else []
        history = read_history(folder)
        if code or not history:
            how = f"killed by signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit status {code}"
            lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
            raise UserError("\n".join([how, *lines[-LOG_LINES:]]))
        return best_epoch(history, self.metric)

    def start(self, folder: Path, gpu: str | None) -> Any:
        """Start train.py in a trial's folder, on this machine with its share of the cores."""
        if self.cluster:
            return self.cluster.start(folder, self.data_dir)
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs)), **os.environ}
        return start_train(folder, self.data_dir, environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}))

    def follow(self, trial: Trial, process: Any, folder: Path, params: Params) -> int:
        """Report every epoch until train.py has ended, and return its exit status. Raises TrialPruned."""
        reported, first = 0, self.prune_from or params.warmup_epochs + 1
        try:
            while True:
                code = process.poll()  # asked before its last epoch is read
                for epoch in (new := read_history(folder)[reported:]):
                    trial.report(value := score(epoch, self.metric), reported := epoch["epoch"])
                    print(f"{folder.name}: epoch {reported}/{params.num_epochs}, {self.metric} {value:.4f}", flush=True)
                if self.stopping.is_set():
                    raise KeyboardInterrupt
                if code is not None:
                    return code
                prunable = self.prune_from is not None and new and first <= reported < params.num_epochs
                if prunable and trial.should_prune():
                    raise TrialPruned(f"{self.metric} worse than the median of the other trials after epoch {reported}")
                time.sleep(POLL)
        finally:
            process.terminate()
            process.wait()


def outcome(folder: Path) -> tuple[str, list[dict]]:
    """Return how a trial has ended, "finished" or "pruned", and its epochs; ("failed", []) for all others."""
    with suppress(UserError, OSError, KeyError, TypeError):  # absent or damaged
        state, history = read_json(folder / "trial.json", if_absent="")["state"], read_history(folder)
        if state in ENDED and history:
            return state, history
    return "failed", []


def conclude(folder: Path, state: str, reason: str) -> None:
    """Say how a trial has ended, and write it to trial.json."""
    lines = reason.splitlines()
    print(f"{folder.name}: {state}, " + "\n    ".join(lines), flush=True)
    write_json(folder / "trial.json", {"state": state, "reason": lines})


def drawn_before(parent_dir: Path, space: Space) -> dict[str, Values]:
    """Return the trials of a sampler that have a folder, whose name tells it from other experiments."""
    found = {}
    for file in sorted(parent_dir.glob("*/params.json")):
        params = read_json(file, if_absent="")
        values = {key: params[key] for key in space if key in params}
        if trial_name(values) == file.parent.name:
            found[file.parent.name] = values
    return found


def new_journal(file: Path, study: optuna.Study) -> optuna.Study:
    """Write study.journal anew, which optuna-dashboard shows, with the trials of a study that have ended."""
    for old in (file, *file.parent.glob(f"{file.name}.lock*")):  # a kill may have left the lock
        old.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(file)))
    journal = optuna.create_study(storage=storage, study_name="sweep", direction=study.direction)
    journal.add_trials(study.get_trials(states=[*ENDED.values()]))
    return journal


def start_train(folder: Path, data_dir: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start train.py in a trial's folder, where it resumes from a checkpoint if there is one."""
    command = [sys.executable, f"{ROOT}/train.py", "--resume", "--model_dir", str(folder), "--data_dir", str(data_dir)]
    null = subprocess.DEVNULL
    with open(folder / "train.log", "ab") as log:  # train.py itself writes there what it says on stdout
        return subprocess.Popen(command, stdin=null, stdout=null, stderr=log, env=environment)
