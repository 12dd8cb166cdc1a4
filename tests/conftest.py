"""Data sets, photos and subprocesses that several test files need."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# One thread: on networks this small two are hardly faster, and much slower where another process wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from model.sample import draw_scene
from model.voc import colour_mask

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background commands ignore, and theirs

settings.register_profile("thorough", max_examples=5000)  # pytest --hypothesis-profile thorough

ROOT = Path(__file__).resolve().parent.parent
VOC2012 = ROOT.parent / "shared" / "voc2012"

# The smallest experiment that goes through every part: 6 images, 2 steps an epoch.
TINY = {"pretrained": False, "image_size": 32, "batch_size": 3, "num_epochs": 2, "num_workers": 0, "precision": "fp32"}


def run_script(script: str, *args, check: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; its exit status must be check unless that is None."""
    command = [str(ROOT / script), *map(str, args)]
    if "torch" in sys.modules and not environment:
        result = run_in_fork(command)
    else:
        environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning"} | environment
        command = [sys.executable, *command]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert check is None or result.returncode == check, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def run_in_fork(command: list[str]) -> subprocess.CompletedProcess:
    """A script in a process of its own that has the modules of this one: importing torch anew takes seconds."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        if not (child := os.fork()):
            status = 1
            try:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
                sys.argv = command
                os.chdir(ROOT)
                warnings.resetwarnings()
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                warnings.filterwarnings("error", category=UserWarning)
                runpy.run_path(command[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else bool(end.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        said = []
        for stream in (stdout, stderr):
            stream.seek(0)
            said.append(stream.read())
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *said)


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
    experiment = make_experiment(folder / "run", learning_rate=1e-6, num_workers=1)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data, "--tensorboard")
    return experiment, data


@pytest.fixture
def experiment(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the trained experiment."""
    return shutil.copytree(trained[0], tmp_path / "experiment", copy_function=os.link)
