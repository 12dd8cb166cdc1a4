"""Kill the real scripts at random moments, also on a full disk, and check what docs/RELIABILITY.md promises.

python tests/kills.py --kills 1000 takes hours and is no part of pytest. A round is a script in a fresh folder, killed
(SIGKILL, with all of its processes) and started again several times, and then left to end; what it leaves must be what
a run without kills has left. Prints a line for every fault and, every twenty rounds, at the end and when interrupted, a
table.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from conftest import Forked, make_data, make_experiment, run_script, start_script
from PIL import Image
from tabulate import tabulate
from test_reliability import EVERYTHING, assert_same_run
from test_search_hyperparams import logged, make_sweep, train_processes

import export
from engine.checkpoints import load_checkpoint
from model.net import FCN_GCN

MOUNTED = "KILLS_MAY_MOUNT"  # set in the environment of the process that has file systems of its own
ROOMY = 2**31  # bytes of a disk that is not full
STARTS = 8  # at most in a round, before the last
LARGER = {"encoder": "resnet18"}  # or its files would be written in no time
COLUMNS = ("rounds", "kills", "while a file was written", "ended by the full disk", "temporary files left", "faults")


class Case:
    """A script, the folder that it begins with (before), and what it makes of that without a kill (after)."""

    script: str

    def __init__(self, folder: Path):
        self.before, self.after = folder / "before", folder / "after"
        self.prepare()
        shutil.copytree(self.before, self.after)
        begun = time.monotonic()
        self.output = run_script(self.script, *self.arguments(self.after)).stdout
        self.seconds = time.monotonic() - begun  # that it usually takes, see Row.start()

    def prepare(self) -> None:
        make_data(self.before / "data")

    def arguments(self, folder: Path) -> list:
        raise NotImplementedError

    def begin(self, folder: Path, rng: random.Random) -> None:
        """Fill the folder of a round."""
        shutil.copytree(self.before, folder, dirs_exist_ok=True)

    def kill(self, process: Forked, folder: Path, rng: random.Random) -> None:
        kill_group(process)

    def check(self, folder: Path) -> None:
        """Raise an error if a file is not whole; other processes may be at work in the folder."""
        for path in files(folder):
            with suppress(FileNotFoundError):
                read(path)

    def compare(self, folder: Path, output: str) -> None:
        """Raise an error if a folder, and what the script said at last, are not as without kills."""
        raise NotImplementedError


class Train(Case):
    script = "train.py"

    def prepare(self) -> None:
        super().prepare()
        make_experiment(self.before / "run", **EVERYTHING | LARGER)

    def arguments(self, folder: Path) -> list:
        return ["--resume", "--model_dir", folder / "run", "--data_dir", folder / "data"]

    def begin(self, folder: Path, rng: random.Random) -> None:
        super().begin(folder, rng)
        self.epoch = 0  # that last.pth.tar holds

    def check(self, folder: Path) -> None:
        super().check(folder)
        if self.epoch or (folder / "run" / "last.pth.tar").exists():
            earlier, self.epoch = self.epoch, load_checkpoint(folder / "run" / "last.pth.tar")["epoch"]
            assert earlier <= self.epoch

    def compare(self, folder: Path, output: str) -> None:
        assert_same_run(folder / "run", self.after / "run")
        left = [sorted(path.name for path in (each / "run").iterdir()) for each in (folder, self.after)]
        assert left[0] == left[1] and not unfinished(folder)


class Outputs(Case):
    """A script that writes files from a checkpoint: absent, of an earlier checkpoint, or new, and nothing between."""

    def prepare(self) -> None:
        super().prepare()
        for name, seed in (("run", 1), ("earlier", 2)):  # one that learns nothing predicts many classes
            run = make_experiment(self.before / name, encoder="resnet18", num_epochs=1, learning_rate=1e-6, seed=seed)
            run_script("train.py", "--model_dir", run, "--data_dir", self.before / "data")
            (run / "last.pth.tar").unlink()
        best, other = (self.before / name / "best.pth.tar" for name in ("run", "earlier"))
        self.inputs = digests(self.before).keys()
        run_script(self.script, *self.arguments(self.before))
        earlier, params = load_checkpoint(other), load_checkpoint(best)["params"]
        torch.save(earlier | {"params": params}, best)  # or the seed of params.json would have been changed since
        shutil.rmtree(other.parent)

    def arguments(self, folder: Path) -> list:
        return ["--model_dir", folder / "run", "--data_dir", self.before / "data"]

    @cached_property
    def old(self) -> dict[Path, str]:
        return digests(self.before)

    @cached_property
    def new(self) -> dict[Path, str]:
        return digests(self.after)

    def begin(self, folder: Path, rng: random.Random) -> None:
        super().begin(folder, rng)
        if rng.random() < 0.5:  # without earlier outputs
            for path in self.old.keys() - self.inputs:
                (folder / path).unlink()
        self.present = digests(folder).keys() & self.new

    def check(self, folder: Path) -> None:
        found = digests(folder)
        for path, digest in found.items():
            assert digest in (self.old.get(path), self.new.get(path)), f"{path} is neither the old nor the new one"
        assert self.present <= found.keys()
        self.present = found.keys() & self.new

    def compare(self, folder: Path, output: str) -> None:
        assert digests(folder) == self.new


class Evaluate(Outputs):
    script = "evaluate.py"

    def arguments(self, folder: Path) -> list:
        more = ["--original_size", "--save_predictions", folder / "predictions", "--save_overlays", 2]
        return [*super().arguments(folder), *more]


class Predict(Outputs):
    script = "predict.py"

    def arguments(self, folder: Path) -> list:
        photos = self.before / "data" / "JPEGImages"
        return [photos, *super().arguments(folder), "--output_dir", folder / "predictions"]


class Export(Outputs):
    script = "export.py"

    def prepare(self) -> None:
        for package in export.PACKAGES:  # and, once for all, what else PyTorch imports for an export
            importlib.import_module(package)
        with tempfile.TemporaryDirectory() as folder:
            export.write_onnx(FCN_GCN(encoder="resnet18", pretrained=False), Path(folder, "first.onnx"), {})
        super().prepare()


class Sweep(Case):
    """Half of the kills are of the coordinator alone, whose trials then end by themselves."""

    script = "search_hyperparams.py"

    def prepare(self) -> None:
        super().prepare()
        make_sweep(self.before / "sweep", {"seed": [1, 2, 3]}, **EVERYTHING | LARGER | {"num_epochs": 2})

    def arguments(self, folder: Path) -> list:
        return ["--parent_dir", folder / "sweep", "--data_dir", folder / "data", "--jobs", 2]

    def kill(self, process: Forked, folder: Path, rng: random.Random) -> None:
        if rng.random() < 0.5:
            return kill_group(process)
        process.kill()
        process.wait()
        while train_processes(folder):  # until then a start is refused
            time.sleep(0.05)

    def compare(self, folder: Path, output: str) -> None:
        ours, theirs = (
            [line for line in said.splitlines() if line.startswith("3 trials: ")] for said in (output, self.output)
        )
        assert ours == theirs and not train_processes(folder)
        for trial in (self.after / "sweep").glob("seed_*"):
            assert_same_run(folder / "sweep" / trial.name, trial)
            assert json.loads((folder / "sweep" / trial.name / "trial.json").read_text())["state"] == "finished"
            for words in ("epoch 1/2: train loss", "epoch 2/2: train loss"):
                assert logged(folder / "sweep" / trial.name, words) <= 1, f"{trial.name} was trained twice"


def files(folder: Path) -> list[Path]:
    """Return what lies below a folder, but for locks and files that are being written, which bear other names."""
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return [path for path in paths if not path.name.endswith((".tmp", ".lock"))]


def unfinished(folder: Path) -> set[Path]:
    return {Path(root, name) for root, _, names in os.walk(folder) for name in names if name.endswith(".tmp")}


def digests(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}


def read(path: Path) -> None:
    """Raise an error if a file is cut short."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        text = path.read_text()
        assert text.endswith("\n") and all(json.loads(line) for line in text.splitlines())
    elif path.suffix in (".png", ".jpg"):
        with Image.open(path) as picture:
            picture.load()
    elif path.name.endswith(".pth.tar"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)["state_dict"].values())


