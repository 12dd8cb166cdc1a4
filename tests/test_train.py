import copy
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, as_network, make_data, make_experiment, run_script, start_script
from PIL import Image, ImageChops
from torch import nn

import train
import utils
from engine import checkpoints, run, training
from engine.evaluation import evaluate
from engine.training import Training
from model import UserError, cores
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import Split, class_names, find_split
from model.losses import SegmentationLoss
from model.metrics import CHOOSING
from model.transforms import augment, cutmix, to_input
from optimization import build_optimizer, learning_rate_at, parameter_groups
from params import Params
from train import backward, train_epoch

OUTPUTS = {
    "best.pth.tar",
    "curves.png",
    "history.jsonl",
    "last.pth.tar",
    "metrics_val_best_weights.json",
    "metrics_val_last_weights.json",
    "params.json",
    "run.json",
    "samples.png",
    "train.log",
}


def run_train(experiment, data, *args, **options):
    return run_script("train.py", "--model_dir", experiment, "--data_dir", data, *args, **options)


def mistake(monkeypatch, experiment, data, *args) -> str:
    """What train.py says of a mistake; in this process, as starting one takes seconds."""
    command = ["train.py", "--model_dir", experiment, "--data_dir", data, *args]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(UserError) as error:
        train.main(train.parse_args())
    return str(error.value)


def history(experiment, *, without_times: bool = False) -> list[dict]:
    epochs = utils.read_history(experiment)
    if without_times:
        epochs = [{k: v for k, v in e.items() if k not in ("seconds", "images_per_second")} for e in epochs]
    return epochs


def weights(experiment, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(experiment / f"{name}.pth.tar")["state_dict"]


def best_epoch(experiment) -> int:
    scores = [epoch["val"]["mIoU"] for epoch in history(experiment)]
    return scores.index(max(scores)) + 1


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs with everything random or stateful switched on: (experiment, data, its stdout)."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_data(folder / "data")
    experiment = make_experiment(
        folder / "run",
        deterministic=True,
        augment=True,
        cutmix=0.5,
        dropout_rate=0.2,
        ema_decay=0.5,
        schedule="cosine",
        num_epochs=2,
        num_channels=32,
    )
    return experiment, data, run_train(experiment, data).stdout


def test_a_run_leaves_every_output_and_nothing_else(finished):
    experiment, _, stdout = finished
    assert {path.name for path in experiment.iterdir()} == OUTPUTS | {".lock"}
    assert [epoch["epoch"] for epoch in history(experiment)] == [1, 2]
    assert set(history(experiment)[0]) == {"epoch", "train", "val", "learning_rate", "seconds", "images_per_second"}
    metrics = json.loads((experiment / "metrics_val_last_weights.json").read_text())
    single = {name for name, value in metrics.items() if value is None or isinstance(value, float)}
    assert set(history(experiment)[-1]["val"]) == set(history(experiment)[-1]["train"]) == single > {"loss", "mIoU"}
    assert stdout.count("num_channels") == 1
    assert all(
        line in (experiment / "train.log").read_text()
        for line in ("epoch 1/2: ", "epoch 2/2: ", "trained 2 of 2 epochs; best")
    )
    picture = Image.open(experiment / "samples.png")
    picture.load()
    assert picture.width > picture.height / 2 > 100


def test_run_json_says_where_a_result_comes_from(finished):
    experiment, _, _ = finished
    run = json.loads((experiment / "run.json").read_text())
    assert {"git_commit", "argv", "versions", "device", "seed", "params"} <= set(run)
    assert run["versions"]["torch"] == torch.__version__
    assert run["params"]["batch_size"] == TINY["batch_size"]
    assert "--model_dir" in run["argv"]


def test_run_json_names_the_data_folder(finished):
    experiment, data, _ = finished
    assert json.loads((experiment / "run.json").read_text())["data_dir"] == str(data)


def test_weights_of_one_recipe_have_one_origin_but_on_other_photos_another(finished):
    best, last = (checkpoints.load_checkpoint(finished[0] / f"{name}.pth.tar") for name in ("best", "last"))
    of_seed_2 = best | {"params": best["params"] | {"seed": 2}}
    assert checkpoints.origin(best) == checkpoints.origin(last) == checkpoints.origin(of_seed_2)
    assert checkpoints.origin(best | {"images": "of a subset"}) != checkpoints.origin(best)


def test_best_holds_what_prediction_needs_and_last_what_a_resume_needs(finished):
    experiment, _, _ = finished
    best, last = (torch.load(experiment / f"{name}.pth.tar", weights_only=True) for name in ("best", "last"))
    assert (
        best.keys() == {"epoch", "state_dict", "class_names", "images", "normalization", "set", "params"} < last.keys()
    )
    assert best["epoch"] == best_epoch(experiment)
    if best["epoch"] == last["epoch"]:
        assert same(best["state_dict"], last["ema_state_dict"])  # what validation has scored
    weights_size = sum(tensor.nbytes for tensor in best["state_dict"].values())
    assert (experiment / "best.pth.tar").stat().st_size < 1.1 * weights_size


def test_evaluate_gives_exactly_the_score_of_training(finished):
    experiment, data, _ = finished
    best = json.loads((experiment / "metrics_val_best_weights.json").read_text())
    result = run_script("evaluate.py", "--model_dir", experiment, "--data_dir", data)
    written = json.loads((experiment / "metrics_val_best.json").read_text())
    assert written == best | {"image_size": 32, "resize": "squash", "group": None}
    assert best["weights"] == checkpoints.weights_digest(weights(experiment, "best"))
    assert f"| mIoU                   | {best['mIoU']:7.4f} |" in result.stdout
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:4]] == ["background", "aeroplane"]
    run_script(
        "evaluate.py", "--model_dir", experiment, "--data_dir", data, "--restore_file", "last", "--split", "train"
    )
    last = json.loads((experiment / "metrics_train_last.json").read_text())
    assert (last["images"], last["epoch"]) == (6, 2)


def test_the_same_run_twice_gives_the_same_history_and_weights(finished, tmp_path):
    experiment, data, _ = finished
    again = make_experiment(tmp_path / "again", **json.loads((experiment / "params.json").read_text()))
    run_train(again, data)
    assert history(again, without_times=True) == history(experiment, without_times=True)
    assert same(weights(again), weights(experiment))


def test_a_folder_with_a_run_is_refused_until_told_which_is_meant(finished):
    experiment, data, _ = finished
    before = {path: path.stat().st_mtime_ns for path in experiment.iterdir()}
    result = run_train(experiment, data, check=2)
    assert "already holds a run" in result.stderr
    assert "--resume" in result.stderr and "--overwrite" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in experiment.iterdir()} == before


