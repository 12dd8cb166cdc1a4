import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from model import UserError, inference
from model.inference import Segmenter, blended, class_map, tiles
from model.sample import draw_scene
from model.transforms import RESIZES, squares, to_input

CPU = torch.device("cpu")


def pixel_network() -> nn.Module:
    """Looks at every pixel by itself, so what it says does not depend on the window."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Conv2d(16, 5, 1))


def context_network() -> nn.Module:
    """Looks around, farther than a tile."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 7, padding=12, dilation=4), nn.Tanh(), nn.Conv2d(8, 5, 3, padding=1))


def photo(width: int, height: int) -> Image.Image:
    return draw_scene(np.random.default_rng(5))[0].resize((width, height))


def logits(network: nn.Module, picture: Image.Image, size: int, *, flip: bool = False) -> torch.Tensor:
    """By plain PyTorch, at the size of the picture."""
    (images,) = squares([picture], [size], "squash")
    x = to_input(images, "cpu")
    with torch.no_grad():
        maps = network(x.flip(-1)).flip(-1) if flip else network(x)
    return F.interpolate(maps, (picture.height, picture.width), mode="bilinear")[0]


@pytest.mark.parametrize("size", [(50, 90), (97, 33), (20, 24)], ids=str)
@pytest.mark.parametrize("band", [1, 2000])
def test_one_map_gives_the_largest_upsampled_logit(size, band, monkeypatch):
    monkeypatch.setattr(inference, "BAND_VALUES", band)
    width, height = size
    maps = torch.randn(5, 24, 24, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(maps[None], (height, width), mode="bilinear")[0].argmax(0)
    result = class_map([maps], width=width, height=height)
    assert result.dtype == torch.uint8
    assert (result == expected).float().mean() > 0.999  # ties


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    network, picture = context_network(), photo(120, 70)
    result = Segmenter(network, CPU, image_size=64, scales=(0.5, 1.5), flip=True).segment(picture)
    terms = [logits(network, picture, size, flip=flip) for size in (32, 96) for flip in (False, True)]
    expected = sum(term.softmax(0) for term in terms).argmax(0)
    assert (result == expected).float().mean() > 0.999
    assert (result == terms[0].argmax(0)).float().mean() < 0.98  # it does make a difference


def test_with_flip_a_mirrored_photo_gives_the_mirrored_map():
    segmenter = Segmenter(context_network(), CPU, image_size=64, flip=True)
    picture = photo(90, 70)
    mirrored = segmenter.segment(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).flip(1)
    assert (segmenter.segment(picture) == mirrored).float().mean() > 0.99  # but for rounding when it is squashed


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("tile", [None, 50])
@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.25), "flip": True}], ids=str)
@pytest.mark.parametrize("size", [(96, 96), (300, 90), (61, 199), (700, 9), (5, 3)], ids=str)
def test_a_network_that_returns_colours_gives_back_the_photo(size, resize, tile, options):
    """The network returns what it sees, as logits of red, green and blue.

    A photo of three colours with two edges, each of them found to within half a pixel of what the network reads.
    """
    width, height = size
    across, down = max(1, round(0.37 * width)), max(1, round(0.58 * height))
    truth = np.zeros((height, width), np.uint8)
    truth[:, across:], truth[down:, :across] = 1, 2
    picture = Image.fromarray((np.eye(3, dtype=np.uint8) * 255)[truth])
    segmenter = Segmenter(
        nn.Identity(), CPU, image_size=64, resize=resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options
    )
    found = segmenter.segment(picture, tile=tile).numpy()
    box = [min(length, tile or length) for length in size]
    left, top, right, bottom = RESIZES[resize](*box, min(segmenter.sizes))
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    near = abs(x - across) <= max(0.5, 0.5 * box[0] / (right - left))
    near |= abs(y - down) <= max(0.5, 0.5 * box[1] / (bottom - top))
    assert (near | (found == truth)).all()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 120))
def test_tiles_cover_the_photo_and_overlap(width, height, side):
    boxes = tiles(width, height, side)
    covered = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left, bottom - top) == (min(side, width), min(side, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert boxes == sorted(boxes, key=lambda box: box[1])
    lefts = sorted({box[0] for box in boxes})
    assert all(b - a <= max(1, 0.75 * side) for a, b in itertools.pairwise(lefts))


@pytest.mark.parametrize("band", [3000, 2**22])
@pytest.mark.parametrize("size", [(150, 100), (40, 130), (64, 64)], ids=str)
def test_tiles_give_what_the_whole_photo_gives(size, band, monkeypatch):
    """With a network that needs no context, in tiles of the size that it reads, so that nothing is resampled."""
    for limit in ("BAND_VALUES", "PIXELS_AT_ONCE"):
        monkeypatch.setattr(inference, limit, band)
    network, picture = pixel_network(), photo(*size)
    result = Segmenter(network, CPU, image_size=32).segment(picture, tile=32)
    with torch.no_grad():
        expected = network(to_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], "cpu"))[0].argmax(0)
    assert (result == expected).all()


def test_where_tiles_disagree_the_nearer_centre_counts_more():
    left, right = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    left[0], right[1] = 4, 4
    looks = [((0, 0, 40, 10), [left]), ((30, 0, 70, 10), [right])]
    assert blended(looks, width=70, height=10)[5].tolist() == [0] * 35 + [1] * 35


def test_a_tile_counts_fully_but_for_a_quarter_at_its_edges():
    """Tiles of 40 that share 20 columns; the surer right one wins as soon as its weight is an eighth of the other's."""
    left, right = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    left[0], right[1] = math.log(0.55 / 0.45), math.log(0.9 / 0.1)
    looks = [((0, 0, 40, 10), [left]), ((20, 0, 60, 10), [right])]
    assert blended(looks, width=60, height=10)[5].tolist() == [0] * 21 + [1] * 39


def test_a_tile_larger_than_the_photo_is_the_whole_photo():
    segmenter = Segmenter(context_network(), CPU, image_size=48)
    picture = photo(90, 70)
    assert torch.equal(segmenter.segment(picture, tile=90), segmenter.segment(picture))
    assert not torch.equal(segmenter.segment(picture, tile=60), segmenter.segment(picture))


def test_photos_in_a_batch_give_what_each_gives_alone():
    segmenter = Segmenter(context_network(), CPU, image_size=48, scales=(1, 1.5), flip=True)
    pictures = [photo(90, 70), photo(40, 60), photo(33, 120)]
    batch = segmenter.logits(squares(pictures, segmenter.sizes, "squash"), [picture.size for picture in pictures])
    for picture, maps in zip(pictures, batch, strict=True):
        result = class_map(maps, width=picture.width, height=picture.height)
        assert (result == segmenter.segment(picture)).float().mean() > 0.999


def test_segmenting_leaves_the_network_as_it_was():
    network = context_network()
    before = copy.deepcopy(network.state_dict())
    Segmenter(network, CPU, image_size=48).segment(photo(60, 50))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_other_scales_than_1_read_squares_of_even_sides():
    assert Segmenter(pixel_network(), CPU, image_size=97, scales=(0.75, 1, 1.25)).sizes == [72, 97, 122]
    assert Segmenter(pixel_network(), CPU, image_size=96, scales=(0.75, 1, 1.25)).sizes == [72, 96, 120]


@pytest.mark.parametrize("scales", [(0.4,), (), (1, 400), (-1,), (math.nan,)], ids=str)
def test_impossible_scales_are_refused(scales):
    with pytest.raises(UserError, match="each must leave from 32 to 16384"):
        Segmenter(pixel_network(), CPU, image_size=64, scales=scales)
