"""Lists, files and faults of a data set in VOC's layout; the cache; loaders; colours of classes."""

import os
import pickle
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps
from torch import Tensor

from model import UserError, data_loader, transforms
from model.data_loader import Batches, SegmentationDataset, make_loader
from model.layouts import Split, class_names, find_split
from model.photos import read_mask, read_photo
from model.voc import CLASS_NAMES, ERROR_COLOUR, VOID, colour_mask, indices_from_colours, palette, voc_colours

SIZE = 32


def load(folder: Path, split: str = "train", *, num_classes: int = 21, **options) -> SegmentationDataset:
    names = class_names(find_split("voc", folder, split), num_classes)
    return SegmentationDataset(find_split("voc", folder, split), class_names=names, **{"image_size": SIZE} | options)


def arrays(dataset: SegmentationDataset) -> tuple[Tensor, Tensor]:
    """All photos and all labels."""
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.stack(labels)


def same(first: SegmentationDataset, second: SegmentationDataset) -> bool:
    return all(torch.equal(one, other) for one, other in zip(arrays(first), arrays(second), strict=True))


def photo(data: Path, id_: str) -> Path:
    return data / "JPEGImages" / f"{id_}.jpg"


def mask(data: Path, id_: str) -> Path:
    return data / "SegmentationClass" / f"{id_}.png"


def blank(width: int, height: int) -> Image.Image:
    """A photo of that size."""
    return Image.new("RGB", (width, height))


def cached(data: Path) -> list[str]:
    """What is in the cache but for lock files."""
    return sorted(path.name for path in (data / ".cache").glob("*") if path.suffix != ".lock")


def as_devkit(data: Path, root: Path) -> None:
    """Move a data set from the plain layout to the devkit's, below root."""
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for path in data.iterdir():
        path.rename((root / "ImageSets" / "Segmentation" if path.suffix == ".txt" else root) / path.name)


# ---------------------------------------------------------------------------------------------------- layouts, lists


def test_devkit_and_plain_layout_give_the_same(data, tmp_path):
    plain = load(data, cache=False)
    ids, examples = plain.split.ids, arrays(plain)
    as_devkit(data, tmp_path / "kit" / "VOCdevkit" / "VOC2012")
    for given in ("VOCdevkit/VOC2012", "VOCdevkit", "."):
        devkit = load(tmp_path / "kit" / given)
        assert devkit.split.ids == ids
        assert all(torch.equal(one, other) for one, other in zip(arrays(devkit), examples, strict=True))


def test_a_folder_without_photos_or_lists_says_how_to_get_them(data, tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} holds no data set .*build_dataset\.py"):
        find_split("voc", tmp_path, "train")
    for path in data.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"build_dataset\.py .*--split"):
        find_split("voc", data, "train")


def test_examples_come_in_the_order_of_the_list(data):
    images, labels = arrays(load(data))
    (data / "train.txt").write_text("train4\ntrain0\ntrain2\n")
    dataset = load(data)
    assert dataset.split.ids == ["train4", "train0", "train2"]
    assert torch.equal(arrays(dataset)[0], images[[4, 0, 2]]) and torch.equal(arrays(dataset)[1], labels[[4, 0, 2]])


