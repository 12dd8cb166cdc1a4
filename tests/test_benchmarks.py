"""Both sides of the benchmarks compute the same, or their times could not be compared; and the script for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_data
from PIL import Image

from benchmarks import baseline, prediction, run, steps
from benchmarks.common import build
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import find_split
from model.losses import SegmentationLoss
from model.transforms import to_input
from model.voc import CLASS_NAMES
from params import Params
from train import train_step


@pytest.fixture
def split(tmp_path):
    """Four scenes without void, which the original recipe counts as background."""
    data = make_data(tmp_path / "data", train=4)
    for path in (data / "SegmentationClass").iterdir():
        mask = Image.open(path)
        labels = np.array(mask)
        cleaned = Image.fromarray(np.where(labels == 255, 0, labels).astype(np.uint8), mode="P")
        cleaned.putpalette(mask.getpalette())
        cleaned.save(path)
    return find_split("voc", data, "train")


def test_one_training_step_of_both_sides_gives_the_same_weights(split):
    params = Params(pretrained=False, precision="fp32", normalize=False, batch_size=4, image_size=32)
    dataset = SegmentationDataset(split, class_names=CLASS_NAMES, image_size=32)
    images, labels = next(iter(make_loader(dataset, batch_size=4, num_workers=0)))
    pairs = zip(split.images, split.masks, strict=True)
    plain_images, targets = map(torch.stack, zip(*(baseline.load(*pair, 32) for pair in pairs), strict=True))
    torch.testing.assert_close(to_input(images, "cpu", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), plain_images)
    assert torch.equal(targets.argmax(1), labels.long())

    torch.manual_seed(0)
    training, plain = build(params, torch.device("cpu")), baseline.network()
    plain.load_state_dict(training.model.state_dict())
    losses = []
    criterion = SegmentationLoss(**params.loss_options())
    criterion.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))
    train_step(training, criterion, images, labels, batch_size=len(images))
    losses.append(baseline.train_step(plain, baseline.optimizer(plain), plain_images, targets))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def table(capsys) -> dict[str, list[str]]:
    """Return the cells of the table that was printed, by the first of each row."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def flags(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--repeats", "1", *map(str, words)])


def test_the_original_recipe_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "SIZE", 32)
    flags(monkeypatch, "--data_dir", make_data(tmp_path / "data", val=5))
    monkeypatch.setattr(run, "memory_row", lambda args: ("peak memory, two steps", "2 MiB", "1 MiB", "2.00"))
    run.main(run.parse_args())
    assert {"training step, batch 5", "input, cached, an image, one core", "peak memory, two steps"} <= table(
        capsys
    ).keys()
    flags(monkeypatch, "--data_dir", tmp_path / "data", "--peak_memory_of", "ours")
    run.main(run.parse_args())
    assert float(capsys.readouterr().out) >= 0


def test_other_networks_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "other_networks", lambda encoder: {"another": torch.nn.Conv2d(3, 21, 1)})
    data = make_data(tmp_path / "data")
    flags(monkeypatch, "--data_dir", data, "--image_size", "32", "--batch_size", "2", "--encoder", "resnet18")
    prediction.main(prediction.parse_args())
    rows = table(capsys)
    assert rows["this program"][1::2] == ["1.00"] * 2 and all(float(cell) >= 0 for cell in rows["another"])


def test_a_step_that_fails_is_a_row(monkeypatch, capsys):
    flags(monkeypatch, "--encoders", "resnet18", "--sizes", "32", "--checkpointing", "off")
    found = {}
    monkeypatch.setattr(
        steps, "measured_apart", lambda options, args: found.setdefault("options", options) and "1 s | 2 GiB"
    )
    steps.main(steps.parse_args())
    assert table(capsys)["resnet18"] == ["32", "2", "auto", "off", "off", "1 s", "2 GiB"]
    args = steps.parse_args()
    args.one = found["options"]
    steps.main(args)
    assert capsys.readouterr().out.split()[1::3] == ["s", "GiB"]
    monkeypatch.setattr(steps, "build", lambda *_: torch.empty(10**15))
    steps.main(args)
    assert capsys.readouterr().out == "out of memory |\n"


@pytest.mark.slow
def test_what_is_to_be_measured_on_a_gpu_can_be_rehearsed_without_one(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", "--rehearse"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    tables = (tmp_path / "out" / "tables.md").read_text()
    for words in ("## steps", "| resnet18", "training step, batch 5", "| this program", "| best224 | 1 2 "):
        assert words in tables
    assert "val_original_size_mIoU" in tables


def test_a_part_that_fails_on_a_gpu_is_named_and_the_others_are_kept(tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\necho "table of $*"; case "$*" in *benchmarks/run.py*) exit 3;; *-m\\ pytest*) exit 5;; esac\n'
    )
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    script = ROOT / "benchmarks" / "gpu.sh"
    command = [script, "out", "--rehearse"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.returncode, result.stderr.split(";")[0]) == (1, "failed or out of time: across run")  # no train.log
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert [line.split()[2].split("/")[-1] for line in tables.splitlines() if line.startswith("table of")] == [
        *("steps.py", "steps.py", "steps.py", "run.py", "prediction.py", "synthesize_results.py")
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("out", "--rehearsal"), "gpu.sh OUT DATA_DIR"),
        pytest.param(("out", "absent"), "gpu.sh: error: ", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_measured_on_a_gpu_is_refused_before_anything_is_written(tmp_path, flags, words):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