def test_overwrite_does_not_delete_the_weights_to_start_from(finished, tmp_path):
    experiment, data, _ = finished
    (tmp_path / "weights.pth.tar").symlink_to(experiment / "best.pth.tar")
    for name in (experiment / "best.pth.tar", tmp_path / "weights.pth.tar"):
        result = run_train(experiment, data, "--overwrite", "--init_from", name, check=2)
        assert "would delete" in result.stderr
    assert (experiment / "best.pth.tar").exists()


def test_resume_starts_and_continues_and_says_when_there_is_nothing_left(data, tmp_path, monkeypatch):
    experiment = make_experiment(tmp_path / "run", num_epochs=1)
    (experiment / "run.json").write_text("{}")  # of a run that was killed in its first epoch
    (experiment / "train.log").write_text("the first try\n")
    (experiment / "tensorboard").mkdir()
    (experiment / "tensorboard" / "events.1").touch()
    run_train(experiment, data, "--resume")
    (experiment / "tensorboard" / "events.1").unlink()
    (experiment / "tensorboard").rmdir()
    assert (experiment / "train.log").read_text().startswith("the first try\n")
    make_experiment(experiment, num_epochs=2, keep_last=False)
    assert "continuing after epoch 1" in run_train(experiment, data, "--resume").stdout
    assert [epoch["epoch"] for epoch in history(experiment)] == [1, 2]
    assert {path.name for path in experiment.iterdir()} == (OUTPUTS | {".lock"}) - {"last.pth.tar"}
    stdout = run_train(experiment, data, "--restore_file", "last").stdout
    finished = f"nothing to do in {experiment}: trained 2 of 2 epochs"
    assert stdout == f"{finished}; last.pth.tar was not kept to train on from\n"
    make_experiment(experiment, num_epochs=3, keep_last=False)
    assert "without last.pth.tar it cannot be resumed" in mistake(monkeypatch, experiment, data, "--resume")


def test_what_an_epoch_leaves_is_written_anew_from_the_checkpoint(finished, tmp_path):
    experiment, data, _ = finished
    cut = shutil.copytree(experiment, tmp_path / "run")
    last = torch.load(cut / "last.pth.tar", weights_only=True)
    last["metrics"]["best"] = last["metrics"]["last"]
    last["history"][1]["val"]["mIoU"] = 1.0
    torch.save(last, cut / "last.pth.tar")
    (cut / "best.pth.tar").write_text("junk")
    (cut / "history.jsonl").write_text("junk")
    for name in ("samples.png", "curves.png", "metrics_val_best_weights.json"):
        (cut / name).unlink()
    (cut / ".best.pth.tar.1.tmp").touch()
    assert "trained 2 of 2 epochs; best mIoU" in run_train(cut, data, "--resume").stdout
    best = torch.load(cut / "best.pth.tar", weights_only=True)
    assert best["epoch"] == 2 and same(best["state_dict"], last["ema_state_dict"])
    assert {path.name for path in cut.iterdir()} >= OUTPUTS and history(cut) == last["history"]
    assert not list(cut.glob(".*.tmp"))


def test_a_best_checkpoint_of_a_network_that_is_gone_is_not_taken_for_this_runs(finished, tmp_path):
    experiment, _, _ = finished
    digest = json.loads((experiment / "metrics_val_best_weights.json").read_text())["weights"]
    assert run.holds(experiment / "best.pth.tar", digest) and run.holds(experiment / "best.pth.tar", None)
    state = checkpoints.load_checkpoint(experiment / "best.pth.tar")
    state["state_dict"]["br9.conv2.bias"][3] += 1e-3
    torch.save(state, tmp_path / "best.pth.tar")
    assert not run.holds(tmp_path / "best.pth.tar", digest) and not run.holds(tmp_path / "absent.pth.tar", None)


@pytest.mark.parametrize("begins", [False, True], ids=["ends", "begins"])
def test_the_best_weights_stay_those_that_were_scored_where_averaging_begins_or_ends(finished, tmp_path, begins):
    experiment, data, _ = finished
    cut = shutil.copytree(experiment, tmp_path / "run")
    state = torch.load(cut / "last.pth.tar", weights_only=True)
    state["metrics"]["best"] = state["metrics"]["last"]
    if begins:
        state |= {"ema_state_dict": None, "params": state["params"] | {"ema_decay": None}}
    torch.save(state, cut / "last.pth.tar")
    params = state["params"] | {"ema_decay": 0.9 if begins else None}
    (cut / "params.json").write_text(json.dumps(params))
    run_train(cut, data, "--resume")
    assert same(weights(cut, "best"), state["state_dict"] if begins else state["ema_state_dict"])


@pytest.mark.parametrize("line", ["{}", "null", '{"epoch": 1, "val": {"mIoU": "x"}}', '{"epoch": 2, "val": {}}'])
def test_a_history_that_is_none_is_named_by_its_line(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"history\.jsonl is damaged in line 1; mend or remove the line"):
        utils.read_history(tmp_path)


def test_set_takes_the_place_of_params_json_also_in_a_resume_and_in_prediction(data, tmp_path):
    experiment = make_experiment(tmp_path / "run", num_epochs=1, best_metric="mIoU")
    run_train(experiment, data, "--set", "image_size=48", "best_metric=loss", 'loss_weights={"bce": 1}')
    assert json.loads((experiment / "run.json").read_text())["params"]["image_size"] == 48
    result = run_train(experiment, data, "--resume", "--set", "num_epochs=2")
    assert "changed since: num_epochs" in result.stdout
    state = checkpoints.load_checkpoint(experiment / "last.pth.tar")
    given = {"image_size": 48, "best_metric": "loss", "loss_weights": {"bce": 1}, "num_epochs": 2}
    assert state["set"] == given and given.items() <= state["params"].items()
    result = run_script("evaluate.py", "--model_dir", experiment, "--restore_file", "last")
    assert json.loads((experiment / "metrics_val_last.json").read_text())["image_size"] == 48 and not result.stderr


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("image_size=3", '"image_size" is 3'),
        ("size=3", 'did you mean "batch_size" or "image_size" or "kernel_size"?'),
        ("x", "give every key once"),
    ],
)
def test_a_mistake_in_set_is_named(data, tmp_path, monkeypatch, value, said):
    assert said in mistake(monkeypatch, make_experiment(tmp_path / "run"), data, "--set", value)


def test_params_that_were_edited_after_the_training_count_as_they_were_and_are_named(finished, tmp_path):
    experiment, _, _ = finished
    edited = shutil.copytree(experiment, tmp_path / "run")
    params = json.loads((edited / "params.json").read_text())
    (edited / "params.json").write_text(json.dumps(params | {"image_size": 64, "num_workers": 1}))
    stderr = run_script("evaluate.py", "--model_dir", edited).stderr
    assert '"image_size" 32 -> 64' in stderr and "num_workers" not in stderr and stderr.count("\n") == 1
    assert json.loads((edited / "metrics_val_best.json").read_text())["image_size"] == 32


