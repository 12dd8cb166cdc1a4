"""A data set of another layout than VOC's: Cityscapes', in small files made here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_experiment, run_script
from PIL import Image

from model import UserError, layouts
from model.data_loader import SegmentationDataset
from model.layouts import CITYSCAPES, class_names, find_split
from model.voc import VOID

CITIES = {"train": {"aachen": 4, "bochum": 2}, "val": {"munster": 2}, "test": {"berlin": 1}}


def make_cityscapes(folder: Path) -> Path:
    """Photos of 64 x 32 pixels, grey as their label: each column of a mask has one of the 34 labels."""
    labels = np.tile(np.arange(64) % 34, (32, 1)).astype(np.uint8)
    for split, cities in CITIES.items():
        for city, count in cities.items():
            for part in ("leftImg8bit", "gtFine"):
                (folder / part / split / city).mkdir(parents=True)
            for frame in range(count):
                stem = f"{city}_000000_{frame:06}"
                photo = Image.fromarray(np.repeat(labels[..., None] * 7, 3, axis=2))
                photo.save(folder / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
                if split != "test":
                    Image.fromarray(labels).save(folder / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png")
                    (folder / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")
    return folder


@pytest.fixture
def streets(tmp_path) -> Path:
    return make_cityscapes(tmp_path / "cityscapes")


def load(folder: Path, split: str = "train", **options) -> SegmentationDataset:
    names = list(CITYSCAPES)
    return SegmentationDataset(find_split("cityscapes", folder, split), class_names=names, image_size=64, **options)


def test_photos_and_masks_are_found_in_every_city(streets):
    split = find_split("cityscapes", streets, "train", masks_required=True)
    assert split.ids[::5] == ["aachen_000000_000000", "bochum_000000_000001"] and len(split.ids) == 6
    assert split.images[0] == streets / "leftImg8bit/train/aachen/aachen_000000_000000_leftImg8bit.png"
    assert split.masks[-1] == streets / "gtFine/train/bochum/bochum_000000_000001_gtFine_labelIds.png"
    assert len(split.class_names) == 19 and split.class_names[:2] == ["road", "sidewalk"]


def test_labels_become_train_ids_and_the_ignored_ones_void(streets):
    (labels,) = {tuple(mask[0].tolist()) for _, mask in (load(streets)[index] for index in range(6))}
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12}
    train_ids |= {26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert labels == tuple(train_ids.get(column % 34, VOID) for column in range(64))


def test_a_split_without_masks_and_another_number_of_classes_are_refused_by_name(streets):
    assert find_split("cityscapes", streets, "test").masks is None
    with pytest.raises(UserError, match=r"split test of .* has no masks: it can be predicted, not scored"):
        find_split("cityscapes", streets, "test", masks_required=True)
    with pytest.raises(UserError, match=r'Cityscapes names 19 classes, num_classes is 21; .* "num_classes": 19'):
        class_names(find_split("cityscapes", streets, "train"), 21)


def test_the_cache_follows_a_change_of_the_label_map(streets, monkeypatch):
    before = load(streets)
    assert before.cache_file.parent == streets / ".cache"
    monkeypatch.setitem(layouts.CITYSCAPES, "road", 6)  # "ground", which is void
    after = load(streets)
    assert after.cache_file != before.cache_file and after[0][1][0, 6] == 0 and after[0][1][0, 7] == VOID


def test_a_mistake_in_the_data_is_one_line(streets):
    mask = find_split("cityscapes", streets, "train").masks[0]
    Image.fromarray(np.full((32, 64), 34, np.uint8)).save(mask)
    with pytest.raises(UserError, match=f"{mask}: 34 is not in the data set's label_map"):
        load(streets)
    mask.unlink()
    with pytest.raises(UserError, match=f"split train of {streets}: no mask {mask}"):
        load(streets)
    for folder, split in ((streets, "trian"), (streets / "gtFine", "train")):
        with pytest.raises(UserError, match=r"no photo .*_leftImg8bit\.png; give Cityscapes' folder with --data_dir"):
            load(folder, split)


def test_train_and_evaluate(streets, tmp_path):
    experiment = make_experiment(tmp_path / "run", dataset="cityscapes", num_classes=19, num_epochs=1)
    run_script("train.py", "--model_dir", experiment, "--data_dir", streets)
    run_script("evaluate.py", "--model_dir", experiment, "--original_size")  # on the data that it was trained on
    metrics = json.loads((experiment / "metrics_val_best_original_size.json").read_text())
    assert list(metrics["IoU"]) == list(CITYSCAPES) and metrics["images"] == 2
    predictions = tmp_path / "predictions"
    flags = ("--model_dir", experiment, "--split", "test", "--save_predictions", predictions)
    assert "has no masks and is not scored" in run_script("evaluate.py", *flags).stdout
    assert [path.name for path in (predictions / "test").iterdir()] == ["berlin_000000_000000.png"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ids": ["a/b", "c"]}, "ids name files, and 'a/b' is no name of a file"),
        ({"ids": ["a", "a"]}, "has the photo a more than once"),
        ({"ids": ["a"], "images": [Path("nowhere")]}, "split val of data: no photo nowhere"),
        ({"images": []}, "split val of data has 2 ids, 0 photos, 0 masks"),
    ],
    ids=str,
)
def test_a_mistake_in_a_new_layout_is_one_line(monkeypatch, changed, said):
    options = {"ids": ["a", "b"], "images": [Path(__file__)] * 2, "masks": None} | changed
    monkeypatch.setitem(layouts.LAYOUTS, "new", lambda data_dir, name: layouts.Split(name, **options))
    with pytest.raises(UserError, match=re.escape(said)):
        find_split("new", "data", "val")