def kill_group(process: Forked) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not the leader of a group yet
        process.send_signal(signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.002)


def kill_trials(folder: Path) -> None:
    for number in train_processes(folder):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


# ---------------------------------------------------------------------------------------- rounds


class Row:
    """A row of the table: a script, on a disk with room or on a full one, and what was seen."""

    def __init__(self, name: str, case: Case, wanted: int, *, full: bool):
        self.name, self.case, self.wanted, self.full = name, case, wanted, full
        self.seen: Counter[str] = Counter()
        self.process: Forked | None = None

    def report(self, parent: Path, seed: int, number: int) -> None:
        """Play a round; print a line and keep its folder if it finds a fault."""
        self.steps: list[str] = []
        self.seen["rounds"] += 1
        folder, kept = (parent / f"{what}{self.name}_{number}" for what in ("", "fault_"))
        folder.mkdir()
        try:
            self.play(folder, random.Random(f"{seed} {self.name} {number}"))
        except Exception as error:
            self.seen["faults"] += 1
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            what = " ".join(f"{type(error).__name__}, {where}: {error}".split())
            again = f"--seed {seed} --only {self.name} --round {number}"
            print(f"FAULT {what}; {'; '.join(self.steps)}; kept in {kept}; again: {again}", flush=True)
            shutil.copytree(folder, kept, symlinks=True)
        finally:
            if self.process and self.process.poll() is None:
                kill_group(self.process)
            kill_trials(folder)
            if self.full:
                subprocess.run(["umount", folder], check=True)
            shutil.rmtree(folder)

    def play(self, folder: Path, rng: random.Random) -> None:
        """Kill, start again, let it end and compare. Raises an error at the first fault."""
        if self.full:
            mount(folder, ROOMY)
        self.case.begin(folder, rng)
        if self.full:
            before, after = ([path.stat().st_size for path in files(each)] for each in (folder, self.case.after))
            room = int(rng.random() ** 3 * (sum(after) + max(after) - sum(before)))  # often for the small files only
            mount(folder, shutil.disk_usage(folder).used + room)
            self.steps.append(f"room for {room} bytes")
        for _ in range(rng.randint(1, STARTS)):
            done = self.start(folder, rng)
            self.case.check(folder)
            if done:
                break
        if self.full:
            mount(folder, ROOMY)
        output, errors = self.run(folder, lambda: False)
        assert self.process.returncode == 0 and not errors, f"exit status {self.process.returncode}: {errors}{output}"
        self.case.compare(folder, output)
        self.seen["temporary files left"] += len(unfinished(folder))

    def start(self, folder: Path, rng: random.Random) -> bool:
        """Start the script, and kill it unless it ends before. Returns whether it is done."""
        earlier, begun = unfinished(folder), time.monotonic()
        delay, while_writing, more = rng.uniform(0, self.case.seconds), rng.random() < 0.5, rng.uniform(0, 0.1)
        to_the_end = self.full and rng.random() < 0.4

        def moment() -> bool:
            if to_the_end or time.monotonic() < begun + delay or (while_writing and unfinished(folder) <= earlier):
                return False
            time.sleep(more if while_writing and more > 0.05 else 0)
            return True

        output, errors = self.run(folder, moment, rng)
        status, seconds = self.process.returncode, time.monotonic() - begun
        killed = status == -signal.SIGKILL
        self.steps.append(f"{'killed' if killed else f'ended with {status}'} after {seconds:.2f} s")
        self.seen["kills"] += killed
        self.seen["while a file was written"] += killed and not unfinished(folder) <= earlier
        if not to_the_end:  # four starts of five are to be killed, however busy the machine is
            self.case.seconds *= 1.03 if killed else 0.9
        if status > 0 or (errors and not killed):
            said = errors + output * isinstance(self.case, Sweep)
            assert self.full and status == 1, f"exit status {status}: {said}"
            assert "No space left on device" in said or "is the disk full?" in said, said
            assert errors.count("\n") <= 1 and "Traceback" not in said, said
            self.seen["ended by the full disk"] += 1
        return status == 0

    def run(self, folder: Path, moment, rng: random.Random | None = None) -> tuple[str, str]:
        """Run the script and kill it when moment() says so; returns what it said."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            options = {"stdout": output, "stderr": errors, "new_session": True}
            self.process = start_script(self.case.script, *self.case.arguments(folder), **options)
            while self.process.poll() is None:
                if moment():
                    self.case.kill(self.process, folder, rng)
                time.sleep(0.002)
            output.seek(0)
            errors.seek(0)
            return output.read(), errors.read()


def mount(folder: Path, size: int) -> None:
    """Mount a file system of that many bytes on a folder, or change its size."""
    again = "remount," if os.path.ismount(folder) else ""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "none", folder], check=True)


def may_mount() -> bool:
    """Go on in a process that has file systems of its own; False if that is not allowed here."""
    if MOUNTED not in os.environ:
        own = ["unshare", "--user", "--map-root-user", "--mount"]
        with suppress(FileNotFoundError):
            if not subprocess.run([*own, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]).returncode:
                os.execvpe(own[0], [*own, sys.executable, *sys.argv], os.environ | {MOUNTED: "1"})
    return MOUNTED in os.environ


# Of 1000 kills, on a disk with room and on a full one; those of export and sweep take ten times as long as the others.
PLAN = {Train: (350, 60), Evaluate: (200, 40), Predict: (210, 36), Export: (40, 6), Sweep: (50, 8)}


def main() -> int:
    names = [f"{case.__name__.lower()}{disk}" for case in PLAN for disk in ("", "_full")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new one, to work in (default: one in the temporary folder)")
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="scripts; _full: on a full disk")
    parser.add_argument("--round", type=int, help="play this round of each, and no other")
    args = parser.parse_args()
    mounts, rows = may_mount(), []
    if not mounts:
        print("no file system can be mounted here: nothing is tried on a full disk")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills"))
    folder.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {args.seed}, in {folder}", flush=True)
    try:
        for kind, wanted in PLAN.items():
            name = kind.__name__.lower()
            chosen = [full for full in (False, mounts) if f"{name}{'_full' * full}" in args.only]
            case = kind(folder / name) if chosen else None
            rows += [Row(f"{name}{'_full' * full}", case, wanted[full], full=full) for full in sorted(set(chosen))]
        share = args.kills / sum(row.wanted for row in rows)
        if args.round is not None:
            for row in rows:
                row.report(folder, args.seed, args.round)
        while args.round is None:
            row = min(rows, key=lambda row: row.seen["kills"] / row.wanted)
            if row.seen["kills"] >= row.wanted * share:
                break
            row.report(folder, args.seed, row.seen["rounds"])
            if sum(row.seen["rounds"] for row in rows) % 20 == 0:
                print_table(rows)
    except KeyboardInterrupt:
        print("interrupted")
    print_table(rows)
    return 1 if any(row.seen["faults"] for row in rows) else 0


def print_table(rows: list[Row]) -> None:
    table = [[row.name, *(row.seen[column] for column in COLUMNS)] for row in rows]
    total = ["all", *(sum(row.seen[column] for row in rows) for column in COLUMNS)]
    print(tabulate([*table, total], headers=("", *COLUMNS), tablefmt="pipe"), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
