"""Data sets, photos and subprocesses that several test files need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# One thread: on networks this small two are hardly faster, and much slower where another process wants a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from model.sample import draw_scene
from model.voc import colour_mask

ROOT = Path(__file__).resolve().parent.parent
VOC2012 = ROOT.parent / "shared" / "voc2012"

# The smallest experiment that goes through every part: 6 images, 2 steps an epoch.
TINY = {"pretrained": False, "image_size": 32, "batch_size": 3, "num_epochs": 2, "num_workers": 0, "precision": "fp32"}


def run_script(script: str, *args, check: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; its exit status must be check unless that is None."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning"} | environment
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert check is None or result.returncode == check, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture(scope="session")
def voc2012() -> Path:
    """Real photos in the devkit layout; tests that need them skip where they are not."""
    if not VOC2012.is_dir():
        pytest.skip("no VOC2012 photos beside the repository")
    return VOC2012
