"""Resizing, normalisation, and the augmentation that must move photo and mask together."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d, pad
from torchvision.transforms.v2.functional import normalize as torchvision_normalize

from model.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PADDING,
    RESIZES,
    augment,
    cutmix,
    photo_edges,
    to_input,
    to_square,
)
from model.voc import VOID
from params import Params

SIZE = 64
SEEDS = range(80)


def blocks() -> tuple[Tensor, Tensor]:
    """A photo of 16 px blocks in pure red, green or blue, and a mask that says which: uint8 (3, S, S) and (S, S)."""
    pattern = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2], [2, 1, 1, 0], [1, 2, 0, 0]], dtype=torch.uint8)
    mask = pattern.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.stack([(mask == channel) * 255 for channel in range(3)]).to(torch.uint8), mask


def columns() -> tuple[Tensor, Tensor]:
    """A mask whose values are the column numbers, so that scale and flip can be read from a row of it."""
    mask = torch.arange(SIZE, dtype=torch.uint8).expand(SIZE, SIZE).contiguous()
    return mask.expand(3, SIZE, SIZE).contiguous(), mask


def inside_rectangle(known: Tensor) -> tuple[slice, slice]:
    """The bounds of a boolean (H, W), which must be one filled rectangle."""
    rows, cols = (known.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
    assert known[box].all() and known.sum() == known[box].numel()
    return box


def letterboxed(photo: Tensor, mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The uppermost rows of an example, in the middle of a padded square of its size."""
    padded, void = torch.tensor(PADDING, dtype=torch.uint8).view(3, 1, 1).expand(3, SIZE, SIZE).clone(), mask.clone()
    top = (SIZE - rows) // 2
    padded[:, top : top + rows], void[:] = photo[:, :rows], VOID
    void[top : top + rows] = mask[:rows]
    return padded, void


