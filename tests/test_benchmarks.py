"""Both sides of the benchmarks compute the same, or their times could not be compared."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_data, run_script
from PIL import Image

from benchmarks import baseline, prediction, roofline
from engine.devices import input_options
from engine.evaluation import evaluate
from engine.training import Training
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import find_split
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from model.transforms import to_input
from model.voc import CLASS_NAMES
from params import Params


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


def test_one_training_step_of_both_sides_gives_the_same_weights_and_the_same_score(split):
    params = Params(pretrained=False, precision="fp32", normalize=False, batch_size=4, image_size=32)
    dataset = SegmentationDataset(split, class_names=CLASS_NAMES, image_size=32)
    loader = make_loader(dataset, batch_size=4, num_workers=0)
    images, labels = next(iter(loader))
    pairs = zip(split.images, split.masks, strict=True)
    plain_images, targets = map(torch.stack, zip(*(baseline.load(*pair, 32) for pair in pairs), strict=True))
    torch.testing.assert_close(to_input(images, "cpu", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), plain_images)
    assert torch.equal(targets.argmax(1), labels.long())

    torch.manual_seed(0)
    model = FCN_GCN(**params.network_options(), pretrained=False)
    plain = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)
    training = Training(model, params, steps_per_epoch=1)
    logits = model(to_input(images, "cpu", **input_options(model, params)))
    loss = SegmentationLoss(**params.loss_options())(logits, labels)
    training.step(loss, ends_group=True)
    plain_loss = baseline.train_step(plain, baseline.optimizer(plain), plain_images, targets)
    assert loss.item() == pytest.approx(plain_loss, rel=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-3, atol=1e-5, msg=name)

    plain.load_state_dict(model.state_dict())
    ours = evaluate(model, loader, params, torch.device("cpu"))
    plain_loss, plain_mIoU = baseline.evaluate_batch(plain.eval(), plain_images, targets)
    assert ours["loss"] == pytest.approx(plain_loss, rel=1e-4)
    assert ours["mIoU"] == pytest.approx(plain_mIoU, abs=1e-3)


def test_the_roofline_counts_what_an_operation_reads_and_writes():
    a, b = torch.ones(10, 20), torch.ones(20, 30)

    def step():
        (a @ b).view(-1)  # 4 x (200 + 600 + 300) bytes
        a.add_(1.0)  # 2 x 800
        b.copy_(torch.ones(1).expand(20, 30))  # ones: 4, then 4 + 2400
        torch._foreach_add_([a], [a])  # reads a once, writes it

    with roofline.Operations() as operations:
        step()
    seen = {operation.name: operation[1:] for operation in operations.seen}
    assert seen["mm"] == (2 * 10 * 20 * 30, 4400)
    assert seen["add_"] == (0, 1600)
    assert seen["copy_"] == (0, 2404)
    assert seen["_foreach_add_"] == (0, 1600)
    assert "view" not in seen
    bound = roofline.bound(step, peak=12_000, bandwidth=1600)
    assert bound.by_operation["mm"] == pytest.approx(4400 / 1600)  # longer than its second of operations
    assert bound.seconds == pytest.approx(sum(size for _, size in seen.values()) / 1600)
    assert roofline.bound(step, peak=1200, bandwidth=1600).by_operation["mm"] == pytest.approx(10)


@pytest.mark.slow
def test_the_benchmark_prints_its_tables():
    stdout = run_script("benchmarks/run.py", "--repeats", "1").stdout
    for row in (
        "training step, batch 5",
        "evaluation, batch 5",
        "an epoch, 20 + 10 images",
        "input, first pass",
        "input, cached",
        "peak memory",
        "10000",
        "operation by operation",
        "train.py has its first batch after",
    ):
        assert row in stdout


@pytest.mark.slow
def test_what_is_to_be_measured_on_a_gpu_can_be_rehearsed_without_one(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", "--rehearse"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    tables = (tmp_path / "out" / "tables.md").read_text()
    for words in ("## steps", "| resnet18", "training step, batch 5", "| predict.py", "| best224 | 1 2 "):
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
        (("out",), "gpu.sh OUT DATA_DIR"),
        pytest.param(("out", "absent"), "gpu.sh: error: ", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_measured_on_a_gpu_is_refused_before_anything_is_written(tmp_path, flags, words):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_scaling_table_is_printed():
    flags = ("--steps", 1, "--repeats", 1, "--image_size", 32, "--batch_size", 4, "--device", "cpu")
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "1 process" in result.stdout, result.stderr


def test_photos_per_second_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "other_networks", lambda encoder: {"another": torch.nn.Conv2d(3, 21, 1)})
    data = make_data(tmp_path / "data")
    flags = ("--image_size", "32", "--batch_size", "2", "--photos", "2", "--repeats", "1", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["prediction.py", "--data_dir", str(data), *flags])
    monkeypatch.setattr(prediction, "run_command", lambda command: run_script(Path(command[1]).name, *command[2:]))
    prediction.main(prediction.parse_args())
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table}
    assert rows["this program"][1::2] == ["1.00"] * 3 and float(rows["another"][0]) > 0
    for name in ("predict.py", "evaluate.py --original_size"):
        count, seconds, rate = map(float, rows[name])
        assert count == 2 and rate == pytest.approx(2 / seconds, rel=0.02)