def test_lists_written_on_windows_are_read(data):
    (data / "train.txt").write_bytes("\ufefftrain0\r\n\r\n  train1 \r\n\r\n".encode())
    assert find_split("voc", data, "train").ids == ["train0", "train1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", r"train\.txt lists no image"),
        (b"train0\ntrain1\ntrain0\n", "split train of .* has the photo train0 more than once"),
        (b"train0\ntrain\xff0\n", r"2 faults in split train of .*\n  no photo .*train\ufffd0\.jpg"),
        (None, r"no list .*train\.txt; splits here: val$"),
    ],
)
def test_an_unusable_list_is_refused(data, content, message):
    (data / "train.txt").unlink()
    if content is not None:
        (data / "train.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_split("voc", data, "train")


def test_classes_of_one_name_are_refused(data):
    (data / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="has the class name a more than once"):
        find_split("voc", data, "train")


def test_every_missing_photo_and_mask_is_named(data):
    missing = photo(data, "train1"), mask(data, "train2"), mask(data, "train5")
    for path in missing:
        path.unlink()
    missing[0].symlink_to("nowhere")
    with pytest.raises(UserError, match="3 faults") as fault:
        find_split("voc", data, "train")
    assert all(str(path) in str(fault.value) for path in missing) and "train3" not in str(fault.value)


def test_a_split_without_masks_has_void_labels(data):
    load(data, "val")
    for path in (data / "SegmentationClass").glob("val*"):
        path.unlink()
    dataset = load(data, "val")
    assert dataset.split.masks is None
    assert (arrays(dataset)[1] == VOID).all() and arrays(dataset)[0].float().std() > 10


def test_class_names_are_those_of_classes_txt_or_vocs_or_numbers(data, tmp_path):
    assert class_names(find_split("voc", data, "train"), 21) == list(CLASS_NAMES)
    assert class_names(find_split("voc", data, "train"), 3) == ["0", "1", "2"]
    (data / "classes.txt").write_text("background\nroad\n")
    assert class_names(find_split("voc", data, "train"), 2) == ["background", "road"]
    with pytest.raises(UserError, match=r'classes\.txt names 2 classes, num_classes is 4; .* "num_classes": 2 '):
        class_names(find_split("voc", data, "train"), 4)
    as_devkit(data, tmp_path / "VOC2012")
    assert class_names(find_split("voc", tmp_path, "train"), 2) == ["background", "road"]


# ---------------------------------------------------------------------------------------------------- files


def test_an_example_is_uint8_photo_and_labels_resized_by_area_and_to_nearest(data):
    images, labels = arrays(load(data))
    assert images.shape == (6, 3, SIZE, SIZE) and labels.shape == (6, SIZE, SIZE)
    assert images.dtype == labels.dtype == torch.uint8
    with Image.open(photo(data, "train0")) as original:
        reduced = np.asarray(original.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(images[0], reduced)
    with Image.open(mask(data, "train0")) as original:
        assert np.array_equal(labels[0], original.resize((SIZE, SIZE), Image.Resampling.NEAREST))


def test_a_grey_mask_is_the_same_as_a_palette_mask(data):
    split = find_split("voc", data, "train")
    with Image.open(split.masks[0]) as image:
        indices = np.array(image)
    Image.fromarray(indices).save(split.masks[0])
    found = read_mask(split.masks[0], blank(indices.shape[1], indices.shape[0]), 21)
    assert found.mode == "L" and np.array_equal(found, indices)


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".jpg"), ("CMYK", ".jpg"), ("RGBA", ".png"), ("LA", ".png")])
def test_photos_of_other_modes_are_read(data, mode, suffix):
    with Image.open(photo(data, "train0")) as image:
        expected, other = (
            image.convert("L").convert("RGB") if "L" in mode else image.convert("RGB"),
            image.convert(mode),
        )
    if "A" in mode:
        other.putalpha(77)  # dropped, not blended with black
    other.save(data / f"other{suffix}", **{"quality": 95} if suffix == ".jpg" else {})
    found = read_photo(data / f"other{suffix}")
    assert found.mode == "RGB" and abs(np.array(found, dtype=int) - np.array(expected)).mean() < 3


def test_masks_of_one_bit_hold_indices(tmp_path):
    labels = np.random.default_rng(0).random((16, 24)) < 0.5
    Image.fromarray(labels).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", blank(24, 16), 21), labels)


def test_photos_of_16_bit_keep_their_high_byte(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 256 + 99).save(tmp_path / "photo.png")
    assert np.array_equal(np.array(read_photo(tmp_path / "photo.png"))[..., 1], grey)


def test_suffixes_may_be_capital(data):
    photo(data, "train0").rename(photo(data, "train0").with_suffix(".JPG"))
    assert find_split("voc", data, "train").images[0].suffix == ".JPG"


