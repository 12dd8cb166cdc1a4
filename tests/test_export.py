import argparse
import copy
import io
import itertools
import json
import math
import os
import random
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, make_data, make_experiment, run_script
from PIL import Image
from PIL.ExifTags import Base
from torch import nn

import export
from engine import checkpoints, run
from model import UserError
from model.encoders import ENCODERS
from model.inference import Segmenter
from model.net import FCN_GCN, HEADS
from model.photos import read_photo
from model.transforms import IMAGENET_MEAN, IMAGENET_STD, PADDING, RESIZES, squares
from params import Params
from utils import RunFailed


def run_export(experiment, data, *args, **options):
    return run_script("export.py", "--model_dir", experiment, "--data_dir", data, *args, **options)


def export_here(experiment, data, **flags) -> None:
    """Run export.py's main in this process."""
    flags = {"model_dir": experiment, "data_dir": data, "restore_file": "best", "output": None, "device": "cpu"} | flags
    export.main(argparse.Namespace(**flags))


def difference(session, model: nn.Module, size: tuple[int, int, int]) -> float:
    """The largest between the logits of both for a batch of noise, as a share of the largest logit."""
    images = torch.randn(size[0], 3, *size[1:])
    with torch.inference_mode():
        expected = model(images).numpy()
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert logits.shape == expected.shape
    return np.abs(logits - expected).max().item() / np.abs(expected).max().item()


