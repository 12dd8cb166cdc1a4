import json
import math
import os
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rename_classes, run_script
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

import utils
from comparing import mIoU, read_counts
from engine import checkpoints, run
from engine.evaluation import evaluate
from evaluate import choose, draw_overlays, find_other, main, parse_args, prepare, table
from model import UserError
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import class_names, find_split
from model.photos import read_photo
from model.transforms import squares, to_input
from model.voc import palette
from params import Params

SERVER_FOLDER = "results/VOC2012/Segmentation/comp5_{}_cls"


def run_evaluate(experiment, data, *args, **options):
    return run_script("evaluate.py", "--model_dir", experiment, "--data_dir", data, *args, **options)


def masks_of(data, split: str) -> dict[str, np.ndarray]:
    ids = (data / f"{split}.txt").read_text().split()
    return {id_: np.array(Image.open(data / "SegmentationClass" / f"{id_}.png")) for id_ in ids}


def expected_prediction(experiment, photo, *, sizes=(32,), flip: bool = False) -> np.ndarray:
    """By plain PyTorch, one photo at a time."""
    model, _, _ = checkpoints.load_network(experiment, "best", torch.device("cpu"))
    total = 0
    for images in squares([photo], sizes, "squash"):
        x = to_input(images, "cpu")
        with torch.no_grad():
            maps = [model.eval()(x)] + ([model(x.flip(-1)).flip(-1)] if flip else [])
        shape = (photo.height, photo.width)
        total = total + sum(F.interpolate(logits, shape, mode="bilinear")[0].softmax(0) for logits in maps)
    return total.argmax(0).numpy()


def test_the_official_score_is_that_of_the_predictions_in_the_files(experiment, trained, tmp_path):
    """Read back by Pillow and by torchvision, and scored with NumPy against the masks at their own size."""
    _, data = trained
    stdout = run_evaluate(experiment, data, "--original_size", "--save_predictions", tmp_path / "out").stdout
    metrics = json.loads((experiment / "metrics_val_best_original_size.json").read_text())
    counts = np.zeros((21, 21))
    for id_, mask in masks_of(data, "val").items():
        file = tmp_path / "out" / SERVER_FOLDER.format("val") / f"{id_}.png"
        prediction = np.array(Image.open(file))
        assert Image.open(file).mode == "P"
        assert Image.open(file).getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        painted = np.array(Image.open(file).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode_image(str(file), mode=ImageReadMode.RGB).numpy(), painted)
        assert np.array_equal(decode_image(str(file), mode=ImageReadMode.UNCHANGED).numpy()[0], prediction)
        expected = expected_prediction(experiment, read_photo(data / "JPEGImages" / f"{id_}.jpg"))
        assert prediction.shape == mask.shape
        assert (prediction == expected).mean() > 0.999  # ties
        assert len(np.unique(prediction)) > 2
        valid = mask != 255
        np.add.at(counts, (mask[valid], prediction[valid]), 1)
    hits, union, occurs = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal(), counts.sum(1) > 0
    assert metrics["mIoU"] == pytest.approx(np.mean(hits[occurs] / union[occurs]))
    assert metrics["pixel_accuracy"] == pytest.approx(hits.sum() / counts.sum())
    assert metrics["images"] == 3
    assert metrics["epoch"] in (1, 2)
    assert 0 <= metrics["boundary_accuracy"] <= 1
    for text in ("their own size", "boundary IoU", f"{metrics['mIoU']:.4f}", str(tmp_path / "out")):
        assert text in stdout
    assert not (experiment / "metrics_val_best.json").exists()
    check_counts(experiment, data, metrics, "val_best_original_size")


def check_counts(experiment, data, metrics: dict, name: str) -> None:
    """The counts of the photos add up to the metrics."""
    counts = read_counts(experiment / f"counts_{name}.npz")
    total = counts.pixels.sum(0)
    hits, union = total.diagonal(), total.sum(0) + total.sum(1) - total.diagonal()
    expected = [hit / pixels if pixels else None for hit, pixels in zip(hits, union, strict=True)]
    assert list(metrics["IoU"].values()) == pytest.approx(expected)
    assert counts.ids == (data / "val.txt").read_text().split() and counts.class_names == list(metrics["IoU"])
    assert experiment / f"counts_{name}.npz" in run.existing(experiment)