def test_a_resume_takes_the_data_of_the_run(finished, tmp_path):
    experiment, data, _ = finished
    again = shutil.copytree(experiment, tmp_path / "run")
    said = run_script("train.py", "--model_dir", again, "--resume", "--set", "num_epochs=3").stdout
    assert json.loads((again / "run.json").read_text())["resumed"][0]["data_dir"] == str(data)
    # Under a cosine the raised number of epochs lifts the rate again.
    assert "changed since: num_epochs, so the learning rate, 0.000146 in the last step, 0.00025 in the next\n" in said


def test_a_run_of_an_older_program_is_told_what_is_measured_and_weighed_otherwise(data, tmp_path):
    """Its checkpoint has no digest of weights, nor have its scores."""
    experiment = make_experiment(tmp_path / "run", num_epochs=1, accumulation_steps=2, learning_rate=1e-6)
    run_train(experiment, data)
    state = checkpoints.load_checkpoint(experiment / "last.pth.tar")
    state["metrics"] = {
        name: {k: v for k, v in found.items() if k != "weights"} for name, found in state["metrics"].items()
    }
    torch.save(state, experiment / "last.pth.tar")
    said = run_train(experiment, data, "--resume", "--set", "num_epochs=2").stdout
    (line,) = [line for line in said.splitlines() if "changed since: " in line]
    assert "num_epochs, the validation loss, a mean over photos now" in line and "a smaller last batch weighs" in line
    assert "weights" in json.loads((experiment / "metrics_val_last_weights.json").read_text())


def test_overwrite_leaves_nothing_of_the_earlier_run(data, tmp_path):
    experiment = make_experiment(tmp_path / "run", num_epochs=1)
    for name in ("history.jsonl", "metrics_test_best.json", "best.pth.tar", "notes.txt"):
        (experiment / name).write_text("old\n")
    run_train(experiment, data, "--overwrite")
    assert {path.name for path in experiment.iterdir()} == OUTPUTS | {".lock", "notes.txt"}
    assert len(history(experiment)) == 1
    assert (experiment / "notes.txt").read_text() == "old\n"


def test_without_data_one_line_names_the_two_ways_on(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    result = run_train(tmp_path, tmp_path / "nothing", check=2)
    assert len(result.stderr.splitlines()) == 1
    assert "python build_dataset.py" in result.stderr
    assert "experiments/quickstart" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"params.json", ".lock"}


@pytest.mark.parametrize(
    ("params", "args", "said"),
    [
        ({"batch_size": 7}, [], '"batch_size" is 7, but train has 6 images'),
        ({"train_split": "trainaug"}, [], "trainaug.txt; splits here: train, val"),
        ({}, ["--init_from", "nowhere.pth.tar"], "no checkpoint nowhere.pth.tar"),
        ({"batch_size": 5}, [], "leaves a batch of 1 among 6 images"),
        ({"batch_size": 1}, [], "leaves a batch of 1 among 6 images"),
        ({"batch_size": 1, "cutmix": 0.5}, [], 'which has only one; raise "batch_size"'),
    ],
)
def test_a_mistake_is_said_in_one_line_with_nothing_written(data, tmp_path, monkeypatch, params, args, said):
    experiment = make_experiment(tmp_path / "run", **params)
    message = mistake(monkeypatch, experiment, data, *args)
    assert said in message
    assert "\n" not in message
    assert {path.name for path in experiment.iterdir()} - {".lock"} == {"params.json"}


def test_a_mistake_ends_with_status_2(data, tmp_path):
    experiment = make_experiment(tmp_path / "run", num_classes=8)
    stderr = run_train(experiment, data, check=2).stderr
    assert "class index" in stderr
    assert "Traceback" not in stderr
    assert "give one of them" in run_train(experiment, data, "--restore_file", "last", "--overwrite", check=2).stderr


@pytest.mark.parametrize("given", [["--learning-rate", "1e-3"], ["--learning_rate=1e-3"], ["--over"]], ids=str)
def test_a_key_of_params_json_as_a_flag_is_told_of_set(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert capsys.readouterr().err.endswith("; a key of params.json is set by --set KEY=VALUE\n")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_device_asked_for_and_absent_is_one_line(data, tmp_path, monkeypatch, device):
    said = mistake(monkeypatch, make_experiment(tmp_path / "run"), data, "--device", device)
    assert said == f"--device {device}: PyTorch sees no {device.upper()} device here; use --device cpu or auto"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(data, tmp_path):
    experiment = make_experiment(tmp_path / "run", learning_rate=1e30, save_summary_steps=1)
    result = run_train(experiment, data, check=1)
    assert re.search(r"the loss became (nan|inf) at step [12] of epoch [12], at learning rate 1e\+30", result.stderr)
    assert "Traceback" not in result.stderr
    assert not (experiment / "last.pth.tar").exists()


def test_objects_painted_in_255_are_no_perfect_score(data, tmp_path):
    for path in (data / "SegmentationClass").iterdir():
        Image.fromarray(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    experiment = make_experiment(tmp_path / "run", num_classes=2)
    assert "hold no class beside void (255), or only one" in run_train(experiment, data, check=2).stderr
    assert not (experiment / "last.pth.tar").exists()


def test_photos_of_val_that_are_trained_on_are_counted_in_the_log(data, tmp_path):
    shutil.copy(data / "train.txt", data / "val.txt")
    experiment = make_experiment(tmp_path / "run", num_epochs=1)
    run_train(experiment, data)
    line = "6 of 6 photos of val are, or nearly are, one of train: train0 and train0, for example; scores of val"
    assert (experiment / "train.log").read_text().count(line) == 1


@pytest.mark.slow
def test_photos_of_your_own_need_no_setting_but_their_classes(tmp_path):
    """Own photos, names and class count, lists by build_dataset.py: what the README promises."""
    data = make_data(tmp_path / "mine")
    for split in ("train", "val"):
        (data / f"{split}.txt").unlink()
    for path in (data / "SegmentationClass").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 255, mask > 0).astype(np.uint8)).save(path)
    (data / "classes.txt").write_text("floor\nthing\n")
    run_script("build_dataset.py", "--data_dir", data, "--split", "0.6", "0.2", "0.2", "--seed", "1")
    experiment = make_experiment(tmp_path / "run", num_classes=2, num_epochs=1)
    run_train(experiment, data)
    result = run_script("evaluate.py", "--model_dir", experiment, "--data_dir", data, "--split", "test")
    assert "| floor " in result.stdout
    assert set(json.loads((experiment / "metrics_test_best.json").read_text())["IoU"]) == {"floor", "thing"}


