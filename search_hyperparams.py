"""Run a sweep: one train.py per trial. parent_dir holds params.json, the base, and search_space.json, what varies."""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from tqdm import tqdm

from engine.cli import add_folder, positive, run_main
from engine.folders import RUN_LOCK
from model import UserError, cores
from params import Params
from sweep.study import (
    STORAGE_ERRORS,
    Claim,
    Study,
    Values,
    distributions,
    grid,
    open_storage,
    read_spaces,
    storage_failure,
)
from utils import ROOT, Lock, best_epoch, epoch_score, is_locked, lock, read_history, read_json, write_json

POLL, LOOK = 0.2, 1.0  # seconds between two looks at the running trials, and at the study
HEARTBEAT = 15.0  # seconds between two signs of life in a database, four of which may fail to come
OUTAGE = 600.0  # seconds that a database may be away
GRACE = 30.0  # seconds that a trial has to end by itself
LOG_LINES = 5  # of a failed trial


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_folder(parser, "--parent_dir", "experiments/learning_rate", "folder of the sweep")
    add_folder(parser, "--data_dir", "data", "folder of the data set")
    parser.add_argument("--sampler", choices=("grid", "random", "tpe"), default="grid", help="(default: %(default)s)")
    parser.add_argument("--n_trials", type=positive, metavar="N", help="trials in all, for random and tpe")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="trials at once (default: %(default)s)")
    parser.add_argument("--storage", metavar="URL", help="database through which several machines share the sweep")
    parser.add_argument("--prune", action="store_true", help="end trials whose mIoU falls below the others' median")
    args = parser.parse_args()
    if (args.sampler == "grid") != (args.n_trials is None):
        parser.error("--n_trials goes with --sampler random or tpe, which need it; a grid runs every combination")
    return args


@dataclass
class Job:
    """A trial at work, and what it holds."""

    claim: Claim
    process: subprocess.Popen
    folder: Path
    locks: list[Lock]
    bar: tqdm
    line: int  # of the terminal, below the sweep's own
    reported: int = 0  # epochs
    last_beat: float = field(default_factory=time.monotonic)
    ended_as: str | None = None  # "pruned", "interrupted" or "taken over", where this program ended it