def test_the_score_at_the_size_of_the_network_is_that_of_validation(experiment, trained):
    _, data = trained
    run_evaluate(experiment, data)
    metrics = json.loads((experiment / "metrics_val_best.json").read_text())
    then = json.loads((experiment / "metrics_val_best_weights.json").read_text())
    assert (metrics["image_size"], metrics["resize"]) == (32, "squash") and "boundary_mIoU" not in metrics
    assert {key: metrics[key] for key in ("epoch", "mIoU", "frequency")} == {
        key: then[key] for key in ("epoch", "mIoU", "frequency")
    }
    assert metrics["loss"] == pytest.approx(then["loss"], rel=1e-5)
    check_counts(experiment, data, metrics, "val_best")
    width, height = Image.open(experiment / "metrics_val_best.png").size
    assert width > 600 and height > 500


def test_scores_on_other_data_have_files_of_their_own_that_say_which(experiment, trained, tmp_path):
    _, data = trained
    other = shutil.copytree(data, tmp_path / "street")
    run_evaluate(experiment, other)
    metrics = json.loads((experiment / "metrics_val@street_best.json").read_text())
    assert metrics["data_dir"] == str(other) and (experiment / "counts_val@street_best.npz").exists()
    assert not (experiment / "metrics_val_best.json").exists()
    moved = json.loads((experiment / "run.json").read_text()) | {"data_dir": str(tmp_path / "gone")}
    (experiment / "run.json").unlink()  # a link to the one that other tests read
    utils.write_json(experiment / "run.json", moved)
    assert run.trained_elsewhere(experiment, other) is None, "the data have moved"


def test_a_list_may_have_the_sign_by_which_other_data_are_named(experiment, trained, tmp_path):
    data = shutil.copytree(trained[1], tmp_path / "data")
    shutil.copy(data / "val.txt", data / "val@2.txt")
    record = json.loads((experiment / "run.json").read_text()) | {"data_dir": str(data)}
    (experiment / "run.json").unlink()  # a link to the one that other tests read
    utils.write_json(experiment / "run.json", record)
    run_evaluate(experiment, data, "--split", "val@2")
    assert "data_dir" not in json.loads((experiment / "metrics_val@2_best.json").read_text())


def test_the_loss_of_validation_does_not_depend_on_the_batch(trained):
    """Some terms are no means over photos."""
    experiment, data = trained
    params = Params(loss_weights={"balanced_cross_entropy": 1, "lovasz": 1, "dice": 1}, precision="fp32")
    model, _, _ = checkpoints.load_network(experiment, "best", torch.device("cpu"))
    split = find_split("voc", data, "val")
    dataset = SegmentationDataset(split, class_names=class_names(split, 21), image_size=32)
    found = [
        evaluate(model, make_loader(dataset, batch_size=size), params, torch.device("cpu")).metrics["loss"]
        for size in (1, 2, 3)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_scales_and_flip_reach_the_predictions(experiment, trained, tmp_path):
    _, data = trained
    flags = "--scales", 1, 2, "--flip", "--save_predictions", tmp_path / "out", "--save_overlays", 1
    run_evaluate(experiment, data, *flags)
    for id_ in masks_of(data, "val"):
        prediction = np.array(Image.open(tmp_path / "out" / SERVER_FOLDER.format("val") / f"{id_}.png"))
        photo = read_photo(data / "JPEGImages" / f"{id_}.jpg")
        assert (prediction == expected_prediction(experiment, photo, sizes=(32, 64), flip=True)).mean() > 0.999
    assert not (experiment / "metrics_val_best_original_size.json").exists()
    metrics = json.loads((experiment / "metrics_val_best_multi_scale.json").read_text())
    assert (metrics["scales"], metrics["flip"]) == ([1.0, 2.0], True)
    (overlay,) = (experiment / "overlays_val_best_multi_scale").iterdir()
    assert overlay in run.existing(experiment)  # --overwrite deletes it


def test_overlays_show_the_worst_photos_first(experiment, trained):
    _, data = trained
    folder = experiment / "overlays_val_best_original_size"
    folder.mkdir()
    (folder / "3_of_before.png").touch()
    run_evaluate(experiment, data, "--save_overlays", 2)
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 2
    scores = []
    for rank, picture in enumerate(pictures, start=1):
        number, id_ = picture.stem.split("_", 1)
        assert int(number) == rank
        mask, photo = masks_of(data, "val")[id_], read_photo(data / "JPEGImages" / f"{id_}.jpg")
        scores.append(mean_iou(expected_prediction(experiment, photo), mask))
        assert Image.open(picture).width > 4 * 300  # photo, truth, prediction, error
    assert scores == sorted(scores)
    run_evaluate(experiment, data, "--save_overlays", 1, "--which", "val1", "val0")
    chosen = experiment / "overlays_val_best_original_size_chosen"
    assert sorted(picture.name for picture in chosen.iterdir()) == ["1_val1.png", "2_val0.png"]
    assert sorted(folder.iterdir()) == pictures
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    (experiment / "metrics_val_best_original_size.json").unlink()
    stderr = run_evaluate(experiment, data, "--save_overlays", 1, check=2).stderr
    assert "--save_overlays: " in stderr and "a file is in the way" in stderr
    assert not (experiment / "metrics_val_best_original_size.json").exists(), "said before anything is scored"


def mean_iou(prediction: np.ndarray, mask: np.ndarray) -> float:
    valid = mask != 255
    pairs = [(prediction[valid] == index, mask[valid] == index) for index in range(21)]
    return np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()])


