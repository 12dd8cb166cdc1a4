"""The coordinator of a sweep: Optuna's loop over an objective that runs one train.py."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna import Trial, TrialPruned

from engine.cli import in_a_thread
from engine.folders import TRIAL_LOCKS, best_epoch, score
from model import UserError, cores, refuse_irregular
from params import Params
from sweep.space import Values
from sweep.study import NotRun, Study
from utils import ROOT, Lock, lock, read_history, read_json, say, write_json

POLL = 0.2  # seconds between two looks at a trial
GRACE = 30.0  # seconds that a trial has to end by itself
LOG_LINES = 5  # of a failed trial


@dataclass
class Coordinator:
    """Runs the trials of a study, some at once."""

    study: Study
    data_dir: Path
    jobs: int  # trials at once
    gpus: list[str]  # to use, as CUDA_VISIBLE_DEVICES calls them, one per trial; [] for the CPU
    cluster: Any  # a sweep.cluster.Cluster to run the trials on instead of this machine
    prune_from: int | None  # the first epoch after which a trial may be pruned; 0: the first after its warm-up
    signals: list[int] = field(default_factory=list)  # that asked the sweep to stop

    def run(self) -> None:
        """Run until no trial is left, or until a signal; a second one kills. Raises RunFailed if the disk is full."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, lambda number, frame: self.signals.append(number))
        while not self.signals and (left := self.study.left()):
            in_a_thread(self.study.optimize, self.objective, left, self.jobs, (UserError, OSError, NotRun))

    def objective(self, trial: Trial) -> float:
        """Run one trial and return its best score. Raises UserError, OSError, TrialPruned or NotRun."""
        self.stop_if_asked()
        folder, values = self.study.begin(trial)
        try:
            return self.run_trial(trial, folder, self.study.base | values)
        except (UserError, OSError, TrialPruned) as error:
            state, reason = "pruned" if isinstance(error, TrialPruned) else "failed", str(error).splitlines()
            say(f"{folder.name}: {state}, " + "\n    ".join(reason), sys.stdout)
            with suppress(OSError):  # the folder may be what is wrong
                write_json(folder / "trial.json", {"state": state, "reason": reason})
            raise

    def stop_if_asked(self) -> None:
        """Raise NotRun after a signal, or when the journal cannot be written."""
        if self.signals or self.study.journal.failure:
            self.study.study.stop()
            raise NotRun

    def run_trial(self, trial: Trial, folder: Path, params: Values) -> float:
        """Train, resume, or count what is finished already."""
        log = folder / "train.log"
        earlier = log.stat().st_size if log.exists() else 0
        with ExitStack() as held:
            process = self.start(folder, params, held)
            held.callback(self.end, process)
            code = self.follow(trial, process, folder, Params.parse(params, folder))
        history = read_history(folder)
        if code or not history:
            how = f"killed by signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit status {code}"
            lines = log.read_bytes()[earlier:].decode(errors="replace").splitlines()
            raise UserError("\n".join([how, *[line for line in lines if line.strip()][-LOG_LINES:]]))
        best = best_epoch(history, self.study.metric)
        value = score(best, self.study.metric)
        say(f"{folder.name}: finished, best {self.study.metric} {value:.4f} at epoch {best['epoch']}", sys.stdout)
        with suppress(OSError):  # the trial is finished without them
            self.study.keep_pictures(trial, folder)
        return value

    def start(self, folder: Path, params: Values, held: ExitStack) -> Any:
        """Start train.py in a trial's folder; wait for one that a killed coordinator has left there, and for a GPU."""
        refuse_other(folder, params)
        locks = folder.parent / TRIAL_LOCKS
        locks.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        refuse_irregular(folder / "train.log")
        write_json(folder / "params.json", params)
        (folder / "trial.json").unlink(missing_ok=True)
        if self.cluster:
            return self.cluster.start(folder, self.data_dir, locks / folder.name, jobs=self.jobs)
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs)), **os.environ}
        own = [wait_for_lock([locks / folder.name], held, self.stop_if_asked)]
        if self.gpus:
            files = {locks / re.sub(r"[^\w.-]", "-", f"gpu-{socket.gethostname()}-{gpu}"): gpu for gpu in self.gpus}
            own.append(wait_for_lock(files, held, self.stop_if_asked))
            environment["CUDA_VISIBLE_DEVICES"] = files[own[1].path]
        return start_train(folder, self.data_dir, own, environment)

    def follow(self, trial: Trial, process: Any, folder: Path, params: Params) -> int:
        """Report every epoch until train.py has ended, and return its exit status. Raises NotRun and TrialPruned."""
        reported, first, metric = 0, self.prune_from or params.warmup_epochs + 1, self.study.metric
        while True:
            code = process.poll()  # asked before its last epoch is read
            for epoch in (new := read_history(folder)[reported:]):
                trial.report(value := score(epoch, metric), reported := epoch["epoch"])
                say(f"{folder.name}: epoch {reported}/{params.num_epochs}, {metric} {value:.4f}", sys.stdout)
            if code is not None and not (code and self.signals):  # which may have ended it too
                return code
            self.stop_if_asked()
            if self.prune_from is not None and new and first <= reported < params.num_epochs and trial.should_prune():
                raise TrialPruned(f"{metric} worse than the median of the other trials after epoch {reported}")
            time.sleep(POLL)

    def end(self, process: Any) -> None:
        """End a train.py that is still at work, and wait for that."""
        process.terminate()
        deadline = time.monotonic() + GRACE
        while process.poll() is None:
            if len(self.signals) > 1 or time.monotonic() > deadline:
                process.kill()
            time.sleep(POLL)


def wait_for_lock(paths: Iterable[Path], held: ExitStack, check: Callable[[], None]) -> Lock:
    """Hold the first of some locks that is free, however long that takes; check is called while waiting.

    train.py inherits it, and keeps it when its starter is killed, so that nobody else takes its folder or its GPU.
    """
    while True:
        check()
        for path in paths:
            if found := lock(path):
                held.callback(found.release)
                return found
        time.sleep(POLL)


def start_train(folder: Path, data_dir: Path, own: list[Lock], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start train.py in a trial's folder, where it resumes from a checkpoint if there is one."""
    command = [sys.executable, f"{ROOT}/train.py", "--resume", "--model_dir", str(folder), "--data_dir", str(data_dir)]
    locks, null = [lock.descriptor for lock in own], subprocess.DEVNULL
    with open(folder / "train.log", "ab") as log:  # train.py itself writes there what it says on stdout
        return subprocess.Popen(  # in a session of its own: Ctrl-C is for the coordinator
            command, stdin=null, stdout=null, stderr=log, env=environment, pass_fds=locks, start_new_session=True
        )


def refuse_other(folder: Path, params: Values) -> None:
    """Raise UserError if the folder of a trial holds another experiment."""
    file = folder / "params.json"
    if file.exists() and read_json(file, if_absent="") != params:
        raise UserError(f"{file} is of another experiment than this trial; move {folder} away, or give another name")