def exif(*entries: tuple[int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, value); Pillow would not write a faulty one."""
    body = b"".join(struct.pack("<HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


ORIENTATION_6 = (0x112, 3, b"\6\0\0\0")  # a camera held upright
DAMAGED_WIDTH = (0x100, 2, b"ab\0\0")  # text where a number belongs, as some cameras and editors write it


@pytest.mark.parametrize("entries", [[ORIENTATION_6], [DAMAGED_WIDTH, ORIENTATION_6]], ids=["whole", "damaged"])
def test_a_photo_taken_upright_is_turned_upright(data, entries):
    with Image.open(photo(data, "train0")) as upright:
        lying = upright.transpose(Image.Transpose.ROTATE_90)
        expected = np.array(upright, dtype=int)
    lying.save(data / "turned.jpg", quality=100, subsampling=0, exif=exif(*entries))
    found = np.array(read_photo(data / "turned.jpg"))
    assert found.shape == expected.shape != np.array(lying).shape and abs(found - expected).mean() < 1


# ---------------------------------------------------------------------------------------------------- faulty files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def repaint(path: Path) -> None:
    """The indices of a mask replaced by the colours they stand for."""
    with Image.open(path) as image:
        colours = image.convert("RGB")
    colours.save(path)


def crop(path: Path) -> None:
    with Image.open(path) as image:
        smaller = image.crop((0, 0, 50, 40))
    smaller.save(path)


def paint(path: Path, index: int) -> None:
    """One class all over a mask."""
    with Image.open(path) as image:
        labels = np.full_like(np.array(image), index)
    colour_mask(labels).save(path)


FAULTS = [
    (truncate, photo, "cannot be read as an image"),
    (truncate, mask, "cannot be read as an image"),
    (lambda path: path.write_bytes(b""), photo, "cannot be read as an image"),
    (repaint, mask, "the mask is RGB, not a palette or grey PNG of class indices"),
    (crop, mask, "the mask is 50x40, its photo "),
    (lambda path: paint(path, 77), mask, "class index 77 "),
]


@pytest.mark.parametrize("cache", [True, False])
def test_all_faulty_files_are_named_at_once_and_leave_no_cache(data, cache):
    for index, (spoil, kind, _) in enumerate(FAULTS):
        spoil(kind(data, f"train{index}"))
    with pytest.raises(UserError, match="6 faults in split train") as fault:
        load(data, cache=cache)
    lines = str(fault.value).splitlines()[1:]
    for line, (index, (_, kind, message)) in zip(lines, enumerate(FAULTS), strict=True):
        assert f"{kind(data, f'train{index}')}: " in line and message in line
    assert cached(data) == []


def test_a_single_fault_is_one_line_and_a_mended_data_set_loads(data):
    whole = photo(data, "train5").read_bytes()
    truncate(photo(data, "train5"))
    with pytest.raises(UserError, match=rf"^split train: {photo(data, 'train5')}: cannot be read.*$"):
        load(data)
    photo(data, "train5").write_bytes(whole)
    assert same(load(data), load(data, cache=False))


def test_no_photo_starts_ghostscript(tmp_path, monkeypatch):
    """Pillow hands it what calls itself PostScript, whatever the suffix."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("was started"))
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg", format="EPS")
    with pytest.raises(UserError, match=r"photo\.jpg: cannot be read as an image"):
        read_photo(tmp_path / "photo.jpg")


def test_too_little_memory_is_no_fault_of_the_photo(data, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        read_photo(photo(data, "train0"))


@pytest.mark.parametrize(("index", "allowed"), [(20, True), (21, False), (254, False), (255, True)])
def test_labels_end_below_num_classes_and_void_is_always_allowed(tmp_path, index, allowed):
    Image.new("L", (9, 8), index).save(tmp_path / "mask.png")
    if allowed:
        assert (np.array(read_mask(tmp_path / "mask.png", blank(9, 8), 21)) == index).all()
    else:
        with pytest.raises(UserError, match=rf"mask\.png: class index {index} .*num_classes = 21"):
            read_mask(tmp_path / "mask.png", blank(9, 8), 21)


# ---------------------------------------------------------------------------------------------------- the cache


def test_cache_changes_no_value_and_without_it_nothing_is_written(data):
    plain = load(data, cache=False)
    assert plain.cache_file is None and not (data / ".cache").exists()
    assert same(load(data), plain)


def test_files_are_decoded_in_several_rounds(data, monkeypatch):
    monkeypatch.setattr(data_loader, "AT_ONCE", 4)
    assert same(load(data), load(data, cache=False))


def test_cache_is_used_again_and_is_what_is_read(data):
    before = load(data)
    first = before.cache_file.stat()
    stored = np.load(before.cache_file, mmap_mode="r+")
    stored[2] = 9
    stored.flush()
    again = load(data)
    assert again.cache_file == before.cache_file and again.cache_file.stat().st_ino == first.st_ino
    assert (again[2][0] == 9).all() and (again[2][1] == 9).all()


def test_cache_follows_the_files(data):
    """Also a change that keeps a file's size, and masks that are taken away."""
    load(data)
    with Image.open(photo(data, "train2")) as image:
        Image.new("RGB", image.size, (0, 0, 0)).save(photo(data, "train2"))
    assert (load(data)[2][0] == 0).all()
    paint(mask(data, "train2"), 5)
    size = mask(data, "train2").stat().st_size
    assert (load(data)[2][1] == 5).all()
    paint(mask(data, "train2"), 6)
    assert mask(data, "train2").stat().st_size == size and (load(data)[2][1] == 6).all()
    shutil.rmtree(data / "SegmentationClass")
    assert (arrays(load(data))[1] == VOID).all()


def test_cache_follows_size_resizing_padding_and_number_of_classes(data):
    """All but those that differ in the padding alone are kept: experiments that compare them read them in turn."""
    variants = [{}, {"image_size": 48}, {"resize": "letterbox"}, {"num_classes": 22}]
    files = [load(data, **variant).cache_file for variant in variants]
    assert len(set(files)) == 4 and [load(data, **variant).cache_file for variant in variants] == files
    assert files[0].name.startswith("train-32px-21classes-")  # the name that squashed photos have always had
    assert load(data, resize="letterbox", padding=(0, 0, 0)).cache_file != files[2]
    assert same(load(data, image_size=48), load(data, image_size=48, cache=False))
    with pytest.raises(UserError, match="num_classes = 2"):
        load(data, num_classes=2)


def test_the_name_and_bytes_of_a_cache_are_those_of_before(tmp_path, monkeypatch):
    """Whoever has decoded a large data set need not do so again."""
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "JPEGImages" / "a.bmp")
    os.utime(tmp_path / "JPEGImages" / "a.bmp", (1, 1))
    monkeypatch.setattr(data_loader, "resize_tag", lambda *args: "tag")  # which may differ by Pillow's version
    split = Split("train", ["a"], [tmp_path / "JPEGImages" / "a.bmp"], None)
    file = SegmentationDataset(split, class_names=["x", "y"], image_size=4).cache_file
    assert file.name == "train-4px-2classes-00fd68c3fc6dcea8.npy"
    header = b"\x93NUMPY\2\0t\0\0\0{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4, 4, 4), }".ljust(127) + b"\n"
    assert file.read_bytes() == header + bytes((1, 2, 3, VOID)) * 16


@pytest.mark.parametrize("part", [0, 1], ids=["photo", "mask"])
def test_cache_follows_a_change_of_resizing_by_itself(data, monkeypatch, part):
    """Whoever changes how photos or masks are resized need not think of the cache."""
    before, to_square = arrays(load(data)), transforms.to_square

    def changed(image, mask, side, resize, padding):
        result = list(to_square(image, mask, side, resize, padding))
        result[part] = result[part] and result[part].transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return tuple(result)

    for module in (transforms, data_loader):
        monkeypatch.setattr(module, "to_square", changed)
    transforms.resize_tag.cache_clear()
    after = arrays(load(data))
    transforms.resize_tag.cache_clear()
    assert torch.equal(after[part], before[part].flip(-2)) and torch.equal(after[1 - part], before[1 - part])


@pytest.mark.parametrize("resize", transforms.RESIZES)
@pytest.mark.parametrize(
    "concerned",
    [
        lambda width, height, side: height > width,
        lambda width, height, side: max(width, height) > 2.5 * min(width, height),
        lambda width, height, side: max(width, height) > side,
        lambda width, height, side: max(width, height) < side,
    ],
    ids=["tall", "long", "larger", "smaller"],
)
def test_the_tag_shows_a_change_that_concerns_some_photos_only(monkeypatch, resize, concerned):
    before, to_square = transforms.resize_tag(64, resize), transforms.to_square

    def changed(image, mask, side, resize, padding):
        square, mask = to_square(image, mask, side, resize, padding)
        return ImageOps.mirror(square) if concerned(*image.size, side) else square, mask

    monkeypatch.setattr(transforms, "to_square", changed)
    assert transforms.resize_tag.__wrapped__(64, resize) != before


def test_files_of_one_name_in_two_folders_are_two_to_the_cache(tmp_path):
    """Of equal size and time as well, as from an archive."""
    for grey, side in enumerate(("left", "right")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / side / "photo.bmp")
        os.utime(tmp_path / side / "photo.bmp", (1, 1))
        split = Split("train", ["a"], [tmp_path / side / "photo.bmp"], None, root=tmp_path)
        assert SegmentationDataset(split, class_names=["x", "y"], image_size=SIZE)[0][0].unique().tolist() == [grey]


def test_stale_caches_are_removed_and_others_kept(data):
    kept = {load(data, "val").cache_file.name, load(data, image_size=48).cache_file.name}
    stale = load(data).cache_file
    stale.with_name(f".{stale.name}.77.tmp").touch()  # of a process that was killed
    paint(mask(data, "train2"), 5)
    fresh = load(data).cache_file
    assert {*cached(data)} == kept | {fresh.name}


def test_processes_that_come_at_once_share_one_cache(data):
    """Threads here, each with a lock of its own as processes have."""
    with ThreadPoolExecutor(3) as pool:
        datasets = list(pool.map(lambda _: load(data), range(3)))
    assert cached(data) == [datasets[0].cache_file.name]
    assert all(same(dataset, datasets[0]) for dataset in datasets)


def test_read_only_data_are_cached_in_the_users_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.chmod(0o555)
    try:
        dataset = load(data)
        assert dataset.cache_file.is_relative_to(tmp_path / "home") and same(dataset, load(data, cache=False))
        assert not (data / ".cache").exists()
    finally:
        data.chmod(0o755)


@pytest.mark.parametrize("cache", [True, False])
def test_a_data_set_sent_to_a_worker_is_small_and_whole(data, cache):
    dataset = load(data, cache=cache)
    sent = pickle.dumps(dataset)
    assert len(sent) < 4 * SIZE**2  # one example
    assert same(pickle.loads(sent), dataset)


def test_writing_into_an_example_leaves_the_data_set_as_it_is(data):
    dataset = load(data)
    images, labels = (tensor.clone() for tensor in dataset[0])
    for tensor in dataset[0]:
        tensor.zero_()
    assert torch.equal(dataset[0][0], images) and torch.equal(dataset[0][1], labels)


# ---------------------------------------------------------------------------------------------------- loaders


def test_loader_without_seed_keeps_the_order_of_the_list(data):
    (data / "train.txt").write_text("train3\ntrain1\ntrain5\ntrain0\ntrain2\n")
    dataset = load(data)
    loaded = list(make_loader(dataset, batch_size=2))
    assert [len(images) for images, _ in loaded] == [2, 2, 1]
    for found, expected in zip(map(torch.cat, zip(*loaded, strict=True)), arrays(dataset), strict=True):
        assert torch.equal(found, expected)


def test_workers_that_stay_change_no_batch_of_any_epoch_nor_the_global_generator(data):
    dataset = load(data)
    before = torch.get_rng_state()
    loaders = [make_loader(dataset, batch_size=2, seed=1, num_workers=workers) for workers in (2, 0)]
    for epoch in range(2):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        for ours, theirs in zip(*loaders, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def epoch_of(seed: int, epoch: int) -> list[tuple[int, int]]:
    batches = Batches(50, 7, seed=seed)
    batches.set_epoch(epoch)
    return list(chain(*batches))


def test_every_epoch_is_a_permutation_and_has_seeds_of_its_own():
    epochs = [epoch_of(230, epoch) for epoch in range(4)]
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(50))}) == 5
    assert len({seed for epoch in epochs for _, seed in epoch}) == 200


