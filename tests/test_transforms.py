"""Resizing, normalisation, and the augmentation that must move photo and mask together."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad
from torchvision.transforms.v2.functional import normalize as torchvision_normalize

from model.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation, squash, to_input
from model.voc import VOID

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


@pytest.fixture(scope="module")
def augmentation() -> Augmentation:
    return Augmentation(SIZE)


@pytest.fixture(scope="module")
def augmented_blocks(augmentation) -> list[tuple[Tensor, Tensor]]:
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


def test_void_padding_surrounds_the_whole_shrunk_picture(augmented_blocks):
    _, original = blocks()
    shrunk = 0
    for seed, (_, mask) in enumerate(augmented_blocks):
        box = inside_rectangle(mask != VOID)
        side = mask[box].shape[0]
        assert mask[box].shape == (side, side) and side >= SIZE // 2
        if side < SIZE:
            shrunk += 1
            whole = interpolate(original[None, None].float(), size=(side, side), mode="nearest")[0, 0]
            assert any(torch.equal(mask[box].float(), candidate) for candidate in (whole, whole.flip(1))), seed
    assert shrunk > 10


def test_padding_of_the_photo_is_the_mean_colour(augmented_blocks):
    """Black would be an edge that no photo has; the jitter changes the colour, all of it alike."""
    for photo, mask in augmented_blocks:
        padding = photo[:, mask == VOID]
        assert (padding == padding[:, :1]).all()
        if padding.numel():
            assert padding.min() > 60 and padding.max() < 190


def test_void_of_the_mask_itself_stays_void(augmentation):
    photo, mask = blocks()
    for seed in range(10):
        _, augmented = augmentation(photo, torch.full_like(mask, VOID), seed)
        assert (augmented == VOID).all()


def test_flips_and_scales_cover_their_range(augmentation):
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
def test_enlarged_pictures_are_cut_and_shrunk_ones_placed_anywhere(augmentation, axis):
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


def test_colours_vary_where_labels_do_not(augmentation):
    photo = torch.tensor([200, 120, 60], dtype=torch.uint8).view(3, 1, 1).expand(3, SIZE, SIZE).contiguous()
    mask = torch.ones(SIZE, SIZE, dtype=torch.uint8)
    colours = set()
    for seed in range(20):
        augmented, labels = augmentation(photo, mask, seed)
        colours.add(tuple(augmented[:, labels == 1].float().mean(1).round().int().tolist()))
        assert set(labels.unique().tolist()) <= {1, VOID}
    assert len(colours) > 15


def test_masks_get_no_value_they_had_not(augmentation):
    """Interpolated class indices would be other classes."""
    values = torch.tensor([0, 7, 20, 200], dtype=torch.uint8)
    mask = values[torch.randint(4, (SIZE, SIZE), generator=torch.Generator().manual_seed(0))]
    for seed in SEEDS:
        _, augmented = augmentation(mask.expand(3, SIZE, SIZE), mask, seed)
        assert set(augmented.unique().tolist()) <= {0, 7, 20, 200, VOID}


@pytest.mark.parametrize("size", [32, 33, 64])
def test_sizes_and_types_stay(size):
    photo, mask = torch.zeros(3, size, size, dtype=torch.uint8), torch.zeros(size, size, dtype=torch.uint8)
    for seed in range(10):
        for before, after in zip((photo, mask), Augmentation(size)(photo, mask, seed), strict=True):
            assert type(after) is Tensor and after.dtype == torch.uint8 and after.shape == before.shape


def test_equal_seeds_give_equal_results_whatever_came_before(augmentation):
    once = [augmentation(*blocks(), seed) for seed in range(5)]
    torch.manual_seed(99)
    again = [Augmentation(SIZE)(*blocks(), seed) for seed in reversed(range(5))][::-1]
    for (photo, mask), (other_photo, other_mask) in zip(once, again, strict=True):
        assert torch.equal(photo, other_photo) and torch.equal(mask, other_mask)


def test_different_seeds_give_different_results(augmentation):
    assert len({augmentation(*blocks(), seed)[0].numpy().tobytes() for seed in range(30)}) == 30


def test_augmentation_leaves_every_global_generator_alone(augmentation):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    augmentation(*blocks(), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and (np.random.get_state()[1] == before[2]).all()


@pytest.mark.gpu
def test_augmentation_leaves_the_generator_of_the_gpu_alone(augmentation):
    """Dropout on the GPU must not depend on which example was fetched last."""
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    augmentation(*blocks(), 1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_augmentation_does_not_write_into_its_input(augmentation):
    photo, mask = blocks()
    for seed in range(10):
        augmentation(photo, mask, seed)
    assert all(torch.equal(used, fresh) for used, fresh in zip((photo, mask), blocks(), strict=True))


# ---------------------------------------------------------------------------------------------------- resizing


def test_squash_gives_a_square_of_photo_and_mask():
    photo, mask = squash(Image.new("RGB", (50, 30)), Image.new("P", (50, 30)), 32)
    assert (photo.size, photo.mode, mask.size, mask.mode) == ((32, 32), "RGB", (32, 32), "P")


def test_squash_works_without_a_mask():
    assert squash(Image.new("RGB", (50, 30)), None, 32)[1] is None


def test_squash_averages_the_photo_when_it_shrinks():
    """Picking single pixels of a fine chequerboard would give black and white."""
    board = (np.indices((128, 96)).sum(0) % 2 * 255).astype(np.uint8)
    photo, _ = squash(Image.fromarray(board).convert("RGB"), None, 32)
    inner = np.asarray(photo, dtype=int)[2:-2, 2:-2]
    assert abs(inner - 127.5).max() < 12


def test_squash_picks_labels_and_never_blends_them():
    labels = np.random.default_rng(0).choice(np.array([0, 7, 20, 255], dtype=np.uint8), (77, 51))
    _, mask = squash(Image.new("RGB", (51, 77)), Image.fromarray(labels), 32)
    assert set(np.unique(mask)) <= {0, 7, 20, 255}


def test_squash_keeps_photo_and_mask_aligned():
    side = np.zeros((90, 130), dtype=np.uint8)
    side[40:, 70:] = 255
    photo, mask = squash(Image.fromarray(side).convert("RGB"), Image.fromarray(side), 32)
    disagree = (np.asarray(photo)[..., 0] > 127) != (np.asarray(mask) > 127)
    assert disagree.sum() <= 32  # less than a pixel along the outline


# ---------------------------------------------------------------------------------------------------- network input


@pytest.fixture
def images() -> Tensor:
    """Every value there is, in a batch whose four sizes all differ."""
    return torch.arange(2 * 3 * 12 * 20).remainder(256).to(torch.uint8).view(2, 3, 12, 20)


def test_input_is_normalised_as_the_formula_says(images):
    x = to_input(images, "cpu")
    pixels = images.numpy().astype(np.float64) / 255
    naive = np.stack([(pixels[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], axis=1)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), naive, rtol=1e-5, atol=2e-6)


def test_input_is_normalised_as_torchvision_does_it(images):
    published = torchvision_normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(to_input(images, "cpu"), published, rtol=1e-5, atol=2e-6, check_stride=False)


def test_input_without_normalisation_lies_between_0_and_1(images):
    x = to_input(images, "cpu", normalize=False)
    torch.testing.assert_close(x, images / 255, check_stride=False)
    assert (x.min(), x.max()) == (0, 1)


def test_memory_layout_changes_strides_and_no_value(images):
    last, first = (to_input(images, "cpu", channels_last=channels_last) for channels_last in (True, False))
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert first.is_contiguous() and torch.equal(last, first)


@pytest.mark.parametrize("channels_last", [True, False])
def test_input_leaves_the_bytes_it_was_made_from(images, channels_last):
    before = images.clone()
    to_input(images, "cpu", channels_last=channels_last)
    assert torch.equal(images, before)