def test_photos_on_which_two_experiments_differ_most_are_drawn_with_both(experiment, trained, tmp_path):
    _, data = trained
    other = shutil.copytree(experiment, tmp_path / "other")
    state = torch.load(other / "best.pth.tar", weights_only=True)
    state["state_dict"]["br9.conv2.bias"][3] += 1e4  # sees birds everywhere
    (other / "best.pth.tar").unlink()
    torch.save(state, other / "best.pth.tar")
    flags = "--save_overlays", 2, "--against", other
    absent, scores = (
        other / f"{kind}_val_best_original_size.{end}" for kind, end in (("counts", "npz"), ("metrics", "json"))
    )
    said = f"{scores} is absent, or of other weights, photos, flags or metrics than now"
    said += f"; score {other} first, with the same"
    assert said in run_evaluate(experiment, data, *flags, check=2).stderr
    run_evaluate(other, data, "--original_size")
    stdout = run_evaluate(experiment, data, *flags).stdout
    folder = experiment / "overlays_val_best_original_size_against"
    assert f"2 overlays (most different) -> {folder}" in stdout
    ours, theirs = (read_counts(run / absent.name) for run in (experiment, other))
    order = np.argsort(-abs(mIoU(ours.pixels) - mIoU(theirs.pixels)), kind="stable")[:2]
    assert [path.stem.split("_", 1)[1] for path in sorted(folder.iterdir())] == [ours.ids[index] for index in order]
    args = Namespace(model_dir=experiment, against=other, data_dir=data, restore_file="best", split="val")
    vars(args).update(
        original_size=True,
        scales=[1.0],
        flip=False,
        which="most different",
        ids=[],
        save_overlays=2,
        save_predictions=None,
    )
    work, device = prepare(args, torch.device("cpu")), torch.device("cpu")
    with pytest.raises(UserError, match="were scored against different masks"):
        draw_overlays(work, None, replace(ours, pixels=ours.pixels + 1), (theirs, None), folder)
    assert find_other(work, device)[0].ids == ours.ids
    shutil.copy(scores, other / "metrics_val_best_multi_scale.json")
    shutil.copy(absent, other / "counts_val_best_multi_scale.npz")
    with pytest.raises(UserError, match="is absent, or of other weights, photos, flags or metrics than now"):
        find_other(replace(work, args=Namespace(**vars(args) | {"scales": [1.0, 1.5]})), device)
    state["state_dict"]["br9.conv2.bias"][3] += 1
    torch.save(state, other / "best.pth.tar")  # of the same epoch
    shutil.rmtree(folder)
    assert said in run_evaluate(experiment, data, *flags, check=2).stderr
    assert not folder.exists(), "said before anything is written"