# ---------------------------------------------------------------------------------------- one key at a time


def network(num_classes: int = 21, *, normalize: bool = True, encoder: str = TINY["encoder"]) -> nn.Module:
    torch.manual_seed(0)
    return train.FCN_GCN(num_classes, encoder=encoder, pretrained=False, normalize=normalize)


def loader_of(data, **params):
    params = Params(**TINY | params)
    split = find_split("voc", data, "train")
    dataset = SegmentationDataset(split, class_names=class_names(split, 21), image_size=32)
    return make_loader(dataset, batch_size=params.batch_size, seed=params.seed)


def train_tiny(data, **params) -> Training:
    """One epoch in this process."""
    params = Params(**TINY | params)
    loader = loader_of(data, batch_size=params.batch_size)
    training = Training(network(), params, -(-len(loader) // params.accumulation_steps))
    train_epoch(training, loader)
    return training


@pytest.mark.parametrize("schedule", ["constant", "poly", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_schedule_follows_its_formula(schedule, warmup):
    steps, params = 7, Params(schedule=schedule, warmup_epochs=warmup, num_epochs=5, learning_rate=0.1)
    training = Training(as_network(nn.Conv2d(1, 1, 1)), params, steps)
    rates = []
    for _ in range(params.num_epochs * steps):
        rates.append(training.learning_rate)
        backward(training, training.model(torch.ones(1, 1, 1, 1)).sum())

    def expected(step: int) -> float:
        start, total = warmup * steps, params.num_epochs * steps
        if step < start:
            return 0.1 * (step + 1) / (start + 1)
        t = (step - start) / (total - start)
        return 0.1 * {"constant": 1, "poly": (1 - t) ** 0.9, "cosine": (1 + math.cos(math.pi * t)) / 2}[schedule]

    assert rates == pytest.approx([expected(step) for step in range(len(rates))])
    assert rates == [learning_rate_at(step, params, steps) for step in range(len(rates))]


def test_sgd_and_adamw_take_their_options_from_params():
    sgd = build_optimizer(as_network(nn.Linear(1, 1)), Params(learning_rate=0.3, momentum=0.7, weight_decay=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")] == [0.3, 0.7, 0.1]
    adamw = build_optimizer(as_network(nn.Linear(1, 1)), Params(optimizer="adamw", learning_rate=0.3, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [adamw.param_groups[0][key] for key in ("lr", "weight_decay")] == [0.3, 0.1]


def test_the_encoder_can_learn_more_slowly_and_norms_and_biases_decay_less():
    model = train.FCN_GCN(encoder="resnet18", pretrained=False)
    assert len(parameter_groups(model, Params())) == 1  # in the order of the network, as old checkpoints have it
    options = {"encoder_learning_rate_factor": 0.1, "decay_norms_and_biases": False}
    optimizer = build_optimizer(model, Params(learning_rate=0.5, weight_decay=0.25, **options))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == {*names.values()}
    assert found["layer1.0.conv1.weight"] == (0.05, 0.25) and found["bn0.weight"] == found["layer4.1.bn2.bias"] == (
        0.05,
        0,
    )
    assert found["gcn1.conv_l1.weight"] == (0.5, 0.25) and found["br9.conv2.bias"] == (0.5, 0)
    training = Training(model, Params(schedule="cosine", num_epochs=1, **options), 4)
    backward(training, sum(parameter.sum() for parameter in model.parameters()))
    rates = {names[p]: g["lr"] for g in training.optimizer.param_groups for p in g["params"]}
    assert rates["conv1.weight"] == pytest.approx(0.1 * rates["gcn1.conv_l1.weight"])
    assert rates["gcn1.conv_l1.weight"] == training.learning_rate < 0.001


def test_momentum_finds_its_weights_again_where_the_groups_have_changed(tmp_path):
    def training(**options) -> Training:
        return Training(network(), Params(momentum=0.9, weight_decay=0.25, **options), 2)

    first = training()
    backward(first, sum((parameter**3).sum() for parameter in first.model.parameters()))
    for options in ({"encoder_learning_rate_factor": 0.5}, {"decay_norms_and_biases": False}, {}):
        state = first.state_dict() | {"epoch": 1, "history": [{"epoch": 1, "val": {}}]}
        first = training(**options)
        first.load_state_dict(copy.deepcopy(state), tmp_path / "last.pth.tar")
        expected = [3 * w**2 + 0.25 * w for w in network().parameters()]
        for weight, momentum in zip(first.model.parameters(), expected, strict=True):
            torch.testing.assert_close(first.optimizer.state[weight]["momentum_buffer"], momentum)


def linear_training(**params) -> Training:
    torch.manual_seed(0)
    model = as_network(nn.Linear(3, 1, bias=False))
    return Training(model, Params(**{"momentum": 0.0, "weight_decay": 0.0} | params), 10)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_accumulated_gradients_are_those_of_the_large_batch(precision):
    """With the loss divided by the group's size, a group is one step on the mean of its losses."""
    x = torch.randn(4, 3)
    whole, parts = linear_training(), linear_training(accumulation_steps=2, precision=precision)
    backward(whole, whole.model(x).square().mean())
    for i, half in enumerate(x.chunk(2)):
        backward(parts, parts.model(half).square().mean() / 2, updates=i == 1)
    torch.testing.assert_close(parts.model.weight, whole.model.weight)


def test_an_epoch_makes_one_step_per_group_of_batches(data):
    for accumulation, expected in ((1, 3), (2, 2), (4, 1)):
        training = train_tiny(data, batch_size=2, accumulation_steps=accumulation, learning_rate=0.1, schedule="poly")
        assert training.steps == expected, accumulation


def test_a_group_of_batches_steps_on_the_mean_of_their_losses(data):
    options = {"batch_size": 2, "accumulation_steps": 4, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    model = network()
    criterion, loader = train.SegmentationLoss(Params().loss_weights), loader_of(data, batch_size=2)
    for images, labels, _ in loader:
        images = to_input(images, "cpu", mean=model.mean, std=model.std)
        (criterion(model(images), labels) / len(loader)).backward()
    expected = model.gcn2.conv_l1.weight - 0.1 * model.gcn2.conv_l1.weight.grad
    torch.testing.assert_close(train_tiny(data, **options).model.gcn2.conv_l1.weight, expected)


def test_a_smaller_last_batch_weighs_by_its_images():
    """Sixteen photos and one, accumulated, have the gradient of the seventeen at once; equal batches as ever."""
    images = torch.randint(256, (17, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, sizes = images[:, 0] % 3, [16, 1]
    criterion = SegmentationLoss({"bce": 1.0, "cross_entropy": 1.0})
    steps = {}
    for count in (1, 2):
        torch.manual_seed(0)
        params = Params(accumulation_steps=count, momentum=0.0, weight_decay=0.0, num_classes=3, precision="fp32")
        steps[count] = Training(as_network(nn.Conv2d(3, 3, 3, padding=1)), params, 2)
    train.train_step(steps[1], criterion, images, labels, batch_size=17)
    for step, (x, y) in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True)):
        shared, last = steps[2].accumulation(step, sizes)
        train.train_step(steps[2], criterion, x, y, batch_size=sizes[step], accumulated=shared, updates=last)
    torch.testing.assert_close(steps[2].model.weight, steps[1].model.weight, rtol=0, atol=1e-8)
    assert [steps[2].accumulation(step, [5, 5, 5]) for step in range(3)] == [(2, False), (2, True), (1, True)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_step(precision):
    training = linear_training(clip_grad_norm=0.5, learning_rate=0.1, precision=precision)
    before = training.model.weight.detach().clone()
    backward(training, 1000 * training.model(torch.ones(1, 3)).sum())
    assert (training.model.weight - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_ema_is_the_exponential_mean_of_weights_and_statistics():
    torch.manual_seed(0)
    model = as_network(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    training = Training(model, Params(ema_decay=0.9, learning_rate=0.1, momentum=0.0), 10)
    expected = None
    for _ in range(4):
        backward(training, model(torch.randn(5, 3)).square().sum())
        now = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] for name in now} if expected else now
    expected["1.num_batches_tracked"] = torch.tensor(4.0, dtype=torch.float64)
    for name, average in training.eval_model.state_dict().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert name == "1.num_batches_tracked" or not torch.equal(average, model.state_dict()[name])


@pytest.mark.parametrize(
    "params",
    [{"precision": "bf16"}, pytest.param({"precision": "fp16"}, marks=pytest.mark.slow), {"channels_last": False}],
    ids=str,
)
def test_precision_and_memory_format_change_speed_not_results(tmp_path, params):
    data = make_data(tmp_path / "data", train=2, val=1)

    def first_loss(**params) -> float:
        training = Training(network(), Params(**TINY | {"batch_size": 2} | params), 1)
        return train_epoch(training, loader_of(data, batch_size=2))["loss"]

    loss, plain = first_loss(**params), first_loss()
    assert loss == pytest.approx(plain, rel=2e-2)
    assert "precision" not in params or loss != plain  # rounded on the way


def test_normalize_and_loss_weights_reach_the_training(data):
    losses = {
        str(options): train_epoch(
            Training(
                network(normalize=options.get("normalize", True)), Params(**TINY | {"batch_size": 6} | options), 1
            ),
            loader_of(data, batch_size=6),
        )["loss"]
        for options in ({}, {"normalize": False}, {"loss_weights": {"cross_entropy": 1.0}})
    }
    assert len(set(losses.values())) == 3
    assert losses["{'loss_weights': {'cross_entropy': 1.0}}"] > 2  # about log 21


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"cutmix": 0.5}, {"augment": True, "cutmix": 1.0}], ids=str)
def test_photos_are_augmented_then_mixed_with_their_masks(data, options):
    params = Params(**TINY | {"batch_size": 6} | options)
    loader = loader_of(data, batch_size=6)
    ((images, labels, seeds),) = loader
    training = Training(network(), params, 1)
    if params.augment:
        images, labels = augment(images, labels, seeds, padding=training.model.encoder.padding)
    if params.cutmix:
        images, labels = cutmix(images, labels, seeds, params.cutmix)
    seen = []
    training.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    result = train_epoch(training, loader)
    images = to_input(images, "cpu", mean=training.model.mean, std=training.model.std)
    assert torch.equal(seen[0], images)
    loss = SegmentationLoss(**params.loss_options())(network().train()(images), labels)
    assert result["loss"] == pytest.approx(loss.item())


HEAP = """
import ctypes, os
import torch
from engine.devices import reuse_memory

class Mallinfo(ctypes.Structure):  # of which the first field is the heap's size in bytes
    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo

def growth():
    start = libc.mallinfo2().field0
    for block in [libc.malloc(300 * 2**20) for _ in range(20)]:
        libc.free(ctypes.c_void_p(block))
    return (libc.mallinfo2().field0 - start) // 2**20

os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"
reuse_memory(torch.device("cpu"))
print(growth())
del os.environ["MALLOC_TRIM_THRESHOLD_"]
reuse_memory(torch.device("cpu"))
print(growth())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="other libraries have other options")
@pytest.mark.slow
def test_freed_memory_is_kept_unless_the_environment_says_how_much():
    """In MiB, after 6000 have been taken and given back; in a new process, for a fork may have another heap."""
    variables = {name: value for name, value in os.environ.items() if not re.match("MALLOC_|GLIBC_TUNABLES", name)}
    command = [sys.executable, "-c", HEAP]
    said = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=True)
    without, kept = map(int, said.stdout.split())
    assert without < 300 and kept >= 3000


@pytest.mark.skipif(cores() < 2 or not Path("/proc/self/task").exists(), reason="needs two cores, and Linux")
def test_processes_of_the_validation_loader_start_before_a_step_has_taken_memory(tmp_path):
    data = make_data(tmp_path / "data", val=6)  # two batches, one for each process
    experiment = make_experiment(tmp_path / "run", num_epochs=1)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data)
    again = ("--model_dir", experiment, "--data_dir", data, "--resume", "--set", "num_workers=2")  # trains no epoch
    process, most = start_script("train.py", *again), 0
    while process.poll() is None:
        with suppress(OSError):  # it has just ended
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            most = max(most, len(children))
        time.sleep(0.002)
    assert process.returncode == 0 and most >= 2  # git, which is asked for the commit, is one at most


def test_metrics_of_training_count_every_batch(data):
    loader = loader_of(data, batch_size=2)
    labels = torch.cat([batch.flatten() for _, batch, _ in loader]).long()
    expected = labels[labels != 255].bincount(minlength=21).double()
    training = Training(network(), Params(**TINY | {"batch_size": 2}), 3)
    frequency = torch.tensor(train_epoch(training, loader)["frequency"], dtype=torch.float64)
    torch.testing.assert_close(frequency, expected / expected.sum())


@pytest.mark.parametrize(("every", "seen"), [(1, 2), (2, 3), (100, 3)])
def test_a_loss_that_is_not_finite_is_seen_at_every_nth_batch(data, every, seen):
    """Three batches; the last look is after the epoch. The step that makes weights NaN counts too."""
    loader = loader_of(data, batch_size=2)
    training = Training(network(), Params(**TINY | {"batch_size": 2, "save_summary_steps": every}), 3)
    steps = []
    training.optimizer.register_step_post_hook(
        lambda *_: steps.append(training.model.gcn1.conv_l1.weight.data.fill_(math.nan) is None)
    )
    with pytest.raises(utils.RunFailed, match="the loss became nan at step 2 of epoch 1"):
        train_epoch(training, loader)
    assert len(steps) == seen


def test_a_long_epoch_says_every_tenth_where_there_is_no_terminal(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    loader = loader_of(make_data(tmp_path / "data", train=12), batch_size=2)
    training = Training(network(), Params(**TINY | {"batch_size": 2}), 6)
    train_epoch(training, loader)
    assert caplog.messages == []  # a short one
    monkeypatch.setattr(run, "LINE_INTERVAL", 0)
    train_epoch(training, loader)
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"epoch 1/2: {share}%" for share in (17, 33, 50, 67, 83)
    ]
    assert all(re.search(r"train loss \d\.\d{4}$", message) for message in caplog.messages)


@pytest.mark.parametrize(
    ("done", "steps", "said"),
    [(0, 80, ["about 20 min for the whole run, without validation"]), (0, 5, []), (1, 80, [])],
    ids=("minutes", "a minute", "resumed"),
)
def test_a_run_says_once_how_long_it_takes_from_the_speed_of_its_steps(monkeypatch, caplog, done, steps, said):
    """The first two, which take a minute each here, do not count; the others take five seconds, in three epochs."""
    caplog.set_level("INFO")
    now = 0.0
    monkeypatch.setattr(run.time, "monotonic", lambda: now)
    training = Training(network(2), Params(**TINY | {"num_epochs": 3}), steps)
    training.epoch = done
    progress = run.EpochProgress(training, [3] * steps)
    for step in range(1, min(steps, 9) + 1):
        now += 60 if step <= 2 else 5
        progress.update(3, torch.ones(step))
    assert [line for line in caplog.messages if "whole run" in line] == said


@pytest.mark.parametrize(
    ("mean_ious", "ends"),
    [([0.5], "images/s, 5 min left (best)"), ([0.5, 0.4], "2.0 images/s"), ([0.5, 0.6, 0.7], "2.0 images/s (best)")],
    ids=("first", "early stop", "last"),
)
def test_an_epochs_line_says_how_long_the_rest_takes_unless_it_is_the_last(mean_ious, ends):
    training = Training(network(2), Params(**TINY | {"num_epochs": 3, "early_stopping_patience": 1}), 1)
    for value in mean_ious:
        scores = {"loss": 1.0, "mIoU": value, "pixel_accuracy": 0.5}
        training.end_epoch(scores | {"learning_rate": 0.1}, scores, seconds=150.0, images_per_second=2.0)
    assert run.epoch_line(training).endswith(ends)


def test_an_epochs_line_says_where_the_metric_that_chooses_is_undefined():
    training = Training(network(2), Params(**TINY | {"best_metric": "mean_dice"}), 1)
    scores = {"loss": 1.0, "mIoU": 0.5, "pixel_accuracy": 0.5, "mean_dice": None}
    training.end_epoch(scores | {"learning_rate": 0.1}, scores, seconds=1.0, images_per_second=2.0)
    assert "mIoU 0.5000, pixel accuracy 0.5000, mean dice undefined, lr 0.1" in run.epoch_line(training)


@pytest.mark.parametrize(
    ("length", "shown"), [(12, [0, 2, 4, 6, 8, 10]), (8, [0, 1, 2, 4, 5, 6]), (2, [0, 1])], ids=str
)
def test_the_samples_are_spread_evenly_over_the_list(tmp_path, length, shown):
    photos = [tmp_path / f"{index}.png" for index in range(length)]
    for index, photo in enumerate(photos):
        Image.new("RGB", (32, 32), (10 * index,) * 3).save(photo)
    split = Split("val", [photo.stem for photo in photos], photos, None)
    dataset = SegmentationDataset(split, class_names=["a", "b"], image_size=32, cache=False)
    training = Training(network(2), Params(**TINY | {"num_classes": 2}), 1)
    picture = run.sample_predictions(training, dataset)
    training.epoch = 12
    changed = ImageChops.difference(picture, run.sample_predictions(training, dataset)).getbbox()
    assert changed and changed[2] < 90 and changed[3] < 22, "the number of the epoch, in the corner"
    tiles = [picture.getpixel((90 + 80 + column * 168, 80))[0] for column in range(len(shown))]
    assert tiles == [10 * index for index in shown]


def test_a_resumed_training_knows_all_that_the_interrupted_one_knew(finished):
    experiment, _, _ = finished
    file = experiment / "last.pth.tar"
    state = checkpoints.load_checkpoint(file)
    resumed = Training(network(), Params(**state["params"]), 2)
    resumed.load_state_dict(state, file)
    resumed.about = {key: state[key] for key in ("images", "val_images", "class_names", "set")}  # of the data at hand

    def equal(first, second) -> bool:
        if isinstance(first, dict):
            return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
        return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second

    again = resumed.state_dict()
    assert equal(again.pop("optim_dict")["state"], state.pop("optim_dict")["state"])
    assert [key for key in state if not equal(again[key], state[key])] == []
    assert again.keys() == state.keys()


def test_the_metric_of_params_json_chooses_the_best_epoch():
    values = [{"mIoU": 0.3, "loss": 0.9}, {"mIoU": 0.1, "loss": 0.2}, {"mIoU": 0.2, "loss": 0.3}]
    found = {}
    for key, patience in (("mIoU", None), ("loss", None), ("loss", 1)):
        params = Params(**TINY | {"num_epochs": 9, "best_metric": key, "early_stopping_patience": patience})
        training = Training(as_network(nn.Conv2d(3, 21, 1)), params, 1)
        for metrics in values:
            training.end_epoch({"learning_rate": 0.1}, metrics, seconds=1.0, images_per_second=1.0)
        found[key, patience] = training.metrics["best"]["epoch"], training.stop_reason
    stopped = "stopped early after epoch 3: no better loss in 1 epochs"
    assert found == {("mIoU", None): (1, None), ("loss", None): (2, None), ("loss", 1): (2, stopped)}


def test_an_error_of_any_kind_of_the_system_says_how_to_continue():
    away = HTTPError("http://tracker", 404, "away", Message(), None)  # takes five arguments
    said = "away; the same command with --resume continues"
    with pytest.raises(OSError, match=said), run.advising_to_resume(Namespace(overwrite=False)):
        raise away


def test_an_undefined_metric_is_worse_than_any_value():
    for metric in ("mIoU", "loss"):
        history = [{"epoch": 1, "val": {metric: None}}, {"epoch": 2, "val": {metric: 0.0}}, {"epoch": 3, "val": {}}]
        assert training.best_epoch(history, metric)["epoch"] == 2


def test_every_metric_that_can_choose_the_best_epoch_is_in_the_history(finished):
    experiment, _, _ = finished
    assert {*history(experiment)[0]["val"]} >= {*CHOOSING}


def test_metrics_of_one_number_are_in_the_history_whatever_their_type():
    metrics = {"mIoU": 0.5, "classes_missed": 3, "undefined": None, "IoU": [0.5], "images": 7, "epoch": 2}
    assert training.scalars(metrics) == {"mIoU": 0.5, "classes_missed": 3, "undefined": None}


def test_resume_takes_its_options_from_params_json(finished):
    experiment, _, _ = finished
    file = experiment / "last.pth.tar"
    state = checkpoints.load_checkpoint(file)
    params = Params(**state["params"] | {"learning_rate": 0.5, "weight_decay": 0.25, "num_epochs": 40})
    resumed = Training(network(), params, 2)
    resumed.load_state_dict(state, file)
    group = resumed.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.25
    assert group["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 40)) / 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "adamw"),
        ("stem_maxpool", True),
        ("encoder", "resnet50"),
        ("normalize", False),
        ("resize", "letterbox"),
        ("dataset", "sample"),
        ("best_metric", "loss"),
    ],
)
def test_resume_refuses_by_name_what_must_not_change(finished, tmp_path, monkeypatch, key, value):
    experiment, data, _ = finished
    changed = make_experiment(tmp_path / "run", **json.loads((experiment / "params.json").read_text()) | {key: value})
    (changed / "last.pth.tar").symlink_to(experiment / "last.pth.tar")
    said = mistake(monkeypatch, changed, data, "--restore_file", "last")
    assert f'was trained with other values than params.json has: "{key}" ' in said


@pytest.mark.parametrize(
    ("best_metric", "key", "value", "refused"),
    [
        ("mIoU", "image_size", 64, True),
        ("mIoU", "loss_weights", {"bce": 1}, False),
        ("loss", "loss_weights", {"bce": 1}, True),
        ("loss", "focal_gamma", 1, True),
    ],
)
def test_a_resume_keeps_what_its_best_epoch_was_measured_by(
    finished, tmp_path, monkeypatch, best_metric, key, value, refused
):
    experiment, data, _ = finished
    state = checkpoints.load_checkpoint(experiment / "last.pth.tar")
    state["params"]["best_metric"] = best_metric
    folder = make_experiment(tmp_path / "run", **state["params"] | {key: value})
    torch.save(state, folder / "last.pth.tar")
    args = Namespace(model_dir=folder, data_dir=data, resume=True, overwrite=False, init_from=None, set={})
    if not refused:
        assert run.begin(args, torch.device("cpu"))
        return
    with pytest.raises(UserError, match=rf'"{key}" .* -> .*; set it back, or start another run from .* --init_from'):
        run.begin(args, torch.device("cpu"))


def test_a_resume_with_other_class_names_is_refused_by_the_first(finished, tmp_path, monkeypatch):
    experiment, data, _ = finished
    shutil.copytree(experiment, tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(["background", "bird", *map(str, range(19))]))
    make_experiment(tmp_path / "run", **json.loads((experiment / "params.json").read_text()) | {"num_epochs": 3})
    said = mistake(monkeypatch, tmp_path / "run", tmp_path / "data", "--restore_file", "last")
    assert said.startswith(f'class 1 is "aeroplane" in {tmp_path}/run/last.pth.tar, "bird" in {tmp_path}/data/classes')


def test_weights_alone_can_start_a_run_but_not_continue_one(finished, tmp_path):
    """So comes a checkpoint of the original implementation: other keys, and tensors that nothing uses."""
    experiment, data, _ = finished
    state = weights(experiment) | {"br1.bn.weight": torch.ones(21), "br9.bn.num_batches_tracked": torch.tensor(3)}
    old = make_experiment(tmp_path / "old")
    torch.save({"epoch": 7, "state_dict": state, "optim_dict": {}}, old / "best.pth.tar")
    assert "--init_from" in run_train(old, data, "--restore_file", "best", check=2).stderr
    run_script("evaluate.py", "--model_dir", old, "--data_dir", data)
    assert json.loads((old / "metrics_val_best.json").read_text())["epoch"] == 7
    new = make_experiment(tmp_path / "new", num_epochs=1, learning_rate=1e-12)
    run_train(new, data, "--init_from", old / "best.pth.tar")
    assert json.loads((new / "run.json").read_text())["init_from"] == checkpoints.weights_digest(state)
    torch.testing.assert_close(weights(new)["gcn1.conv_l1.weight"], state["gcn1.conv_l1.weight"])


def test_weights_of_a_recipe_have_one_origin_whatever_their_seed():
    def origin(weight: float, names: str = "ab", **params) -> str:
        state = {"params": asdict(Params(**params)), "state_dict": {"a": torch.tensor([weight])}}
        return checkpoints.origin(state | {"class_names": [*names]})

    assert origin(1, seed=1) == origin(2, seed=2, num_workers=0)
    assert origin(1, seed=1) != origin(1, seed=1, learning_rate=0.5)
    assert origin(1, seed=1) != origin(1, "ac", seed=1)
    given = [checkpoints.origin({"params": {}, "state_dict": {"a": torch.tensor([weight])}}) for weight in (1.0, 2.0)]
    assert given[0] != given[1]


@pytest.mark.parametrize("head", ["gcn", "conv1x1", "stack"])
def test_init_from_starts_score_layers_of_another_class_count_afresh_and_only_those(tmp_path, head):
    def build(num_classes: int) -> nn.Module:
        return train.FCN_GCN(num_classes, encoder="resnet18", head=head, kernel_size=5, pretrained=False)

    source = build(21).state_dict()
    file = tmp_path / "x.pth.tar"
    torch.save({"state_dict": source}, file)
    model = build(21)
    assert not checkpoints.init_from(model, file, Params())
    assert same(model.state_dict(), source)

    model = build(3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert checkpoints.init_from(model, file, Params())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith(("gcn", "br")) else source[name]), name


def test_init_from_refuses_any_other_misfit_by_name(tmp_path):
    file = tmp_path / "x.pth.tar"
    torch.save(
        {"state_dict": train.FCN_GCN(encoder=TINY["encoder"], kernel_size=9, pretrained=False).state_dict()}, file
    )
    with pytest.raises(UserError, match=r"gcn1\.conv_l1\.weight.*\[21, 32, 9, 1\].*\[21, 32, 7, 1\]"):
        checkpoints.init_from(network(), file, Params())
    torch.save({"state_dict": network().state_dict(), "params": {"kernel_size": 9}}, file)
    with pytest.raises(UserError, match=r'was trained with other values .*: "kernel_size" 9 -> 7; set it back'):
        checkpoints.init_from(network(), file, Params())


def test_init_from_says_what_is_not_as_it_was_for_the_weights(tmp_path):
    file, model = tmp_path / "x.pth.tar", network()
    then = {"encoder": TINY["encoder"], "stem_maxpool": True, "image_size": 64, "learning_rate": 0.5}
    torch.save({"state_dict": model.state_dict(), "params": then}, file)
    now = Params(encoder=TINY["encoder"], resize="letterbox")
    (said,) = checkpoints.init_from(model, file, now)
    assert said.endswith('other values: "stem_maxpool" true -> false, "resize" "squash" -> "letterbox"')


@pytest.mark.slow
def test_the_quickstart_learns_the_sample(tmp_path):
    experiment = make_experiment(tmp_path / "run")
    shutil.copy(utils.ROOT / "experiments" / "quickstart" / "params.json", experiment)
    run_train(experiment, tmp_path)
    assert json.loads((experiment / "metrics_val_best_weights.json").read_text())["mIoU"] >= 0.5


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_loss(data):
    losses = []
    for compiled in (False, True):
        training = Training(network(), Params(**TINY | {"compile": compiled}), 2)
        losses.append(train_epoch(training, loader_of(data))["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("device", "accumulation_steps", "mode"),
    [("cuda", 1, "reduce-overhead"), ("cuda", 2, "default"), ("cpu", 1, "default")],
)
def test_cuda_graphs_are_for_gpus_and_not_for_accumulated_gradients(device, accumulation_steps, mode):
    assert training.compile_mode(torch.device(device), Params(accumulation_steps=accumulation_steps)) == mode


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_deterministic_runs_agree_on_a_gpu(data, tmp_path):
    loss_weights = {"bce": 1, "dice": 1, "inverse_dice": 1, "cross_entropy": 1, "balanced_cross_entropy": 1}
    options = {"encoder": "resnet18", "deterministic": True, "loss_weights": loss_weights}
    runs = [make_experiment(tmp_path / str(i), **options) for i in range(2)]
    for each in runs:
        run_train(each, data, "--device", "cuda")
    assert history(runs[0], without_times=True) == history(runs[1], without_times=True)
    assert same(weights(runs[0]), weights(runs[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_crosses_devices_with_its_optimizer(data, tmp_path, first, second):
    experiment = make_experiment(
        tmp_path / "run", encoder="resnet18", num_epochs=1, precision="fp32", optimizer="adamw"
    )
    run_train(experiment, data, "--device", first)
    make_experiment(experiment, encoder="resnet18", num_epochs=2, optimizer="adamw")
    run_train(experiment, data, "--restore_file", "last", "--device", second)
    state = checkpoints.load_checkpoint(experiment / "last.pth.tar")
    assert state["epoch"] == 2
    assert {entry["step"].item() for entry in state["optim_dict"]["state"].values()} == {4}
    run_script("evaluate.py", "--model_dir", experiment, "--data_dir", data, "--device", first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_norm": 1.0, "ema_decay": 0.9, "loss_weights": {"balanced_cross_entropy": 1.0}},
        {"optimizer": "adamw", "schedule": "poly", "augment": True, "cutmix": 0.5},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_steps_on_a_gpu_wait_for_nothing(tmp_path, options):
    """What CUDA says: as many waits in an epoch of five steps as in one of two."""
    params = Params(**TINY | {"precision": "bf16", "batch_size": 2} | options)
    waits = []
    for count in (4, 10):
        data = make_data(tmp_path / str(count), train=count)
        split = find_split("voc", data, "train")
        dataset = SegmentationDataset(split, class_names=class_names(split, 21), image_size=32)
        loader = make_loader(dataset, batch_size=2, seed=1, device="cuda")
        training = Training(network(encoder="resnet18").cuda(), params, 10)
        train_epoch(training, loader)  # sends constants, which stay there
        evaluate(training.eval_model, loader, params, training.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                train_epoch(training, loader)
                evaluate(training.eval_model, loader, params, training.device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA" in str(warning.message) for warning in seen))
    assert waits[0] == waits[1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2}], ids=str)
def test_cuda_graphs_train_to_the_same_loss(data, options):
    """Three epochs, so that graphs are recorded and replayed, and with a smaller last batch."""
    losses = []
    for compile_ in (False, True):
        params = Params(**TINY | {"compile": compile_, "batch_size": 4} | options)
        loader = make_loader(loader_of(data).dataset, batch_size=4, seed=1, device="cuda")
        training = Training(network(encoder="resnet18").cuda(), params, 2)
        losses.append([train_epoch(training, loader)["loss"] for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ---------------------------------------------------------------------------------------- real photos


def photos(folder, voc2012, *, train: list[str], val: list[str]):
    """A data set of links to some of the real photos."""
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(voc2012 / name)
    for split, ids in (("train", train), ("val", val)):
        (folder / f"{split}.txt").write_text("\n".join(ids))
    return folder


def ids_of(voc2012, split: str) -> list[str]:
    return (voc2012 / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


@pytest.mark.slow
def test_the_loss_falls_on_real_photos(voc2012, tmp_path):
    train_ids, val_ids = ids_of(voc2012, "train")[:16], ids_of(voc2012, "val")[:4]
    data = photos(tmp_path / "data", voc2012, train=train_ids, val=val_ids)
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", image_size=64, batch_size=8, num_workers=2)
    run_train(experiment, data)
    losses = [epoch["train"]["loss"] for epoch in history(experiment)]
    assert losses[-1] < losses[0]
    result = run_script("evaluate.py", "--model_dir", experiment, "--data_dir", data)
    best = json.loads((experiment / "metrics_val_best_weights.json").read_text())
    assert json.loads((experiment / "metrics_val_best.json").read_text())["mIoU"] == best["mIoU"]
    assert "person" in result.stdout


@pytest.mark.slow
def test_sixteen_real_photos_are_learnt(voc2012, tmp_path):
    """Enough capacity, right labels, right loss: a network that is in order can learn a few photos by heart."""
    ids = ids_of(voc2012, "train")[:16]
    data = photos(tmp_path / "data", voc2012, train=ids, val=ids)
    experiment = make_experiment(
        tmp_path / "run",
        encoder="resnet18",
        image_size=96,
        stem_maxpool=True,
        gcn_padding="same",
        batch_size=8,
        num_epochs=120,
        optimizer="adamw",
        schedule="cosine",
        warmup_epochs=5,
    )
    run_train(experiment, data)
    best = json.loads((experiment / "metrics_val_best_weights.json").read_text())
    assert best["mIoU"] > 0.8
