import math

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFont

from evaluate import confusion_figure
from model.voc import CLASS_NAMES, ERROR_COLOUR, VOID, VOID_COLOUR, colour_mask, palette, voc_palette
from visualize import LETTERS, MARGIN, TEXT, comparison, error_picture, overlay, training_curves

STREETS = ("road", "sky", "car")


def swatches(picture: Image.Image, *, below: int) -> set[tuple[int, int, int]]:
    """The colours in the legend; those of page and letters, which are grey, do not count."""
    pixels = np.array(picture)[below:].reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(colour) for colour in colours[counts > 100].tolist() if len(set(colour)) > 1}


def says(picture: Image.Image, text: str, *, left: int) -> bool:
    """Whether a text, and nothing else, stands in the first line, from a column of pixels on."""
    line = Image.new("RGB", (math.ceil(ImageFont.load_default(size=14).getlength(text)) + MARGIN, TEXT), "white")
    ImageDraw.Draw(line).text((0, TEXT // 2), text, **LETTERS)
    return picture.crop((left, 0, left + line.width, TEXT)) == line


def colour(index: int, names=CLASS_NAMES) -> tuple[int, int, int]:
    return tuple(palette(names)[index].tolist())


# ---------------------------------------------------------------------------------------- palettes


def test_vocs_names_have_vocs_palette_and_no_others():
    assert np.array_equal(palette(list(CLASS_NAMES)), voc_palette())
    assert not np.array_equal(palette([*CLASS_NAMES[:20], "screen"])[:21], voc_palette()[:21])
    assert np.array_equal(voc_palette()[VOID], VOID_COLOUR)


@pytest.mark.parametrize("count", [3, 255])
def test_colours_of_other_classes_differ_from_one_another_and_from_what_else_is_drawn(count):
    colours = palette([f"kind {index}" for index in range(count)])[:count]
    others = [VOID_COLOUR, ERROR_COLOUR, (255, 255, 255), (0, 0, 0)]
    assert len(np.unique([*colours.tolist(), *others], axis=0)) == count + len(others)


@pytest.mark.parametrize(("count", "least"), [(2, 80), (11, 16), (19, 13)])  # 11 as in CamVid, 19 as in Cityscapes
def test_classes_differ_when_they_are_blended_with_a_photo(count, least):
    """Bounds of the CIELAB distance of every pair, and of each to the photo, at half opacity on three greys."""
    to_lab = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
    for grey in (40, 128, 215):
        blended = np.rint((np.array([*palette([str(n) for n in range(count)])[:count], [grey] * 3]) + grey) / 2)
        lab = ImageCms.profileToProfile(Image.fromarray(blended[None].astype(np.uint8)), *to_lab, outputMode="LAB")
        scaled = (np.array(lab)[0].astype(np.uint8) ^ [0, 128, 128]) * [100 / 255, 1, 1]  # a and b are signed
        apart = np.linalg.norm(scaled[:, None] - scaled, axis=2)
        assert apart[np.triu_indices(count, 1)].min() > least and apart[count, :count].min() > 10


def test_a_class_called_background_is_black_wherever_it_stands():
    shown = palette(["road", "Background", "car"])[:3].tolist()
    assert shown == [palette(STREETS)[0].tolist(), [0, 0, 0], palette(STREETS)[1].tolist()]


@pytest.mark.parametrize("names", [CLASS_NAMES, STREETS], ids=("voc", "streets"))
def test_a_colour_mask_keeps_its_indices_and_shows_the_palette(tmp_path, names):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    colour_mask(labels, names).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask), labels)
        assert np.array_equal(np.array(mask.convert("RGB")), palette(names)[labels])


# ---------------------------------------------------------------------------------------- pictures