class Sweep:
    """Runs what a study has, some trials at once.

    Args:
        study: the trials.
        parent_dir, data_dir: folder of the sweep, and of its data set.
        max_jobs: trials at once.
        gpus: the devices to use, as CUDA_VISIBLE_DEVICES calls them, one a trial; [] for the CPU.
    """

    def __init__(self, study: Study, parent_dir: Path, data_dir: Path, *, max_jobs: int, gpus: list[str]):
        self.study, self.parent_dir, self.data_dir = study, parent_dir, data_dir
        self.max_jobs, self.gpus = max_jobs, gpus
        self.jobs: list[Job] = []
        self.signals: list[int] = []
        self.stopped = 0  # trials, by a signal

    def run(self) -> None:
        """Run until no trial is left, here or in another process, or until a signal; a second one kills."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, lambda number, frame: self.signals.append(number))
        self.bar = tqdm(desc=str(self.parent_dir), unit="trial", position=0, leave=False, disable=None)
        next_look = answered = time.monotonic()
        try:
            while not self.signals:
                try:
                    if self.collect() or time.monotonic() > next_look:
                        self.study.take_over()
                        self.fill()
                        self.show_progress()
                        if not self.jobs and not self.study.left():
                            return
                        next_look = time.monotonic() + LOOK
                    answered = time.monotonic()
                except STORAGE_ERRORS as error:  # the trials here can train on
                    if time.monotonic() - answered > OUTAGE:
                        raise storage_failure(error) from None
                    time.sleep(LOOK)
                time.sleep(POLL)
        finally:
            self.stop()
            self.bar.close()

    def fill(self) -> None:
        """Start trials while there are places for them."""
        while len(self.jobs) < self.max_jobs:
            gpu, locks = self.free_gpu() if self.gpus else (None, [])
            if self.gpus and gpu is None:
                return
            claim = None
            try:
                if claim := self.study.claim():
                    locks.append(claim.lock)
                    self.launch(claim, gpu, locks)
                    locks = []  # the job's now
            except (UserError, OSError) as error:
                if claim is None:
                    raise
                # Something is wrong with this trial's folder; the others go on.
                self.study.fail(claim.trial, [str(error)])
            finally:
                for held in locks:
                    held.release()
            if claim is None:
                return

    def free_gpu(self) -> tuple[str | None, list[Lock]]:
        """A GPU that no trial of this folder uses, and its lock."""
        for gpu in self.gpus:
            if held := lock(self.study.locks / re.sub(r"[^\w.-]", "-", f"gpu-{socket.gethostname()}-{gpu}")):
                return gpu, [held]
        return None, []

    def launch(self, claim: Claim, gpu: str | None, locks: list[Lock]) -> None:
        """Start train.py in a trial's folder, where it goes on from a checkpoint if there is one."""
        folder, params = self.parent_dir / claim.name, self.study.base | claim.values
        refuse_other(folder, params)
        if is_locked(folder / RUN_LOCK):
            raise UserError(f"another train.py is at work in {folder}")
        folder.mkdir(exist_ok=True)
        write_json(folder / "params.json", params)
        (folder / "trial.json").unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), "--resume"]
        command += ["--model_dir", str(folder), "--data_dir", str(self.data_dir)]
        with open(folder / "train.log", "ab") as log:  # train.py itself writes there what it says on stdout
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | self.environment(gpu),
                pass_fds=[held.descriptor for held in locks],
                start_new_session=True,  # its own group, to be ended with its loader processes
            )
        line = min(set(range(1, self.max_jobs + 1)) - {job.line for job in self.jobs})
        counts = {"total": Params.parse(params, folder).num_epochs, "initial": len(history_of(folder))}
        bar = tqdm(desc=f"  {claim.name}", unit="epoch", position=line, leave=False, disable=None, **counts)
        self.jobs.append(Job(claim, process, folder, locks, bar, line))

    def environment(self, gpu: str | None) -> dict[str, str]:
        """What the environment of a trial adds: its GPU, or its share of the cores."""
        if gpu is not None:
            return {"CUDA_VISIBLE_DEVICES": gpu}
        share = max(1, cores() // self.max_jobs)
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}

    def collect(self) -> bool:
        """Follow every trial and write down how those that have ended did. Returns whether one has."""
        ended = [job for job in self.jobs if job.process.poll() is not None]  # asked before its last epoch is read
        for job in self.jobs:
            if job.ended_as is None:
                self.follow(job)
        for job in ended:
            kill_group(job.process)  # loader processes that a killed one has left
            self.record(job)
            self.jobs.remove(job)
            job.bar.close()
            for held in job.locks:
                held.release()
        return bool(ended)

    def follow(self, job: Job) -> None:
        """Tell the study of new epochs; end the trial if it prunes it, or has given it to another process."""
        history = history_of(job.folder)
        try:
            for epoch in history[job.reported :]:
                job.claim.trial.report(epoch_score(epoch), epoch["epoch"])
            if self.study.shared and time.monotonic() - job.last_beat > HEARTBEAT:
                job.claim.trial.set_user_attr("heartbeat", time.time())
                job.last_beat = time.monotonic()
        except UpdateFinishedTrialError:
            return self.end(job, "taken over")
        if len(history) > job.reported:
            job.reported = len(history)
            job.bar.set_postfix(mIoU=f"{epoch_score(history[-1]):.4f}", refresh=False)
            job.bar.update(len(history) - job.bar.n)
            unfinished = job.process.poll() is None and len(history) < job.bar.total
            if unfinished and job.claim.trial.should_prune():
                self.end(job, "pruned")

    def end(self, job: Job, reason: str) -> None:
        """Ask a trial to end."""
        job.ended_as = reason
        job.process.terminate()

    def record(self, job: Job) -> None:
        """Write down how a trial ended: in the study, and in trial.json in the folder of one that did not finish."""
        trial, name, code = job.claim.trial, job.claim.name, job.process.returncode
        history = history_of(job.folder) if code == 0 else []
        if job.ended_as == "taken over":
            self.say(f"{name}: stopped, another process has taken it over")
        elif history:
            best = best_epoch(history)
            self.study.finish(trial.number, TrialState.COMPLETE, epoch_score(best))
            self.say(f"{name}: finished, best mIoU {epoch_score(best):.4f} at epoch {best['epoch']}")
        elif job.ended_as == "pruned":
            self.study.finish(trial.number, TrialState.PRUNED)
            self.leave_note(job, state="pruned", reason=["mIoU below the median of the other trials"])
            self.say(f"{name}: pruned after epoch {job.reported}, mIoU below the median of the other trials")
        elif job.ended_as == "interrupted":
            self.study.put_back(trial.number, job.claim.values)
            self.stopped += 1
        else:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            reason = [how, *last_lines(job.folder / "train.log")]
            self.study.fail(trial, reason)
            self.leave_note(job, state="failed", reason=reason)
            self.say("\n    ".join([f"{name}: failed, {how}", *reason[1:]]))

    def leave_note(self, job: Job, **note: Any) -> None:
        with suppress(OSError):  # the folder may be what is wrong
            write_json(job.folder / "trial.json", note)

    def stop(self) -> None:
        """End the running trials and wait for them."""
        for job in self.jobs:
            self.end(job, job.ended_as or "interrupted")
        deadline = time.monotonic() + GRACE
        while any(job.process.poll() is None for job in self.jobs):
            if len(self.signals) > 1 or time.monotonic() > deadline:
                for job in self.jobs:
                    kill_group(job.process)
            time.sleep(POLL)
        self.collect()

    def show_progress(self) -> None:
        states = [trial.state for trial in self.study.standing().values()]
        self.bar.total = self.study.expected()
        self.bar.n = states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED)
        self.bar.set_postfix(failed=states.count(TrialState.FAIL))
        for job in self.jobs:
            job.bar.refresh()  # the time

    def say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more
            tqdm.write(line)
            sys.stdout.flush()


