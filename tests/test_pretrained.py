"""The trained network in the repository: it loads, segments photos that it has not seen, and is a start for others."""

import json

import numpy as np
import torch
from conftest import ROOT, make_data, make_experiment, run_script
from PIL import Image

from engine.checkpoints import load_checkpoint
from model.voc import CLASS_NAMES, VOID
from params import NEEDED_BY_WEIGHTS, Params
from predict import load

FOLDER = ROOT / "pretrained" / "voc2012_lite0"


def test_it_is_small_and_is_that_of_the_experiment():
    assert (FOLDER / "best.pth.tar").stat().st_size < 8e6
    recipe, params = (Params.load(folder / "params.json") for folder in (ROOT / "experiments" / FOLDER.name, FOLDER))
    for key in (*NEEDED_BY_WEIGHTS, "image_size"):
        assert getattr(recipe, key) == getattr(params, key), key
    checkpoint = load_checkpoint(FOLDER / "best.pth.tar")
    assert checkpoint["class_names"] == list(CLASS_NAMES)
    metrics = json.loads((FOLDER / "metrics_val_best_original_size.json").read_text())
    assert metrics["epoch"] == checkpoint["epoch"]


def test_it_segments_a_photo_without_a_data_set(tmp_path):
    data = make_data(tmp_path / "data", train=1, val=1)
    photo = data / "JPEGImages" / "val0.jpg"
    run_script("predict.py", photo, "--model_dir", FOLDER, "--output_dir", tmp_path / "out")
    segmenter, names = load(FOLDER, device="cpu")
    classes = segmenter.segment(Image.open(photo).convert("RGB"))
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "val0.png")), classes.numpy())
    assert names == list(CLASS_NAMES)


def test_photos_of_val_get_about_the_score_that_its_page_tells(voc2012):
    """Of the first forty of the half of val that chose no epoch: pixels of objects that are right."""
    segmenter, _ = load(FOLDER, device="cpu")
    ids = (ROOT / "docs" / "voc2012_subset" / "val2.txt").read_text().split()[:40]
    right = counted = 0
    for id_ in ids:
        photo = Image.open(voc2012 / "JPEGImages" / f"{id_}.jpg").convert("RGB")
        mask = torch.from_numpy(np.array(Image.open(voc2012 / "SegmentationClass" / f"{id_}.png")))
        objects = (mask != VOID) & (mask != 0)
        right += ((segmenter.segment(photo) == mask) & objects).sum().item()
        counted += objects.sum().item()
    assert right / counted > 0.6


def test_a_data_set_of_other_classes_begins_from_it(tmp_path):
    data = make_data(tmp_path / "data")
    recipe = json.loads((ROOT / "experiments" / "own_photos" / "params.json").read_text())
    small = {"image_size": 64, "batch_size": 3, "num_epochs": 2, "num_workers": 0, "num_classes": 22}
    experiment = make_experiment(tmp_path / "run", **recipe | small)
    flags = "--model_dir", experiment, "--data_dir", data
    result = run_script("train.py", *flags, "--init_from", FOLDER / "best.pth.tar")
    assert "these layers start afresh: gcn1, gcn2, gcn3, gcn4" in result.stdout