def test_a_comparison_shows_mean_iou_photo_truth_and_prediction_of_each_example_in_its_place():
    images = np.stack([np.full((8, 8, 3), grey, dtype=np.uint8) for grey in (50, 200)])
    labels = np.stack([np.full((8, 8), 3), np.full((8, 8), VOID)]).astype(np.uint8)
    predictions = np.stack([np.full((8, 8), 5), np.full((8, 8), 0)]).astype(np.uint8)
    predictions[0, :2] = 3
    picture = comparison(list(zip(images, labels, predictions, strict=True)), CLASS_NAMES, title="epoch 7", side=80)
    assert says(picture, "epoch 7", left=MARGIN)
    for column, (value, photo, truth, prediction) in enumerate([("0.25", 50, 3, 5), ("-", 200, VOID, 0)]):
        x = 90 + column * (80 + MARGIN)
        assert says(picture, f"mIoU {value}", left=x)
        centres = [picture.getpixel((x + 40, TEXT + row * (80 + MARGIN) + 40)) for row in range(3)]
        assert centres == [(photo,) * 3, colour(truth), colour(prediction)]
    assert swatches(picture, below=3 * (80 + MARGIN) + TEXT) == {colour(index) for index in (3, 5, VOID)}


def test_the_legend_shows_what_is_in_the_picture_and_grows_with_it():
    def picture(*classes: int, names=CLASS_NAMES) -> Image.Image:
        labels = np.array(classes, dtype=np.uint8).reshape(1, -1)
        return comparison([(np.zeros((1, len(classes), 3), np.uint8), labels, labels)], names, title="", side=40)

    below = 3 * (40 + MARGIN) + TEXT
    assert swatches(picture(0, 3, VOID), below=below) == {colour(3), VOID_COLOUR}
    assert swatches(picture(*range(21)), below=below) == {colour(index) for index in range(1, 21) if index != 7}  # grey
    assert picture(*range(21)).height > picture(0, 3).height
    assert picture(0, names=["name " * 20] * 2).width > picture(0).width


def quarters(*classes: int) -> np.ndarray:
    return np.array(classes, dtype=np.uint8).reshape(2, 2).repeat(20, 0).repeat(20, 1)


def tiles(picture: Image.Image, count: int) -> list[list[tuple[int, int, int]]]:
    """The centres of the quarters of each 40 x 40 tile in a row of an error picture."""
    lefts = [MARGIN + place * (40 + MARGIN) for place in range(count)]
    corners = ((10, 10), (30, 10), (10, 30), (30, 30))
    return [[picture.getpixel((left + x, 2 * TEXT + y)) for x, y in corners] for left in lefts]


@pytest.mark.parametrize("photo", ["black", "white", "red", VOID_COLOUR], ids=str)
def test_right_wrong_and_void_are_told_apart_on_every_photo(photo):
    """The quarters of a photo of one colour: right, wrong, void, right."""
    photo, truth = Image.new("RGB", (40, 40), photo), quarters(1, 1, VOID, 1)
    prediction = [("", quarters(1, 2, 1, 1))]
    picture = error_picture(photo, Image.fromarray(truth), prediction, CLASS_NAMES, title="", side=40)
    right, wrong, void, other = tiles(picture, 4)[3]
    assert (wrong, void) == (ERROR_COLOUR, VOID_COLOUR) and right == other
    assert len(set(right)) == 1 and 30 <= right[0] <= 120  # dark grey
    legend = swatches(picture, below=2 * TEXT + 40 + MARGIN)
    assert legend == {colour(1), colour(2), ERROR_COLOUR, VOID_COLOUR}


def test_classes_are_blended_on_the_photo_of_an_error_picture_and_titles_have_room():
    grey, names = (100, 100, 100), ("background", "car", "sky")
    photo, truth = Image.new("RGB", (40, 40), grey), Image.fromarray(quarters(0, 1, 2, 2))
    runs = [("", quarters(0, 0, 1, 2)), ("a run with a long name, mIoU 0.123", quarters(1, 1, 1, 1))]
    picture = error_picture(photo, truth, runs, names, title="", side=40)
    car, sky = (
        tuple(
            np.array(Image.blend(Image.new("RGB", (1, 1), grey), Image.new("RGB", (1, 1), colour(index, names)), 0.55))[
                0, 0
            ]
        )
        for index in (1, 2)
    )
    assert tiles(picture, 4) == [[grey] * 4, [grey, car, sky, sky], [grey, grey, car, sky], [car] * 4]
    assert swatches(picture, below=2 * TEXT + 40 + MARGIN) == {colour(1, names), colour(2, names)}, "no errors"
    letters = np.array(picture)[TEXT : 2 * TEXT].min((0, 2)) < 128
    assert letters[200:].any() and not letters[-MARGIN:].any()