def history_of(folder: Path) -> list[dict]:
    """The epochs of a trial so far; none if the file is damaged, which then is for train.py to say."""
    with suppress(UserError, OSError):
        return read_history(folder)
    return []


def refuse_other(folder: Path, params: Values) -> None:
    """Raise UserError if the folder of a trial holds another experiment."""
    file = folder / "params.json"
    if file.exists() and read_json(file, if_absent="") != params:
        raise UserError(f"{file} is not what base and search space say; move {folder} away")


def kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_lines(log: Path) -> list[str]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return [str(error)]
    return [line for line in lines if line.strip()][-LOG_LINES:]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for one trial each; asks the driver, as importing torch would take seconds."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for part in listed.split(",") if (name := part.strip()) not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):  # a driver without a device
        return []


def print_summary(study: Study, parent_dir: Path) -> int:
    """Print how the sweep stands. Returns the exit status: 1 if a trial has failed."""
    trials = study.standing()
    failed = {name: trial for name, trial in trials.items() if trial.state == TrialState.FAIL}
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials.values())
    finished = {name: trial.value for name, trial in trials.items() if trial.state == TrialState.COMPLETE}
    for name, trial in failed.items():
        reason = trial.user_attrs.get("error", ["its process was lost"])
        print(f"{name}: failed, {reason[0]}: {reason[-1]}" if len(reason) > 1 else f"{name}: failed, {reason[0]}")
    if study.exhausted:
        print(f"there are no other trials in this search space than these {len(trials)}")
    best = max(finished, key=finished.get, default=None)
    counts = [f"{len(finished)} finished", f"{pruned} pruned" * bool(pruned), f"{len(failed)} failed" * bool(failed)]
    print(f"{len(trials)} trials: {', '.join(filter(None, counts))}", end="")
    print(f"; best mIoU {finished[best]:.4f} by {best}" if best else "")
    if failed:
        print("the same command runs the failed ones again")
    print(f"table and plots: python synthesize_results.py --parent_dir {shlex.quote(str(parent_dir))}")
    return 1 if failed else 0


def main(args: argparse.Namespace) -> int:
    base_file, space_file = args.parent_dir / "params.json", args.parent_dir / "search_space.json"
    Params.load(base_file)
    base = read_json(base_file, if_absent="")
    spaces = read_spaces(space_file)
    trials = space = None
    if args.sampler == "grid":
        trials = grid(spaces, base, space_file)
    else:
        space = distributions(spaces, base, space_file)
    datasets = {(base | values).get("dataset", Params.dataset) for values in (trials or {"": {}}).values()}
    if "voc" in datasets and not args.data_dir.is_dir():
        raise UserError(f"no folder {args.data_dir}; say where the data set is with --data_dir")
    gpus = visible_gpus()
    if 0 < len(gpus) < args.jobs:
        raise UserError(f"--jobs {args.jobs}: every trial has a GPU to itself, and there are {len(gpus)}; lower it")

    for name, values in (trials or {}).items():
        refuse_other(args.parent_dir / name, base | values)

    try:
        study = Study(
            open_storage(args.parent_dir, args.storage),
            args.parent_dir,
            base,
            grid=trials,
            space=space,
            sampler=args.sampler,
            n_trials=args.n_trials or 0,
            shared=args.storage is not None,
            prune=args.prune,
        )
        if study.shared and (known := study.attempts()):
            print(f'joining the sweep "{study.study.study_name}" of the database, with {len(known)} trials', flush=True)
        study.enqueue_missing()
        sweep = Sweep(study, args.parent_dir, args.data_dir, max_jobs=args.jobs, gpus=gpus)
        sweep.run()
        if not sweep.signals:
            return print_summary(study, args.parent_dir)
    except STORAGE_ERRORS as error:
        raise storage_failure(error) from None
    print(f"interrupted; trials stopped: {sweep.stopped}; the same command goes on", file=sys.stderr)
    return 128 + sweep.signals[0]


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