def test_of_several_scores_those_that_are_missing_are_made_and_one_that_fails_is_named(
    trained, tmp_path, monkeypatch, capsys
):
    data = shutil.copytree(trained[1], tmp_path / "data")
    sweep, lone, damaged = tmp_path / "sweep", tmp_path / "lone", tmp_path / "damaged"
    for folder in (sweep / "seed_1", lone, damaged):
        shutil.copytree(trained[0], folder, copy_function=os.link)
    (sweep / "search_space.json").write_text("{}")
    (sweep / "running").mkdir()
    (damaged / "best.pth.tar").unlink()
    (damaged / "best.pth.tar").write_text("nonsense")
    (empty := tmp_path / "empty").mkdir()

    def scored(folders: list[Path], splits: list[str], *flags: str) -> list[str]:
        """Evaluate folders and the damaged one; return which splits of which experiments are scored now."""
        given = ["--model_dir", damaged, *folders, "--data_dir", data, "--split", *splits, "--device", "cpu", *flags]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, given)])
        assert main(parse_args()) == 1
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.err.startswith(
            f"evaluate.py: {damaged}: {damaged}/best.pth.tar is ref"
        )
        lines = [re.split("  +", line) for line in said.out.splitlines() if "mIoU" in line]
        assert len(lines) == len({*folders}) * len(splits)
        for folder, split, value, state in lines:
            metrics = json.loads(max(Path(folder).glob(f"metrics_{split}@*.json"), key=os.path.getmtime).read_text())
            assert value == f"mIoU {metrics['mIoU']:.4f}" and state in ("scored", "was scored")
        return [f"{Path(folder).name} {split}" for folder, split, _, state in lines if state == "scored"]

    assert scored([lone, lone], ["val", "train"]) == ["lone val", "lone train"]
    assert scored([sweep, lone], ["val"]) == ["seed_1 val"] and scored([sweep, lone], ["val"]) == []
    os.utime(data / "SegmentationClass" / "val0.png")
    assert scored([sweep, lone], ["val"]) == ["seed_1 val", "lone val"], "the mask may have been corrected"
    (data / "train.txt").write_text("train1\n")
    assert scored([lone], ["train"]) == ["lone train"]
    (sweep / "seed_1" / "counts_val@data_best.npz").unlink()
    state = torch.load(lone / "best.pth.tar", weights_only=True)
    state["state_dict"]["br9.conv2.bias"][3] += 1
    (lone / "best.pth.tar").unlink()
    torch.save(state, lone / "best.pth.tar")
    assert scored([sweep, lone], ["val"]) == ["seed_1 val", "lone val"]
    assert scored([lone], ["train"], "--flip") == ["lone train"]
    older = json.loads((file := lone / "metrics_val@data_best.json").read_text())
    del older["mean_dice"]  # as before the program had it
    file.write_text(json.dumps(older))
    assert scored([sweep, lone], ["val"]) == ["lone val"]
    monkeypatch.setattr("sys.argv", [*map(str, ["evaluate.py", "--model_dir", empty, lone, "--data_dir", data])])
    assert main(parse_args()) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"evaluate.py: {empty}: no checkpoint ") and said.out.endswith("  was scored\n")
    flags = "--flip", "--scales", "2"
    assert scored([lone], ["train"], *flags) == ["lone train"]
    older = json.loads((file := lone / "metrics_train@data_best_multi_scale.json").read_text())
    del older["boundary_mIoU"]
    file.write_text(json.dumps(older))
    assert scored([lone], ["train"], *flags) == ["lone train"]
    for text, group in (("(.*) ?[0-9]\r\n", "(.*) ?[0-9]"), ("\n", None)):  # which comparisons draw
        (data / "group.txt").write_bytes(text.encode())
        assert scored([lone], ["train"], *flags) == []
        assert json.loads((lone / "metrics_train@data_best_multi_scale.json").read_text())["group"] == group
    (data / "group.txt").write_text("val")
    command = ["evaluate.py", "--model_dir", lone, "--data_dir", data, "--split", "train"]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    with pytest.raises(UserError, match=f"^group.txt of {data}: 'val' does not match 'train1'; it must match"):
        main(parse_args())
    (data / "group.txt").unlink()
    assert scored([lone], ["train"], *flags, "--save_overlays", "--against", str(lone)) == []
    assert (lone / "overlays_train@data_best_multi_scale_against" / "1_train1.png").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--which", "best"], "--which goes with --save_overlays"),
        (["--against", "other"], "--against goes with --save_overlays"),
        (
            ["--save_overlays", "--which", "val1", "val9"],
            "--which val9: no photo of val; give ids, as val2, val1, val0, or worst",
        ),
        (
            ["--save_overlays", "--which", "worst", "val1"],
            "--which takes one of worst, median, best, random, or ids of photos",
        ),
        (["--split", "val", "train", "--save_predictions", "out"], "--save_predictions takes one experiment and one"),
    ],
)
def test_flags_that_do_not_fit_are_refused(trained, monkeypatch, capsys, flags, said):
    experiment, data = trained
    before = sorted(experiment.iterdir())
    given = ["evaluate.py", "--model_dir", str(experiment), "--data_dir", str(data), *flags]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises((UserError, SystemExit)) as error:
        main(parse_args())
    assert said in capsys.readouterr().err + str(error.value) and sorted(experiment.iterdir()) == before


def test_the_photos_that_are_drawn_are_chosen_by_their_mIoU():
    ours = np.array([0.4, 0.1, np.nan, 0.9, 0.3, 0.25])
    theirs = np.array([0.4, 0.2, np.nan, 0.1, 0.2, 0.25])

    def drawn(which: str, count: int = 3) -> str:
        return "".join("abcdef"[index] for index in choose(which, count, ours, theirs))

    assert [drawn(which) for which in ("worst", "best", "median")] == ["bfe", "dae", "efa"]
    assert drawn("most different", 1) == "d"
    assert sorted(drawn("random", 9)) == [*"abdef"] and drawn("random", 9).startswith(drawn("random"))