def augmentation(photo: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """One example by itself."""
    images, labels = augment(photo[None], mask[None], torch.tensor([seed]))
    return images[0], labels[0]


@pytest.fixture(scope="module")
def augmented_blocks() -> list[tuple[Tensor, Tensor]]:
    return [augmentation(*blocks(), seed) for seed in SEEDS]


# ---------------------------------------------------------------------------------------------------- augmentation


def test_photo_and_mask_move_together(augmented_blocks):
    """The strongest channel survives any colour jitter; within two pixels of an edge colours are blends."""
    compared = 0
    for seed, (photo, mask) in enumerate(augmented_blocks):
        framed = pad(mask[None].float(), (2, 2, 2, 2), value=VOID)  # there may be an edge just outside the window
        inner = (max_pool2d(framed, 5, 1) == -max_pool2d(-framed, 5, 1))[0] & (mask != VOID)
        assert torch.equal(photo.argmax(0)[inner], mask[inner].long()), seed
        compared += int(inner.sum())
    assert compared > len(SEEDS) * SIZE**2 / 5


@pytest.mark.parametrize("rows", [SIZE, 24, 8])
def test_a_window_shows_as_much_of_the_photo_as_fits_and_void_beside_it(rows):
    """Whatever shape the photo has in its square; how much it was scaled shows in the steps from column to column."""
    shrunk = 0
    for seed in SEEDS:
        photo, mask = augmentation(*letterboxed(*columns(), rows), seed)
        height, width = mask[box := inside_rectangle(mask != VOID)].shape
        assert (photo[:, mask == VOID] == torch.tensor(PADDING)[:, None]).all()
        values = mask[box][0].int()
        scale = width / (1 + abs(int(values[-1] - values[0])))
        assert width == SIZE or {int(values[0]), int(values[-1])} <= {0, 1, SIZE - 2, SIZE - 1}
        assert abs(width - min(SIZE, SIZE * scale)) <= 2 and abs(height - min(SIZE, rows * scale)) <= 2
        shrunk += width < SIZE
    assert shrunk > 10


@pytest.mark.parametrize("rows", [SIZE, 24])
def test_photo_and_mask_agree_to_within_half_a_pixel(rows):
    """Grey by column number: contrast and brightness leave that a straight line, hue and saturation leave it grey."""
    for seed in SEEDS:
        photo, mask = columns()
        photo, mask = augmentation(*letterboxed(photo + 90, mask, rows), seed)
        inner = (mask != VOID) & (mask > 0) & (mask < SIZE - 1)
        grey, column = photo[:, inner].double(), mask[inner].double()
        slope, _ = np.polyfit(column, grey[0], 1)
        assert (grey - grey[:1]).std(1).max() < 1e-3 and abs(slope) > 0.4
        within = grey[0] / slope - column  # where in the pixel of the mask the photo was sampled
        assert within.max() - within.min() <= 1.15, seed  # the fitted slope is a little off, too


def test_edges_are_those_of_the_photo():
    examples = [blocks(), letterboxed(*blocks(), 24), letterboxed(*blocks(), 1)]
    images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
    assert photo_edges(images, labels).tolist() == [[0, 0, 64, 64], [0, 20, 64, 44], [0, 31, 64, 32]]
    assert photo_edges(images.mT, labels.mT).tolist() == [[0, 0, 64, 64], [20, 0, 44, 64], [31, 0, 32, 64]]


def test_an_example_is_the_same_in_any_batch_and_memory_format():
    """To the last bit: a run on several processes, each with its part of a batch, sees what one process sees."""
    examples = [letterboxed(*blocks(), rows) for rows in (64, 48, 24, 40, 64, 11, 30)]
    images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
    seeds = torch.arange(7) * (2**59 + 1)  # PyTorch reads the lower 32 bits only
    whole = augment(images, labels, seeds)
    parts = [augment(images[i:j], labels[i:j], seeds[i:j]) for i, j in ((0, 1), (1, 4), (4, 4), (4, 7))]
    other = augment(images.to(memory_format=torch.channels_last), labels, seeds)
    for again in (tuple(map(torch.cat, zip(*parts, strict=True))), other):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_flips_and_scales_cover_their_range():
    flips, magnifications = set(), []
    for seed in SEEDS:
        _, mask = augmentation(*columns(), seed)
        row = mask[inside_rectangle(mask != VOID)][0].int()
        steps = row.diff()
        assert (steps >= 0).all() or (steps <= 0).all()
        flips.add(bool(row[0] > row[-1]))
        magnifications.append(len(row) / (1 + abs(int(row[-1] - row[0]))))
    assert flips == {False, True}
    assert 0.48 < min(magnifications) < 0.7 and 1.6 < max(magnifications) < 2.1
    assert sum(m < 0.97 for m in magnifications) > 10 and sum(m > 1.03 for m in magnifications) > 10


@pytest.mark.parametrize("axis", [0, 1])
def test_enlarged_pictures_are_cut_and_shrunk_ones_placed_anywhere(axis):
    """Where the window lies in the picture, or the picture in the window: 0 is at the left or top, 1 at the other."""
    cut, placed = [], []
    photo, mask = columns()
    for seed in SEEDS:
        _, augmented = augmentation(photo, mask.T if axis == 0 else mask, seed)
        box = inside_rectangle(augmented != VOID)[axis]
        values = augmented[augmented != VOID]
        before, after = int(values.min()), SIZE - 1 - int(values.max())
        if before + after > 10:
            cut.append(before / (before + after))
        elif box.stop - box.start < SIZE - 10:
            placed.append(box.start / (SIZE - box.stop + box.start))
    assert min(cut) < 0.2 < 0.8 < max(cut) and min(placed) < 0.2 < 0.8 < max(placed)


def test_colours_vary_where_labels_do_not():
    photo = torch.tensor([200, 120, 60], dtype=torch.uint8).view(3, 1, 1).expand(3, SIZE, SIZE).contiguous()
    mask = torch.ones(SIZE, SIZE, dtype=torch.uint8)
    colours = set()
    for seed in range(20):
        augmented, labels = augmentation(photo, mask, seed)
        colours.add(tuple(augmented[:, labels == 1].float().mean(1).round().int().tolist()))
        assert set(labels.unique().tolist()) <= {1, VOID}
    assert len(colours) > 15


def test_masks_get_no_value_they_had_not_and_a_mask_of_void_stays_void():
    """Interpolated class indices would be other classes."""
    values = torch.tensor([0, 7, 20, 200], dtype=torch.uint8)
    mask = values[torch.randint(4, (SIZE, SIZE), generator=torch.Generator().manual_seed(0))]
    for seed in range(20):
        _, augmented = augmentation(mask.expand(3, SIZE, SIZE), mask, seed)
        assert set(augmented.unique().tolist()) <= {0, 7, 20, 200, VOID}
        for nothing in (0, SIZE):  # all padding, and a photo without a mask
            photo, labels = letterboxed(*blocks(), nothing)
            photo, labels = augmentation(photo, torch.full_like(labels, VOID), seed)
            assert photo.isfinite().all() and (labels == VOID).all()


@pytest.mark.parametrize("size", [33, 64])
def test_sizes_stay_colours_are_in_range_and_neither_input_nor_global_generators_change(size):
    images = torch.randint(256, (10, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, before = torch.zeros(10, size, size).byte(), images.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    augmented, mask = augment(images, labels, torch.arange(10))
    assert (augmented.dtype, augmented.shape) == (torch.float32, images.shape)
    assert (mask.dtype, mask.shape) == (torch.uint8, labels.shape)
    assert augmented.min() >= 0 and augmented.max() <= 255
    assert len({photo.numpy().tobytes() for photo in augmented}) == 10
    assert torch.equal(images, before) and (labels == 0).all()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()


def test_draws_and_pixels_are_those_of_before():
    """A run of an earlier version is resumed exactly."""
    images, labels = (torch.stack([part.rot90(turns, (-2, -1)) for turns in range(4)]) for part in blocks())
    seeds = torch.arange(4) * (2**59 + 1)
    photos, masks = augment(*cutmix(images, labels, seeds, 0.5), seeds)
    sums = photos.double().sum((1, 2, 3)) / 1000
    assert sums.tolist() == pytest.approx([1047.879, 815.39, 1210.209, 1336.095], abs=0.1)
    assert masks.long().sum((1, 2)).tolist() == [3830, 3330, 3487, 776192]


def plain_batch(count: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """Photos and masks that are of their number in the batch all over."""
    labels = torch.arange(count, dtype=torch.uint8)[:, None, None].expand(count, side, side)
    return labels[:, None].expand(-1, 3, -1, -1), labels


def test_cutmix_gives_a_box_of_the_photo_before_with_its_mask():
    images, labels = plain_batch(200)
    mixed_images, mixed = cutmix(images, labels, torch.arange(200), 1.0)
    assert torch.equal(mixed_images, mixed[:, None].expand(-1, 3, -1, -1))
    assert (images == plain_batch(200)[0]).all(), "the input is as it was"
    areas, places = [], []
    for number in range(200):
        box = mixed[number] != number
        assert (mixed[number][box] == (number - 1) % 200).all()
        rows, columns = (box.any(axis).nonzero().flatten() for axis in (1, 0))
        assert box.sum() == len(rows) * len(columns) and abs(len(rows) - len(columns)) <= 1
        areas.append(len(rows) * len(columns) / 64**2)
        places.append((rows[0].item(), columns[0].item()))
    assert 0.28 < min(areas) < 0.33 and 0.67 < max(areas) < 0.72
    assert len(set(places)) > 100


def test_cutmix_mixes_so_many_and_by_the_seed_alone():
    images, labels = plain_batch(200)
    seeds = torch.arange(200)
    shares = []
    for probability in (0.0, 0.3, 1.0):
        changed = cutmix(images, labels, seeds, probability)[1] != labels
        shares.append(changed.flatten(1).any(1).float().mean().item())
        order = torch.randperm(200)
        again = cutmix(images, labels, seeds[order], probability)[1] != labels
        assert torch.equal(again, changed[order])
    assert shares[0] == 0 and shares[1] == pytest.approx(0.3, abs=0.1) and shares[2] == 1
    alone = cutmix(images[:1], labels[:1], seeds[:1], 1.0)
    assert torch.equal(alone[1], labels[:1])
    assert len(cutmix(images[:0], labels[:0], seeds[:0], 1.0)[1]) == 0


# ---------------------------------------------------------------------------------------------------- resizing


def test_params_allow_every_way_of_resizing():
    assert all(Params.fault("resize", name) is None for name in RESIZES) and Params().resize == "squash"
    assert all(f'"{name}"' in Params.fault("resize", "nonesuch") for name in RESIZES)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(50, 30), (3, 700), (1, 1)], ids=str)
def test_photo_and_mask_become_squares(resize, size):
    photo, mask = to_square(Image.new("RGB", size), Image.new("P", size), 32, resize)
    assert (photo.size, photo.mode, mask.size) == ((32, 32), "RGB", (32, 32))
    assert to_square(Image.new("RGB", size), None, 32, resize)[1] is None


@pytest.mark.parametrize(
    ("size", "box"),
    [((50, 30), (0, 6, 32, 25)), ((30, 50), (6, 0, 25, 32)), ((9, 9), (0, 0, 32, 32)), ((4000, 1), (0, 16, 32, 17))],
    ids=str,
)
def test_a_letterbox_keeps_the_shape_and_pads_both_sides_alike(size, box):
    photo, mask = to_square(Image.new("RGB", size, "white"), Image.new("P", size, 7), 32, "letterbox")
    assert photo.getbbox() == (0, 0, 32, 32)
    inside = np.zeros((32, 32), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert (np.array(photo) == np.where(inside[..., None], 255, PADDING)).all()
    assert (np.array(mask) == np.where(inside, 7, VOID)).all()


def test_resizing_averages_the_photo_when_it_shrinks():
    """Picking single pixels of a fine chequerboard would give black and white."""
    board = (np.indices((128, 96)).sum(0) % 2 * 255).astype(np.uint8)
    photo, _ = to_square(Image.fromarray(board).convert("RGB"), None, 32, "squash")
    inner = np.asarray(photo, dtype=int)[2:-2, 2:-2]
    assert abs(inner - 127.5).max() < 12


@pytest.mark.parametrize("resize", RESIZES)
def test_resizing_keeps_photo_and_mask_aligned_and_blends_no_labels(resize):
    side = np.zeros((90, 130), dtype=np.uint8)
    side[40:, 70:] = 255
    photo, mask = to_square(Image.fromarray(side).convert("RGB"), Image.fromarray(side), 32, resize)
    inside = np.asarray(photo)[..., 1] != PADDING[1]
    disagree = inside & ((np.asarray(photo)[..., 0] > 127) != (np.asarray(mask) > 127))
    assert disagree.sum() <= 32  # less than a pixel along the outline
    assert set(np.unique(mask)) <= {0, 255}


# ---------------------------------------------------------------------------------------------------- network input


def test_input_is_normalised_as_formula_and_torchvision_have_it():
    images = torch.arange(2 * 3 * 12 * 20).remainder(256).to(torch.uint8).view(2, 3, 12, 20)  # every value there is
    before = images.clone()
    last, first = (to_input(images, "cpu", channels_last=channels_last) for channels_last in (True, False))
    pixels = images.numpy().astype(np.float64) / 255
    naive = np.stack([(pixels[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], axis=1)
    assert first.dtype == torch.float32 and torch.equal(images, before)
    np.testing.assert_allclose(first.numpy(), naive, rtol=1e-5, atol=2e-6)
    published = torchvision_normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(first, published, rtol=1e-5, atol=2e-6, check_stride=False)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert first.is_contiguous() and torch.equal(last, first)
    plain = to_input(images, "cpu", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(plain, images / 255, check_stride=False)
