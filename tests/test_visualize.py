import numpy as np
from PIL import Image

from model.voc import CLASS_NAMES, VOID, colour_mask, palette
from visualize import MARGIN, comparison


def test_a_colour_mask_keeps_its_indices_and_shows_the_palette(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    colour_mask(labels).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask), labels)
        assert np.array_equal(np.array(mask.convert("RGB")), palette()[labels])


def test_a_comparison_shows_photo_truth_and_prediction_of_each_example_in_its_place():
    images = np.stack([np.full((8, 8, 3), grey, dtype=np.uint8) for grey in (50, 200)])
    labels = np.stack([np.full((8, 8), 3), np.full((8, 8), VOID)]).astype(np.uint8)
    predictions = np.stack([np.full((8, 8), 5), np.full((8, 8), 0)]).astype(np.uint8)
    picture = np.array(comparison(images, labels, predictions, CLASS_NAMES, side=40))
    for column, (photo, truth, prediction) in enumerate([(50, 3, 5), (200, VOID, 0)]):
        x = 90 + column * (40 + MARGIN) + 20
        centres = [picture[MARGIN + row * (40 + MARGIN) + 20, x].tolist() for row in range(3)]
        assert centres == [[photo] * 3, palette()[truth].tolist(), palette()[prediction].tolist()]


def test_the_legend_shows_the_classes_of_the_picture_and_grows_with_them():
    def legend(*classes: int) -> np.ndarray:
        labels = np.array(classes, dtype=np.uint8).reshape(1, 1, -1)
        picture = comparison(np.zeros((1, 1, len(classes), 3), np.uint8), labels, labels, CLASS_NAMES, side=40)
        return np.array(picture)[3 * (40 + MARGIN) + MARGIN :]

    def swatches(pixels: np.ndarray) -> set[int]:
        """Classes whose colour fills more pixels than the smoothed edges of letters do."""
        return {index for index in range(1, 21) if (pixels == palette()[index]).all(-1).sum() > 100}

    assert swatches(legend(0, 3, VOID)) == {3}
    assert swatches(legend(*range(21))) == {*range(1, 21)}
    assert len(legend(*range(21))) > len(legend(0, 3))