def test_a_split_without_masks_is_predicted_and_not_scored(experiment, trained, tmp_path):
    _, data = trained
    target = shutil.copytree(data, tmp_path / "data")
    photo = Image.open(data / "JPEGImages" / "val0.jpg")
    photo.resize((77, 50)).save(target / "JPEGImages" / "new.jpg")
    (target / "test.txt").write_text("new\n")
    before = set(experiment.iterdir())
    stdout = run_evaluate(experiment, target, "--split", "test", "--save_predictions", tmp_path / "out").stdout
    assert f"test of {target} has no masks and is not scored" in stdout
    assert Image.open(tmp_path / "out" / SERVER_FOLDER.format("test") / "new.png").size == (77, 50)
    assert set(experiment.iterdir()) == before
    flags = ["--split", "test", "--save_predictions", tmp_path / "out", "--save_overlays", 1]
    stderr = run_evaluate(experiment, target, *flags, check=2).stderr
    assert "has no masks: it can be predicted, not scored" in stderr


def test_a_split_whose_masks_are_all_void_is_predicted_and_not_scored(experiment, trained, tmp_path):
    """As Cityscapes' test, whose labels are withheld."""
    target = shutil.copytree(trained[1], tmp_path / "data")
    for id_, mask in masks_of(target, "val").items():
        Image.fromarray(np.full_like(mask, 255)).save(target / "SegmentationClass" / f"{id_}.png")
    before = set(experiment.iterdir())
    save = ("--save_predictions", tmp_path / "out")
    for flags in ((), (*save, "--save_overlays", 1)):
        stderr = run_evaluate(experiment, target, *flags, check=2).stderr
        assert f"split val of {target} has masks of nothing but void: it can be predicted, not scored" in stderr
    stdout = run_evaluate(experiment, target, *save).stdout
    assert f"val of {target} has masks of nothing but void and is not scored" in stdout
    assert len([*(tmp_path / "out").rglob("*.png")]) == 3
    assert {path.name for path in set(experiment.iterdir()) - before} <= {"overlays_val@data_best_original_size"}


def test_predictions_of_other_classes_than_vocs_go_to_a_plain_folder_in_colours_of_their_own(
    experiment, trained, tmp_path
):
    names = [*"ABCDEFGHIJKLMNOPQRST", "Background"]
    target = rename_classes(experiment, trained[1], tmp_path / "data", names)
    stdout = run_evaluate(experiment, target, "--save_predictions", tmp_path / "out").stdout
    files = sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert files == [tmp_path / "out" / "val" / f"val{index}.png" for index in range(3)]
    assert str(tmp_path / "out" / "val") in stdout
    with Image.open(files[0]) as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == palette(names).flatten().tolist()


def test_names_cannot_break_the_table():
    metrics = {"IoU": {"1000": 0.5, "a|b": None, "1e3": 0.25, "two\n lines": 1.0}, "mIoU": 0.5}
    rows = [re.split(r" *(?<!\\)\| *", line.strip("|")) for line in table(metrics).splitlines()[2:6]]
    assert [row[0].strip() for row in rows] == ["1000", r"a\|b", "1e3", "two lines"]
    assert [row[1].strip() for row in rows] == ["0.5000", "-", "0.2500", "1.0000"]


def test_tensorboard_gets_every_epoch_and_the_hyperparameters_beside_the_best_metrics(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    experiment, _ = trained
    events = accumulator.EventAccumulator(str(experiment / "tensorboard"))
    events.Reload()
    history = utils.read_history(experiment)
    for part in ("train", "val"):
        for metric in ("loss", "mIoU"):
            logged = [(event.step, event.value) for event in events.Scalars(f"{metric}/{part}")]
            assert [step for step, _ in logged] == [1, 2]
            for (_, value), record in zip(logged, history, strict=True):
                assert math.isclose(value, record[part][metric], rel_tol=1e-5)
    assert [event.step for event in events.Images("samples")] == [1, 2]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    best = json.loads((experiment / "metrics_val_best_weights.json").read_text())
    assert events.Scalars("best/mIoU")[0].value == pytest.approx(best["mIoU"])
    assert {path.parent for path in (experiment / "tensorboard").rglob("events*")} == {experiment / "tensorboard"}