def test_an_epoch_depends_on_seed_and_number_alone():
    first = epoch_of(230, 3)
    torch.manual_seed(1)
    assert epoch_of(230, 3) == first != epoch_of(231, 3)
    assert epoch_of(231, 2) != first  # as seed + epoch would have it
    assert first[:2] == [(33, 784608008575382336), (1, 1158399803396252114)]  # as in runs that are to be resumed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_for_a_gpu_are_on_their_way(data):
    dataset = load(data, image_size=48)
    plain = make_loader(dataset, batch_size=4, seed=3)
    loader = make_loader(dataset, batch_size=4, seed=3, num_workers=2, device="cuda")
    for ours, theirs in zip(loader, plain, strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            assert part.is_pinned() and torch.equal(part, expected)


# ---------------------------------------------------------------------------------------------------- colours


def test_palette_is_the_devkits():
    """Its loop, bit by bit: three bits of the index a round, into ever lower bits of red, green and blue."""
    for index, colour in enumerate(palette().tolist()):
        rest, expected = index, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                expected[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        assert colour == expected


@pytest.mark.parametrize("count", [3, 21, 22, 255])
def test_no_two_classes_have_one_colour_nor_that_of_anything_else(count):
    names = ["Background", *(f"kind {index}" for index in range(1, count))]
    colours = [*map(tuple, palette(names)[[*range(count), VOID]].tolist()), ERROR_COLOUR, (255, 255, 255)]
    assert len(set(colours)) == count + 3 and colours[0] == (0, 0, 0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_hold_indices(tmp_path, bits):
    labels = np.arange(16 * 24).reshape(16, 24) % 2**bits
    rows = np.unpackbits(labels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(16, -1)
    scanlines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 24, 16, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    (tmp_path / "mask.png").write_bytes(png)
    assert np.array_equal(read_mask(tmp_path / "mask.png", blank(24, 16), 21), labels)


def test_indices_come_back_from_colours():
    indices = np.array([*range(len(CLASS_NAMES)), VOID], dtype=np.uint8)
    indices = np.random.default_rng(0).permutation(np.tile(indices, 4)).reshape(8, 11)
    colours = np.array(colour_mask(indices).convert("RGB"))
    found = indices_from_colours(colours, voc_colours())
    assert found.dtype == np.uint8 and np.array_equal(found, indices)


def test_a_colour_of_no_class_is_refused_by_name():
    """Among them that of index 21, which the palette has and VOC's classes have not."""
    for colour in ((0, 0, 1), (255, 255, 255), tuple(palette()[21].tolist())):
        colours = np.zeros((4, 5, 3), dtype=np.uint8)
        colours[2, 3] = colour
        with pytest.raises(UserError, match=rf"colour \({colour[0]}, {colour[1]}, {colour[2]}\)"):
            indices_from_colours(colours, voc_colours())


def test_two_photos_of_one_name_are_refused(data):
    shutil.copy(photo(data, "train0"), photo(data, "train0").with_suffix(".jpeg"))
    with pytest.raises(UserError, match=r"train0\.(jpg|jpeg) and .*train0\.(jpg|jpeg) have the same name"):
        find_split("voc", data, "train")
