import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import as_network
from PIL import Image
from torch import nn

import explain
from explain import Field, class_maps, level, mean_field, receptive_field, stage_numbers
from model import UserError
from model.inference import Segmenter
from model.layouts import find_split
from model.voc import CLASS_NAMES, VOID
from predict import load

CPU = torch.device("cpu")


@pytest.fixture
def run_explain(monkeypatch, capsys):
    """Run explain.py's main in this process: what it says."""

    def run(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, args)])
        explain.main(explain.parse_args())
        return capsys.readouterr().out

    return run


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def segmenter_of(*kernels: int, resize: str = "squash", dilation: int = 1) -> Segmenter:
    """Convolutions with kernels of these sides, one after the other."""
    widths = [3] * len(kernels) + [4]
    layers = [
        nn.Conv2d(widths[place], widths[place + 1], side, padding=dilation * (side // 2), dilation=dilation)
        for place, side in enumerate(kernels)
    ]
    return Segmenter(as_network(nn.Sequential(*layers)), CPU, image_size=64, resize=resize, channels_last=False)


@pytest.mark.parametrize(
    ("kernels", "dilation", "reach"), [((1,), 1, 0), ((3, 3), 1, 2), ((7, 3), 1, 4), ((3, 5), 2, 6)]
)
def test_nothing_lies_outside_of_the_receptive_field_that_arithmetic_gives(kernels, dilation, reach):
    torch.manual_seed(0)
    field = receptive_field(segmenter_of(*kernels, dilation=dilation), noise(64, 64), (40, 21), 2)
    rows, columns = np.nonzero(field.energy)
    assert (field.at, field.scale) == ((21, 40), (1, 1))
    assert (rows.min(), rows.max()) == (21 - reach, 21 + reach)
    assert (columns.min(), columns.max()) == (40 - reach, 40 + reach)
    assert field.energy.sum() == pytest.approx(1, abs=1e-12)
    assert field.radius(1.0) <= reach * 2**0.5 + 1e-9
    if reach == 0:
        assert field.energy[21, 40] == 1


@pytest.mark.parametrize(
    ("size", "resize", "shape"), [((128, 96), "letterbox", (48, 64)), ((32, 96), "squash", (64, 64))]
)
def test_a_receptive_field_comes_back_in_the_shape_of_the_photo(size, resize, shape):
    torch.manual_seed(0)
    photo = noise(*size)
    segmenter = segmenter_of(3, resize=resize)
    field = receptive_field(segmenter, photo, (size[0] - 1, 0), 3)
    assert field.energy.shape == shape
    assert field.at == (0, shape[1] - 1)  # the corner of the photo, not of the square
    assert field.scale == pytest.approx((size[1] / shape[0], size[0] / shape[1]))
    assert np.array_equal(np.argwhere(field.energy).max(0), (1, shape[1] - 1))
    reached = segmenter.model[0].weight[3].detach().double().square().sum(0)[:, :2]  # what lies in the square
    above = float(reached[0].sum() / reached.sum()) if resize == "letterbox" else 0
    assert field.in_padding == pytest.approx(above, abs=1e-6)


def test_a_result_that_does_not_depend_on_the_photo_is_named():
    segmenter = segmenter_of(1)
    nn.init.zeros_(segmenter.model[0].weight)
    with pytest.raises(UserError, match="does not depend on the photo"):
        receptive_field(segmenter, noise(64, 64), (3, 3), 0)


def test_radius_and_level_hold_the_share_that_they_are_asked_for():
    energy = np.zeros((9, 9))
    energy[4, 4], energy[4, 7], energy[0, 4] = 0.5, 0.3, 0.2
    field = Field(energy, (4, 4), (2.0, 3.0))  # three columns are nine pixels, four rows eight
    assert (field.radius(0.5), field.radius(0.7), field.radius(0.95)) == (0, 8, 9)
    assert level(energy, 0.5) == 0.5 and level(energy, 0.8) == 0.3


@pytest.mark.parametrize("shape", [(10, 224), (224, 3)])
def test_a_panorama_has_a_field_too(shape):
    """Letterboxed it may be thinner than the blur is wide."""
    field = Field(np.full(shape, 1 / np.prod(shape)), (2, 1), (1.0, 1.0))
    assert field.smooth() == pytest.approx(field.energy)
    explain.field_figure({"a": (field, None)}, noise(*shape[::-1])).canvas.draw()


def test_the_mean_puts_every_logit_into_the_middle():
    energies = np.zeros((2, 6, 8))
    energies[0, 1, 2], energies[1, 5, 7] = 1, 1
    fields = [Field(energies[0], (1, 2), (1, 1), 0.5), Field(energies[1], (5, 7), (1, 1))]
    mean = mean_field(fields, 8)
    assert mean.in_padding == 0.25
    assert mean.energy[mean.at] == 1 and mean.energy.sum() == 1


def test_the_last_step_is_what_is_predicted_and_the_steps_add_up(experiment, data):
    segmenter, names = load(experiment)
    photo, mask = find_split("voc", data, "val").read(0, len(names))
    truth = np.array(mask)
    maps = class_maps(segmenter, photo)
    assert list(maps) == ["s4", "+ s3", "+ s2", "+ s1", "the result"]
    assert all(part.shape == truth.shape for of_step in maps.values() for part in of_step.values())
    assert np.array_equal(maps["the result"]["sum"], segmenter.segment(photo).numpy())
    assert np.array_equal(maps["s4"]["own"], maps["s4"]["sum"])
    numbers = stage_numbers(maps, truth, len(names))
    steps, valid = [*numbers.values()], (truth != VOID).sum()
    for before, after in pairwise(steps):
        gained = (after["turned_right"] - after["turned_wrong"]) * truth.size / valid
        assert after["pixel_accuracy"] - before["pixel_accuracy"] == pytest.approx(gained, abs=1e-9)


def test_hooks_do_not_stay(experiment):
    segmenter, _ = load(experiment)
    class_maps(segmenter, noise(32, 32))
    assert not any(part._forward_hooks for part in segmenter.model.modules())


def test_photos_of_val_are_drawn_by_lot_and_two_runs_give_the_same_bytes(run_explain, experiment, data, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        said = run_explain("--model_dir", experiment, "--data_dir", data, "--photos", 1, "--output_dir", folder)
        assert said == f"1 photos -> {folder}\n"
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    report = json.loads(files[0]["explain.json"])
    drawn = [f"{name}_{kind}.png" for name in report["photos"] for kind in ("stages", "receptive_field")]
    assert sorted([*drawn, "explain.json", "mean_receptive_field.png"]) == sorted(files[0])
    assert all(entry["held_against"] == "the truth" for entry in report["photos"].values())
    (mean,) = report["mean_receptive_field"].values()
    assert 0 < mean["radius_50%"] < mean["radius_95%"] and 0 < mean["area_50%"] < mean["area_95%"] <= 1


def test_the_data_are_those_that_the_run_was_trained_on_and_a_mask_of_void_is_no_truth(run_explain, trained, tmp_path):
    """As after params.json was edited for the next run, and for a photo that nobody has labelled."""
    folder, data = shutil.copytree(trained[0], tmp_path / "run"), shutil.copytree(trained[1], tmp_path / "data")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").unlink()
    (folder / "params.json").write_text(json.dumps(params | {"dataset": "sample", "train_split": "none"}))
    (data / "val.txt").write_text("val1\nval0\n")
    (data / "train.txt").unlink()  # as where SBD was not got: val needs it not
    mask = next((data / "SegmentationClass").glob("val1.*"))
    size = Image.open(mask).size
    mask.unlink()
    Image.new("L", size, VOID).save(mask)
    run_explain("--model_dir", folder, "--data_dir", data, "--output_dir", tmp_path / "out")
    photos = json.loads((tmp_path / "out" / "explain.json").read_text())["photos"]
    assert list(photos) == ["val1", "val0"], "in the order of the list"
    assert {name for name, entry in photos.items() if entry["held_against"] == "the result"} == {"val1"}


def test_a_photo_of_ones_own_needs_no_data_and_is_held_against_the_result(run_explain, experiment, tmp_path):
    photo, other, out = tmp_path / "$5 or $6.png", tmp_path / "$5 or $6_overlay.png", tmp_path / "out"
    noise(50, 40).save(photo)
    noise(50, 40).save(other)
    segmenter, names = load(experiment)
    labels = segmenter.segment(Image.open(photo)).numpy()
    y, x = np.argwhere(labels != labels[0, 0])[-1].tolist()
    run_explain(photo, other, "--model_dir", experiment, "--data_dir", tmp_path, "--at", x, y, "--output_dir", out)
    report = json.loads((out / "explain.json").read_text())
    entry = report["photos"]["$5 or $6"]
    assert (entry["held_against"], entry["at"]) == ("the result", [x, y])
    (found,) = entry["receptive_field"].values()
    assert found["class"] == found["predicted"] == names[labels[y, x]]
    assert entry["stages"]["the result"]["pixel_accuracy"] == 1
    assert "mean_receptive_field" not in report
    noise(50, 30).save(other)
    with pytest.raises(UserError, match=r"--at 40 35 is not in .*_overlay\.png, which is 50x30"):
        run_explain(photo, other, "--model_dir", experiment, "--at", 40, 35, "--output_dir", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists(), "said before anything is written"


def test_against_draws_both_networks(run_explain, experiment, data, tmp_path):
    out, photo = tmp_path / "out", data / "JPEGImages" / "val1.jpg"
    other = tmp_path / "other" / experiment.name  # of the same name
    other.parent.mkdir()
    other.symlink_to(experiment)
    run_explain(photo, "--model_dir", experiment, "--data_dir", data, "--against", other, "--output_dir", out)
    found = json.loads((out / "explain.json").read_text())["photos"]["val1"]["receptive_field"]
    assert list(found) == [str(experiment), str(other)]
    assert found[str(experiment)] == found[str(other)] and found[str(other)]["predicted"] in CLASS_NAMES
    heights = [Image.open(out / "val1_receptive_field.png").height]
    run_explain(photo, "--model_dir", experiment, "--data_dir", data, "--output_dir", out)
    assert heights[0] == pytest.approx(2 * Image.open(out / "val1_receptive_field.png").height, abs=2)
