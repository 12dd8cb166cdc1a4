import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_experiment, rename_classes, run_script
from PIL import Image

import utils
from engine import checkpoints
from model.inference import Segmenter
from model.photos import read_photo
from model.sample import draw_scene
from model.voc import CLASS_NAMES, palette
from predict import find_photos


def run_predict(experiment, *args, **options):
    return run_script("predict.py", *args, "--model_dir", experiment, **options)


def expected_prediction(experiment, file, *, tile=None) -> np.ndarray:
    model, _, _ = checkpoints.load_network(experiment, "best", torch.device("cpu"))
    return Segmenter(model, torch.device("cpu"), image_size=32).segment(read_photo(file), tile=tile).numpy()


@pytest.fixture
def photos(tmp_path):
    """A folder with photos at two levels and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for index, name in enumerate(("a.jpg", "b.PNG", "deeper/a.webp")):
        draw_scene(np.random.default_rng(index))[0].resize((90 + index, 70)).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    return folder


def test_every_photo_of_a_folder_gets_three_files(experiment, photos, tmp_path):
    out = tmp_path / "out"
    stdout = run_predict(experiment, photos, "--output_dir", out).stdout
    assert "3 of 3 photos" in stdout
    found = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    names = ("a", "b", "deeper/a")
    assert found == sorted(name + suffix for name in names for suffix in (".png", ".json", "_overlay.png"))
    for name, source in zip(names, ("a.jpg", "b.PNG", "deeper/a.webp"), strict=True):
        picture = Image.open(out / f"{name}.png")
        prediction = np.array(picture)
        assert picture.mode == "P"
        assert np.array_equal(prediction, expected_prediction(experiment, photos / source))
        record = json.loads((out / f"{name}.json").read_text())
        assert (record["photo"], record["width"], record["height"]) == (str(photos / source), *picture.size)
        areas = {label: area["pixels"] for label, area in record["areas"].items()}
        indices, counts = np.unique(prediction, return_counts=True)
        assert areas == {CLASS_NAMES[index]: count for index, count in zip(indices, counts, strict=True)}
        assert sum(area["share"] for area in record["areas"].values()) == pytest.approx(1)
        overlay = Image.open(out / f"{name}_overlay.png")
        assert overlay.width >= picture.width
        assert overlay.height > picture.height  # the legend


def test_a_broken_photo_is_reported_and_the_others_go_on(experiment, trained, photos, tmp_path):
    (photos / "aa.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    shutil.copy(photos / "a.jpg", photos / f"{'long' * 62}.jpg")  # a name that leaves no room for _overlay.png
    assert checkpoints.load_checkpoint(experiment / "best.pth.tar")["class_names"] == list(CLASS_NAMES)
    kinds = [f"kind {index}" for index in range(21)]
    data = rename_classes(experiment, trained[1], tmp_path / "data", kinds)
    utils.write_json(experiment / "run.json", {"data_dir": str(data)})
    result = run_predict(experiment, photos, "--output_dir", tmp_path / "out", "--tile", 48, check=1)
    assert "3 of 5 photos" in result.stdout
    assert result.stderr.count("\n") == 2
    assert "File name too long" in result.stderr
    assert "aa.jpg: cannot be read as an image" in result.stderr
    prediction = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(prediction, expected_prediction(experiment, photos / "a.jpg", tile=48))
    assert not np.array_equal(prediction, expected_prediction(experiment, photos / "a.jpg"))
    areas = json.loads((tmp_path / "out" / "a.json").read_text())["areas"]
    assert all(name.startswith("kind ") for name in areas)  # names are the checkpoint's
    assert Image.open(tmp_path / "out" / "a.png").getpalette() == palette(kinds).flatten().tolist()


def test_what_was_skipped_is_said_also_where_the_next_photo_cannot_be_written(experiment, photos, tmp_path):
    (photos / "0.jpg").write_bytes(b"no photo")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    result = run_predict(experiment, photos, "--output_dir", tmp_path / "out", check=1)
    skipped, error = result.stderr.splitlines()
    assert "0.jpg: cannot be read as an image" in skipped and skipped.endswith("; skipped")
    assert error.startswith("predict.py: error: ") and "a.png" in error


def test_files_folders_and_patterns_are_found(photos, tmp_path):
    out = tmp_path / "out"
    assert set(find_photos([str(photos / "a.jpg")], out).values()) == {photos / "a.jpg"}
    assert set(find_photos([str(photos / "*.[jP]*")], out).values()) == {photos / "a.jpg", photos / "b.PNG"}
    assert set(map(str, find_photos([str(photos)], out))) == {"a", "b", "deeper/a"}
    assert len(find_photos([str(photos), str(photos / "a.jpg")], out)) == 3  # once, though named twice
    odd = photos / "odd[1].jpg"
    shutil.copy(photos / "a.jpg", odd)
    assert set(find_photos([str(odd)], out).values()) == {odd}


def test_links_to_folders_are_followed_and_never_in_a_circle(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(photos / "a.jpg", elsewhere / "linked.jpg")
    (photos / "aaa").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    (photos / "again").symlink_to(photos / "deeper")
    assert set(map(str, find_photos([str(photos)], tmp_path / "out"))) == {"a", "b", "deeper/a", "aaa/linked"}
    assert len(find_photos([str(photos)], elsewhere)) == 3, "what lies in output_dir are results"


def test_what_is_called_a_photo_and_is_none_is_reported(experiment, photos, tmp_path):
    (photos / "circle.jpg").symlink_to("circle.jpg")
    (photos / "nowhere.jpg").symlink_to("gone.jpg")
    os.mkfifo(photos / "pipe.jpg")
    result = run_predict(experiment, photos, photos / "circle.jpg", "--output_dir", tmp_path / "out", check=1)
    assert "3 of 6 photos" in result.stdout
    assert len(result.stderr.splitlines()) == 3
    assert "circle.jpg: " in result.stderr and "nowhere.jpg: no such file; skipped" in result.stderr
    assert "pipe.jpg is not a regular file (a FIFO); " in result.stderr


def test_earlier_results_are_not_photos(photos):
    shutil.copytree(photos / "deeper", photos / "predictions")
    (photos / "predictions" / "a.png").touch()
    assert len(find_photos([str(photos)], photos / "predictions")) == 3
    assert len(find_photos([str(photos)], photos / "other")) == 5


def test_no_photo_is_predicted_twice(photos, tmp_path):
    given = [str(photos / "**"), str(photos), str(photos / "a.jpg")]
    assert sorted(find_photos(given, tmp_path / "out").values()) == [
        photos / "a.jpg",
        photos / "b.PNG",
        photos / "deeper" / "a.webp",
    ]


def test_photos_that_differ_in_their_suffix_keep_it(photos, tmp_path):
    shutil.copy(photos / "a.jpg", photos / "a.jpeg")
    assert set(map(str, find_photos([str(photos)], tmp_path / "out"))) == {"a_jpg", "a_jpeg", "b", "deeper/a"}


def test_results_never_replace_photos_or_one_another(photos, tmp_path):
    for given in (photos / "b.PNG", photos):
        with pytest.raises(utils.UserError, match=r"results would lie beside the photo .*; choose another"):
            find_photos([str(given)], photos)
    (tmp_path / "more").mkdir()
    other = shutil.copy(photos / "a.jpg", tmp_path / "more")
    with pytest.raises(utils.UserError, match="two photos would both have the result a"):
        find_photos([str(photos / "a.jpg"), str(other)], tmp_path / "out")
    shutil.copy(photos / "a.jpg", photos / "a_overlay.jpg")
    with pytest.raises(utils.UserError, match=r"both have the result .*a_overlay\.png"):
        find_photos([str(photos)], tmp_path / "out")


def test_a_mistake_is_one_line_and_leaves_nothing(experiment, photos, tmp_path):
    args = [photos, "nowhere.jpg", "--output_dir", tmp_path / "out"]
    stderr = run_predict(experiment, *args, check=2).stderr
    assert "nowhere.jpg: no photo is there" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("loop", "loop/below"):
        stderr = run_predict(experiment, photos, "--output_dir", tmp_path / folder, check=2).stderr
        assert "loop" in stderr and stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "flags", "height"),
    [(64, [], 5000), (64, ["--tile", "1024"], 5000), (512, ["--tile", "512"], 800)],  # 5000 rows would take minutes
    ids=str,
)
def test_photos_of_40_megapixels_stay_under_two_gigabytes(trained, tmp_path, size, flags, height):
    experiment = make_experiment(tmp_path / "run", image_size=size)
    (experiment / "best.pth.tar").symlink_to(trained[0] / "best.pth.tar")
    scene = draw_scene(np.random.default_rng(0))[0]
    (tmp_path / "photos").mkdir()
    scene.resize((8000, height)).save(tmp_path / "photos" / "large.jpg", quality=80)
    for name in ("second.jpg", "third.jpg"):
        shutil.copy(tmp_path / "photos" / "large.jpg", tmp_path / "photos" / name)
    command = [sys.executable, "predict.py", tmp_path / "photos", "--model_dir", experiment, *flags]
    # Started from a small process, for what the parent has in memory at the start counts as a peak of the child.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", measure, *command, "--output_dir", tmp_path / "out"]
    peak = int(subprocess.check_output(command, cwd=ROOT).split()[-1])  # KiB
    assert peak < 2 * 2**20
    assert Image.open(tmp_path / "out" / "large.png").size == (8000, height)