SIZES = [(1, 32, 32), (3, 33, 46), (1, 45, 32), (2, 130, 71)]  # none of them is one that export.py has seen


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with averaged weights and what export.py makes of it: (experiment, data, all that it says)."""
    folder = tmp_path_factory.mktemp("exported")
    data = make_data(folder / "data", train=4, val=2)
    options = {"num_epochs": 1, "batch_size": 2, "ema_decay": 0.5, "learning_rate": 0.01, "resize": "letterbox"}
    experiment = make_experiment(folder / "run", encoder="resnet18", **options)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data)
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        export_here(experiment, data)
    return experiment, data, said.getvalue()


@pytest.fixture(scope="module")
def networks(exported):
    """The session of the exported file, and the network with either weights of the checkpoint."""
    experiment, _, _ = exported
    checkpoint = checkpoints.load_checkpoint(experiment / "last.pth.tar")  # after one epoch, the best
    models = [FCN_GCN(encoder="resnet18", pretrained=False).eval() for _ in range(2)]
    for model, key in zip(models, ("ema_state_dict", "state_dict"), strict=True):
        model.load_state_dict(checkpoint[key])
    return export.open_onnx(experiment / "best.onnx"), *models


def test_one_file_appears_and_the_check_of_four_batches_is_printed(exported):
    experiment, data, said = exported
    assert {path.name for path in experiment.iterdir()} - {"best.onnx", ".lock"} == {
        *("params.json", "run.json", "train.log", "history.jsonl", "samples.png", "curves.png"),
        *("best.pth.tar", "last.pth.tar"),
        *("metrics_val_best_weights.json", "metrics_val_last_weights.json"),
    }
    rows = re.findall(r"^\| (\d) x 3 x (\d+) x (\d+) +\|", said, flags=re.MULTILINE)
    assert rows == [("1", "32", "32"), ("2", "32", "32"), ("1", "41", "33"), ("2", "41", "33")]
    photo = data / "JPEGImages" / "val0.jpg"
    assert said.endswith(f"PyTorch on {photo}, epoch 1 -> {experiment / 'best.onnx'}\n")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_file_takes_batches_of_any_size(networks, size):
    session, averaged, _ = networks
    assert difference(session, averaged, size) < 1e-4


def test_the_averaged_weights_are_exported(networks):
    session, _, last = networks
    assert difference(session, last, (1, 64, 64)) > 1e-3


def test_the_file_says_what_it_is_and_nothing_of_the_machine(exported):
    experiment, data, _ = exported
    model = onnx.load(experiment / "best.onnx")
    assert [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ] == [["batch", 3, "height", "width"], ["batch", 21, "height", "width"]]
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("images", "logits")
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about.pop("class_names")[:2] == ["background", "aeroplane"]
    assert about == {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "image_size": 32,
        "resize": "letterbox",
        "padding": list(PADDING),
        "multiple": 1,
        "epoch": 1,
        "git_commit": run.git_commit(),
    }
    model.graph.ClearField("initializer")
    assert not [
        path
        for path in (ROOT, data, Path(torch.__file__).parent)
        if str(path).encode() in bytes(model.SerializeToString())
    ]


@pytest.mark.parametrize(
    ("resize", "size", "turned", "seen"),
    [
        ("squash", (90, 53), 1, (32, 32)),
        ("letterbox", (90, 53), 6, (32, 19)),
        ("letterbox", (4000, 1), 1, (1, 32)),
    ],
    ids=str,
)
def test_the_example_of_the_page_finds_the_classes_that_evaluate_scores(
    exported, networks, tmp_path, monkeypatch, capsys, resize, size, turned, seen
):
    experiment, data, _ = exported
    (tmp_path / "experiments" / "quickstart").mkdir(parents=True)
    model = onnx.load(experiment / "best.onnx")
    next(entry for entry in model.metadata_props if entry.key == "resize").value = json.dumps(resize)
    onnx.save(model, tmp_path / "experiments" / "quickstart" / "best.onnx")
    (exif := Image.Exif())[Base.Orientation] = turned
    Image.open(data / "JPEGImages" / "val1.jpg").resize(size).save(tmp_path / "photo.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "EXPORT.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1], names)

    photo = read_photo(tmp_path / "photo.jpg")
    segmenter = Segmenter(networks[1], torch.device("cpu"), image_size=32, resize=resize, channels_last=False)
    ((logits,),) = segmenter.logits(squares([photo], [32], resize), [photo.size])
    expected = logits.argmax(0).numpy()
    assert names["classes"].shape == expected.shape == seen
    assert (names["classes"] == expected).mean() > 0.999
    assert "background" in capsys.readouterr().out or 0 not in expected


def other_bias(value: float):
    """What makes of an exported file one with another bias of the last layer."""

    def change(source: Path, file: Path) -> None:
        model = onnx.load(source)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "br9.conv2.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(value), bias.name))
        onnx.save(model, file)

    return change


def half_a_file(source: Path, file: Path) -> None:
    file.write_bytes(source.read_bytes()[: 2**20])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_bias(0.25), r"differ by 0\.25 where the largest logit is .* not kept"),
        (other_bias(math.nan), "differ by nan"),
        (half_a_file, "cannot be run .* not kept"),
    ],
    ids=("bias", "nan", "half"),
)
def test_a_file_that_fails_its_check_is_not_kept(exported, tmp_path, monkeypatch, change, said):
    experiment, data, _ = exported
    monkeypatch.setattr(export, "write_onnx", lambda model, file, metadata: change(experiment / "best.onnx", file))
    (tmp_path / "x.onnx").write_text("what was there")
    with pytest.raises(RunFailed, match=said):
        export_here(experiment, data, output=tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == ["x.onnx"]
    assert (tmp_path / "x.onnx").read_text() == "what was there"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model_dir": Path("nowhere"), "output": Path("x.onnx")}, r"no checkpoint nowhere/best\.pth\.tar"),
        ({"restore_file": "third"}, r"no checkpoint .*third\.pth\.tar"),
        ({"output": Path("best.pth.tar")}, r"--output best\.pth\.tar: .* ends in \.onnx"),
        ({"output": Path("nowhere/x.onnx")}, "--output nowhere/x.onnx: .* in a folder that is there"),
        ({"data_dir": Path("nothing")}, "nothing holds no data set"),
    ],
    ids=str,
)
def test_a_mistake_is_named(exported, flags, said):
    experiment, data, _ = exported
    with pytest.raises(UserError, match=said):
        export_here(experiment, data, **flags)


def test_without_the_packages_help_answers_and_one_line_says_what_to_install(tmp_path):
    missing = ("onnx", "onnxscript", "onnxruntime")
    assert "--output" in run_script("export.py", "--help", without=missing).stdout
    result = run_export(tmp_path, tmp_path, check=2, without=missing)
    assert result.stderr.startswith("export.py: error: ")
    assert result.stderr.endswith(": pip install --upgrade -r requirements-export.txt\n")
    assert result.stderr.count("\n") == 1


def test_starting_over_deletes_what_was_exported_but_not_under_a_name_of_the_users(tmp_path):
    for name in ("best.onnx", "last.onnx", "mine.onnx"):
        (tmp_path / name).touch()
    assert [path.name for path in run.existing(tmp_path)] == ["last.onnx", "best.onnx"]


# ---------------------------------------------------------------------------------------- architectures


def build(**options) -> FCN_GCN:
    """A network whose batch norms have seen something, so that logits are of moderate size."""
    torch.manual_seed(0)
    model = FCN_GCN(**{"num_classes": 4, "pretrained": False} | options)
    for _ in range(2):
        model.train()(torch.randn(2, 3, 64, 64))
    return model.eval()


def test_an_encoder_of_timm_is_exported_for_sides_that_are_multiples(tmp_path):
    """With TensorFlow's padding made static, the network gives the same logits; "image_size" is checked."""
    model = build(encoder="timm/tf_mobilenetv3_small_minimal_100")
    static, images = copy.deepcopy(model), torch.randn(2, 3, 96, 64)
    export.pad_statically(static)
    assert not [layer for layer in static.modules() if type(layer).__name__.endswith("Same")]
    with torch.inference_mode():
        torch.testing.assert_close(static(images), model(images))
    make_data(tmp_path / "data", train=1, val=1)
    params, photo = Params(encoder="timm/x", image_size=64), tmp_path / "data" / "JPEGImages" / "val0.jpg"
    assert [tuple(x.shape) for x in export.photo_batches(photo, model, params)] == [(2, 3, 64, 64), (2, 3, 96, 32)]
    with pytest.raises(UserError, match=r'"image_size" is 72, and an exported .* takes multiples of 32'):
        export.photo_batches(photo, model, replace(params, image_size=72))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"gcn_padding": "same", "kernel_size": 3, "stem_maxpool": True, "boundary_refinement": False}], ids=str
)
def test_heads_are_exported_after_a_thin_encoder(tmp_path, options):
    """One convolution a stage: the maps are as large as ever, and the export takes a few seconds less."""
    model = build(**options)
    widths = (64, 256, 512, 1024, 2048)
    for stage in range(4):
        layer = nn.Conv2d(widths[stage], widths[stage + 1], 1, stride=min(stage, 1) + 1)
        setattr(model, f"layer{stage + 1}", layer)
    export.write_onnx(model, tmp_path / "x.onnx", {})
    session = export.open_onnx(tmp_path / "x.onnx")
    for size in SIZES:
        assert difference(session, model, size) < 1e-4, size


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gcn_padding": "same"},
        {"stem_maxpool": True},
        {"boundary_refinement": False},
        {"kernel_size": 3, "num_classes": 2},
        {"kernel_size": 15, "gcn_padding": "same"},
        {"kernel_size": 63, "stem_maxpool": True},
        {"dropout_rate": 0.5},
        {"head": "conv1x1", "num_classes": 255},
        {"head": "conv"},
        {"head": "conv", "kernel_size": 3, "num_classes": 2},
        {"head": "conv", "kernel_size": 5, "stem_maxpool": True},
        {"head": "stack", "kernel_size": 5},
        {"encoder": "timm/tf_mobilenetv3_small_minimal_100"},
    ],
    ids=str,
)
def test_every_architecture_is_exported(tmp_path, options):
    model = build(**options)
    export.write_onnx(model, tmp_path / "x.onnx", {})
    session = export.open_onnx(tmp_path / "x.onnx")
    multiple = model.encoder.exported_multiple
    for size in (*SIZES, (1, 224, 224), (1, 57, 331)):
        size = (size[0], *(-(-side // multiple) * multiple for side in size[1:]))
        assert difference(session, model, size) < 1e-4, size


# ---------------------------------------------------------------------------------------- any experiment


CHOICES = {
    "resize": tuple(RESIZES),
    "augment": (False, True),
    "head": tuple(HEADS),
    "boundary_refinement": (False, True),
    "stem_maxpool": (False, True),
    "freeze_encoder_statistics": (False, True),
    "activation_checkpointing": (False, True),
    "precision": ("fp32", "bf16"),
}
TIMM_MODELS = ("tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050", "hrnet_w18_small", "pvt_v2_b0")
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("encoder", [*ENCODERS, *(f"timm/{name}" for name in TIMM_MODELS)])
def test_every_encoder_goes_through_in_any_combination(tmp_path, encoder, number):
    """Train a step, evaluate, export and predict, as a user would; what an encoder refuses is set back as it says."""
    drawn = random.SystemRandom().choice(COMBINATIONS) | {"encoder": encoder}
    print(drawn)  # pytest shows it where this fails
    options = {"num_epochs": 1, "batch_size": 2, "image_size": 64}
    # After one step from scratch the statistics of batch norm fit nothing, and a deep encoder would overflow.
    options |= {"zero_init_residual": encoder in ENCODERS}
    data = make_data(tmp_path / "data", train=2, val=2)
    for id_, size in (("val0", (90, 40)), ("val1", (33, 70))):
        for file in (data / "JPEGImages" / f"{id_}.jpg", data / "SegmentationClass" / f"{id_}.png"):
            with Image.open(file) as picture:
                picture.resize(size, Image.Resampling.NEAREST).save(file)
    while True:
        experiment = make_experiment(tmp_path / "run", **options, **drawn)
        flags = "--model_dir", experiment, "--data_dir", data
        result = run_script("train.py", *flags, check=None)
        if result.returncode == 0:
            break
        refused = re.search(r'"(\w+)" is not for the encoder .* set it to false$', result.stderr)
        assert refused and drawn[refused[1]] and not list(experiment.glob("*.log")), result.stderr
        drawn[refused[1]] = False
    run_script("evaluate.py", *flags, "--original_size", "--save_overlays", 1)
    run_script("export.py", *flags)
    run_script("predict.py", data / "JPEGImages", "--model_dir", experiment, "--output_dir", tmp_path / "out")
    with Image.open(tmp_path / "out" / "val1.png") as prediction:
        assert prediction.size == (33, 70)


def test_a_network_can_be_exported_where_its_data_set_is_not(experiment, tmp_path, monkeypatch):
    record = json.loads((experiment / "run.json").read_text()) | {"data_dir": str(tmp_path / "gone")}
    (experiment / "run.json").unlink()  # a link to the one that other tests read
    (experiment / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    said = {}
    monkeypatch.setattr(export, "write_onnx", lambda model, file, metadata: said.update(metadata))
    monkeypatch.setattr(export, "open_onnx", lambda file: 1 / 0)  # the rest is as for other photos
    monkeypatch.setattr(sys, "argv", ["export.py", "--model_dir", str(experiment)])
    with pytest.raises(ZeroDivisionError):
        export.main(export.parse_args())
    assert json.loads(said["class_names"])[1] == "aeroplane"
