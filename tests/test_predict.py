import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_experiment, run_script
from PIL import Image

import predict
from engine import checkpoints
from model import UserError
from model.inference import Segmenter
from model.photos import read_photo
from model.sample import draw_scene
from model.voc import CLASS_NAMES
from predict import find_photos


@pytest.fixture
def run_predict(monkeypatch, capsys):
    """Run predict.py's main in this process: its status, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args)])
        status = predict.main(predict.parse_args())
        return status, *capsys.readouterr()

    return run


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


@pytest.mark.parametrize("tile", [None, 48])
def test_every_photo_gets_three_files_and_one_that_cannot_be_read_a_line(
    run_predict, experiment, photos, tmp_path, tile
):
    (photos / "aa.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    (photos / "nowhere.jpg").symlink_to("gone.jpg")
    out = tmp_path / "out"
    flags = ["--tile", tile] if tile else []
    status, stdout, stderr = run_predict(photos, "--model_dir", experiment, "--output_dir", out, *flags)
    assert (status, stdout) == (1, f"3 of 5 photos -> {out}\n")
    broken, absent = stderr.splitlines()
    assert "aa.jpg: cannot be read as an image" in broken and "nowhere.jpg: no such file" in absent
    names = ("a", "b", "deeper/a")
    found = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert found == sorted(name + suffix for name in names for suffix in (".png", ".json", "_overlay.png"))
    for name, source in zip(names, ("a.jpg", "b.PNG", "deeper/a.webp"), strict=True):
        picture = Image.open(out / f"{name}.png")
        prediction = np.array(picture)
        assert picture.mode == "P"
        assert np.array_equal(prediction, expected_prediction(experiment, photos / source, tile=tile))
        record = json.loads((out / f"{name}.json").read_text())
        assert (record["photo"], record["width"], record["height"]) == (str(photos / source), *picture.size)
        areas = {label: area["pixels"] for label, area in record["areas"].items()}
        indices, counts = np.unique(prediction, return_counts=True)
        assert areas == {CLASS_NAMES[index]: count for index, count in zip(indices, counts, strict=True)}
        assert sum(area["share"] for area in record["areas"].values()) == pytest.approx(1)
        overlay = Image.open(out / f"{name}_overlay.png")
        assert overlay.width >= picture.width and overlay.height > picture.height  # the legend


def test_files_folders_and_patterns_are_found_once(photos, tmp_path):
    out = tmp_path / "out"
    all_names = {"a", "b", "deeper/a"}
    assert find_photos([str(photos / "a.jpg")], out) == {Path("a"): photos / "a.jpg"}
    assert set(find_photos([str(photos / "*.[jP]*")], out).values()) == {photos / "a.jpg", photos / "b.PNG"}
    assert set(map(str, find_photos([str(photos)], out))) == all_names
    given = [str(photos / "**"), str(photos), str(photos / "a.jpg")]
    assert len(find_photos(given, out)) == 3
    odd = shutil.copy(photos / "a.jpg", photos / "odd[1].jpg")
    assert set(find_photos([str(odd)], out).values()) == {odd}
    shutil.copy(photos / "a.jpg", photos / "a.jpeg")
    assert set(map(str, find_photos([str(photos)], out))) == {"a_jpg", "a_jpeg", "b", "deeper/a", "odd[1]"}


def test_links_to_folders_are_followed_and_never_in_a_circle(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(photos / "a.jpg", elsewhere / "linked.jpg")
    (photos / "aaa").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    assert set(map(str, find_photos([str(photos)], tmp_path / "out"))) == {"a", "b", "deeper/a", "aaa/linked"}
    assert len(find_photos([str(photos)], elsewhere)) == 3, "what lies in output_dir are results"


def test_earlier_results_are_not_photos(photos):
    shutil.copytree(photos / "deeper", photos / "predictions")
    assert len(find_photos([str(photos)], photos / "predictions")) == 3
    assert len(find_photos([str(photos)], photos / "other")) == 4


def test_results_never_replace_photos_or_one_another(photos, tmp_path):
    for given in (photos / "b.PNG", photos):
        with pytest.raises(UserError, match=r"results would lie beside the photo .*; choose another"):
            find_photos([str(given)], photos)
    (tmp_path / "more").mkdir()
    other = shutil.copy(photos / "a.jpg", tmp_path / "more")
    with pytest.raises(UserError, match=r"two photos would both have the result .*a_jpg\.png"):
        find_photos([str(photos / "a.jpg"), str(other)], tmp_path / "out")
    shutil.copy(photos / "a.jpg", photos / "a_overlay.jpg")
    with pytest.raises(UserError, match=r"both have the result .*a_overlay\.png"):
        find_photos([str(photos)], tmp_path / "out")


def test_a_mistake_is_one_line_and_leaves_nothing(experiment, photos, tmp_path):
    flags = "--model_dir", experiment, "--output_dir", tmp_path / "out"
    for args, said in ((("nowhere.jpg",), "nowhere.jpg: no photo is there"), (("--tile", 8), "--tile 8: a tile has")):
        stderr = run_script("predict.py", photos, *args, *flags, check=2).stderr
        assert said in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_are_the_checkpoints_and_data_must_have_them(experiment, trained, tmp_path):
    names = [f"kind {index}" for index in range(21)]
    file = experiment / "best.pth.tar"
    checkpoint = checkpoints.load_checkpoint(file) | {"class_names": names}
    file.unlink()  # a link to the one that other tests read
    torch.save(checkpoint, file)
    assert predict.load(experiment, device="cpu")[1] == names
    with pytest.raises(UserError, match=r'class 0 is "kind 0" in .*, "background" in'):
        predict.load(experiment, device="cpu", data_dir=trained[1])
    with pytest.raises(UserError, match="gone holds no data set"):
        predict.load(experiment, device="cpu", data_dir=tmp_path / "gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "flags", "height"),
    [(64, [], 5000), (64, ["--tile", "1024"], 5000), (512, ["--tile", "512"], 800)],  # 5000 rows would take minutes
    ids=str,
)
def test_photos_of_40_megapixels_stay_under_two_gigabytes(trained, tmp_path, size, flags, height):
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", image_size=size)
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
