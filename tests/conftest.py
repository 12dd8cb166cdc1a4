"""Data sets, photos and subprocesses that several test files need."""

import gc
import importlib
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import settings
from tqdm import tqdm

# One thread: on networks this small two are hardly faster, and much slower where another process wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from model.sample import draw_scene
from model.voc import colour_mask

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background commands ignore, and theirs

tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks, and one that is killed while it holds it stops all

settings.register_profile("thorough", max_examples=5000)  # pytest --hypothesis-profile thorough

ROOT = Path(__file__).resolve().parent.parent
VOC2012 = ROOT.parent / "shared" / "voc2012"
SCRIPTS = (
    *("train", "evaluate", "predict", "explain", "export"),
    *("build_dataset", "search_hyperparams", "synthesize_results"),
)

# The smallest experiment that goes through every part: 6 images, 2 steps an epoch, half a million weights.
TINY = {
    "pretrained": False,
    "encoder": "timm/test_resnet",
    "image_size": 32,
    "batch_size": 3,
    "num_epochs": 2,
    "num_workers": 0,
    "precision": "fp32",
}


class Forked(subprocess.Popen):
    """A subprocess.Popen that starts Python scripts as forks of this process, which have its modules.

    To import torch anew takes seconds. What such a script starts is forked too, as the trials of a sweep.
    """

    def __init__(self, args, *positional, env=None, pass_fds=(), without: Sequence[str] = (), **options):
        script = [*map(str, args[1:])]
        if args[0] == sys.executable and script[0].endswith(".py"):
            for module in (*SCRIPTS, "timm"):
                importlib.import_module(module)
            work = partial(run_in_fork, script, os.environ if env is None else env, pass_fds, without)
            options |= {"preexec_fn": work, "restore_signals": False}
        super().__init__(args, *positional, env=env, pass_fds=pass_fds, **options)

    def communicate(self, input=None, timeout=300):
        try:
            return super().communicate(input, timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def run_in_fork(args: list[str], environment: Mapping[str, str], pass_fds: Sequence[int], without: Sequence[str]):
    """Become a process that was started with Python's executable and these arguments; does not return."""
    status = 1
    try:
        gc.enable()
        gc.callbacks.clear()  # hypothesis has one, and a signal that came while it runs would be lost
        gc.freeze()  # or a collection would copy all that is shared with the parent
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        environment = dict(environment)
        os.environ.clear()
        os.environ |= environment
        sys.argv, subprocess.Popen = args, Forked
        sys.modules |= dict.fromkeys(without)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        tempfile.tempdir = None  # of the old environment
        urllib.request.install_opener(None)  # which knows the proxies of the old environment
        logging.getLogger().handlers.clear()  # pytest's
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=UserWarning)
        for before, after in pairwise(sorted({2, *pass_fds, os.sysconf("SC_OPEN_MAX")})):
            os.closerange(before + 1, after)  # upon which the parent continues
        runpy.run_path(args[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = 120  # as Python itself does
        os._exit(status)


def start_script(
    script: str | Path,
    *args,
    stdout: int | IO = subprocess.PIPE,
    stderr: int | IO = subprocess.PIPE,
    new_session: bool = False,
    without: Sequence[str] = (),  # packages that cannot be imported
    **environment: str,
) -> Forked:
    """Start a script of the project."""
    return Forked(
        [sys.executable, str(ROOT / script), *map(str, args)],
        stdout=stdout,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        start_new_session=new_session,
        without=without,
    )


def run_script(script: str, *args, check: int | None = 0, **options) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; its exit status must be check unless that is None."""
    process = start_script(script, *args, **options)
    said = process.communicate()
    result = subprocess.CompletedProcess(process.args, process.returncode, *said)
    assert check is None or result.returncode == check, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@contextmanager
def paused(*processes: int) -> Iterator[None]:
    """Stop processes, by their numbers, while something else happens that takes no notice of how far they are."""
    try:
        for number in processes:
            os.kill(number, signal.SIGSTOP)
        yield
    finally:
        for number in processes:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGCONT)


def as_network(module: Any) -> Any:
    """Let a module stand for a network in training: without an encoder, for photos in [0, 1]."""
    from model.encoders import Encoder

    module.mean, module.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    module.encoder = Encoder(names=(), maps=lambda *_: [], channels=(), mean=module.mean, std=module.std)
    return module


def make_experiment(folder: Path, **params) -> Path:
    """A folder with params.json: TINY, changed by params."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(TINY | params))
    return folder


def make_data(folder: Path, *, train: int = 6, val: int = 3) -> Path:
    """A data set of drawn scenes in the plain VOC layout."""
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        ids = [f"{split}{index}" for index in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for id_ in ids:
            image, mask = draw_scene(np.random.default_rng([*id_.encode()]))
            image.save(folder / "JPEGImages" / f"{id_}.jpg")
            colour_mask(np.array(mask)).save(folder / "SegmentationClass" / f"{id_}.png")
    return folder


def rename_classes(experiment: Path, data: Path, folder: Path, names: list[str]) -> Path:
    """Let a trained experiment be one of classes of these names; its data set: links to data, and a classes.txt."""
    import torch

    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    file = experiment / "best.pth.tar"
    checkpoint = torch.load(file, weights_only=True)
    file.unlink()  # it may be a link to the one that other tests read
    torch.save(checkpoint | {"class_names": names}, file)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture(scope="session")
def voc2012() -> Path:
    """Real photos in the devkit layout; tests that need them skip where they are not."""
    if not VOC2012.is_dir():
        pytest.skip("no VOC2012 photos beside the repository")
    return VOC2012


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of two epochs with TensorBoard, (experiment, data); not to be changed, for several files share it.

    It learns next to nothing, so that it predicts many classes: one that has learned a little says background only.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = make_data(folder / "data")
    experiment = make_experiment(folder / "run", encoder="resnet18", learning_rate=1e-6, num_workers=1)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data, "--tensorboard")
    return experiment, data


@pytest.fixture
def experiment(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the trained experiment."""
    return shutil.copytree(trained[0], tmp_path / "experiment", copy_function=os.link)