def test_an_overlay_colours_every_class_but_one_called_background():
    photo = Image.new("RGB", (240, 90), (100, 100, 100))
    prediction = np.repeat(np.array([[0], [1], [2]], dtype=np.uint8), 30, 0).repeat(240, 1)

    def rows(*names: str) -> list[tuple[int, int, int]]:
        picture = overlay(photo, prediction, names, dict(enumerate(names)))
        bare = {colour(index, names) for index, name in enumerate(names) if name.casefold() == "background"}
        legend = swatches(picture, below=90 + MARGIN)
        assert legend == {colour(index, names) for index in range(3)} - bare
        return [picture.getpixel((120, row)) for row in (15, 45, 75)]

    grey = (100, 100, 100)
    assert [row == grey for row in rows(*STREETS)] == [False, False, False]
    assert [row == grey for row in rows("road", "sky", "BACKGROUND")] == [False, False, True]


def test_the_confusion_shows_shares_of_labels_and_each_iou_but_of_classes_that_are_nowhere():
    iou = {"road": 0.75, "bus": None, "sky": 0.0, "$car$": 1.0}
    counts = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 2]])
    matrix = confusion_figure(np.insert(np.insert(counts, 1, 0, 0), 1, 0, 1), iou).axes[0]
    shares = matrix.images[0].get_array().filled(np.nan)
    assert np.array_equal(shares, [[0.75, 0, 0.25], [np.nan] * 3, [0, 0, 1]], equal_nan=True)
    numbers = {text.get_position(): text.get_text() for text in matrix.texts}
    assert numbers == {(0, 0): "0.75", (2, 0): "0.25", (2, 2): "1.00"}, "none for what is 0"
    assert not confusion_figure(np.eye(31), dict.fromkeys(map(str, range(31)), 1.0)).axes[0].texts, "there is no room"
    rows = [label.get_text().split() for label in matrix.get_yticklabels()]
    assert (
        confusion_figure(np.zeros((2, 2)), {"a": None, "b": None}).axes[0].get_yticklabels()[1].get_text() == "b     -"
    )
    assert rows == [["road", "0.75"], ["sky", "0.00"], [r"\$car\$", "1.00"]]


@pytest.mark.parametrize("metrics", [["loss"], ["loss", "mIoU", *"abcdef"]])
def test_the_curves_of_a_run_have_a_panel_for_every_metric_and_one_for_the_learning_rate(metrics):
    def epoch(number: int) -> dict:
        values = {metric: number + place / 10 for place, metric in enumerate(metrics)}
        val = {metric: value + 1 for metric, value in values.items() if number > 1 or metric == "loss"}
        return {"epoch": number, "train": values, "val": val, "learning_rate": 0.1 / number}

    history = [epoch(1), epoch(2), epoch(3)]
    history[1]["val"]["loss"] = None
    *panels, rate = training_curves(history, 2).axes
    assert [panel.get_title() for panel in panels] == metrics
    for place, panel in enumerate(panels):
        train, val, _ = (line.get_ydata() for line in panel.lines)
        value = f": {2 + place / 10 + 1:.4g}" if place else ""  # at 2, where the loss is unknown
        legend = [text.get_text() for text in panel.get_legend().get_texts()]
        assert legend == ["train", "val", f"best epoch (2){value}"]
        assert panel.lines[2].get_xdata() == [2, 2]
        assert train.tolist() == [number + place / 10 for number in (1, 2, 3)]
        assert np.isnan(val).tolist() == ([False, True, False] if place == 0 else [True, False, False])
        assert val[2] == pytest.approx(4 + place / 10)
    assert rate.lines[0].get_ydata().tolist() == [0.1, 0.05, 0.1 / 3]
