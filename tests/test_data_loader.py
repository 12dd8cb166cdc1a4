"""Layouts, lists, files and faults of a data set; the cache; loaders; VOC's palette."""

import os
import pickle
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps
from torch import Tensor

from model import UserError, data_loader, photos, refuse_irregular, transforms
from model.data_loader import EpochSampler, SegmentationDataset, make_loader
from model.layouts import Split, VOCFolders, class_names, find_split
from model.photos import read_example
from model.voc import CLASS_NAMES, VOID, indices_from_colours, palette
from visualize import colour_mask

SIZE = 32
STRANGER = 54321  # a user


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


def cached(data: Path) -> list[str]:
    """What is in the cache but for lock files."""
    return sorted(path.name for path in (data / ".cache").glob("*") if path.suffix != ".lock")


def as_devkit(data: Path, root: Path) -> None:
    """Move a data set from the plain layout to the devkit's, below root."""
    root.mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for path in data.iterdir():
        path.rename((root / "ImageSets" / "Segmentation" if path.suffix == ".txt" else root) / path.name)


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("given", ["VOCdevkit/VOC2012", "VOCdevkit", "."])
def test_devkit_and_plain_layout_give_the_same(data, tmp_path, given):
    plain = load(data, cache=False)
    ids, images, labels = plain.split.ids, *arrays(plain)
    as_devkit(data, tmp_path / "kit" / "VOCdevkit" / "VOC2012")
    devkit = load(tmp_path / "kit" / given)
    assert devkit.split.ids == ids
    assert torch.equal(arrays(devkit)[0], images) and torch.equal(arrays(devkit)[1], labels)


def test_a_folder_without_photos_says_how_to_get_some(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} holds no data set .*build_dataset\.py"):
        VOCFolders.find(tmp_path)


def test_photos_without_lists_say_how_to_write_them(data):
    for path in data.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"build_dataset\.py .*--split"):
        find_split("voc", data, "train")


# ---------------------------------------------------------------------------------------------------- lists


def test_examples_come_in_the_order_of_the_list(data):
    images, labels = arrays(load(data))
    (data / "train.txt").write_text("train4\ntrain0\ntrain2\n")
    dataset = load(data)
    assert dataset.split.ids == ["train4", "train0", "train2"]
    assert torch.equal(arrays(dataset)[0], images[[4, 0, 2]]) and torch.equal(arrays(dataset)[1], labels[[4, 0, 2]])


def test_lists_written_on_windows_are_read(data):
    (data / "train.txt").write_bytes("\ufefftrain0\r\n\r\n  train1 \r\n\r\n".encode())
    assert find_split("voc", data, "train").ids == ["train0", "train1"]


def test_ids_may_hold_spaces_accents_and_dots(data):
    ids = ["Straße à côté", "地図", "v1.5 final"]
    for old, new in zip(("train0", "train1", "train2"), ids, strict=True):
        photo(data, old).rename(photo(data, new))
        mask(data, old).rename(mask(data, new))
    (data / "train.txt").write_text("\n".join(ids), encoding="utf-8")
    dataset = load(data)
    assert dataset.split.ids == ids and len(arrays(dataset)[0]) == 3


def test_an_empty_list_is_refused(data):
    (data / "train.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"train\.txt lists no image"):
        find_split("voc", data, "train")


def test_a_repeated_id_is_refused_by_name(data):
    (data / "train.txt").write_text("train0\ntrain1\ntrain0\n")
    with pytest.raises(UserError, match="train0 more than once"):
        find_split("voc", data, "train")


def test_an_absent_list_names_the_splits_there_are(data):
    (data / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no list .*test\.txt; splits here: train, val$"):
        find_split("voc", data, "test")


def test_a_list_that_is_not_text_is_refused(data):
    (data / "train.txt").write_bytes(b"train\xff0\n")
    with pytest.raises(UserError, match=r"train\.txt is not a UTF-8"):
        find_split("voc", data, "train")


def test_two_photos_of_one_name_are_refused(data):
    shutil.copy(photo(data, "train0"), photo(data, "train0").with_suffix(".jpeg"))
    with pytest.raises(UserError, match=r"train0\.(jpg|jpeg) and .*train0\.(jpg|jpeg) have the same name"):
        find_split("voc", data, "train")


def test_every_missing_photo_and_mask_is_named(data):
    photo(data, "train1").unlink()
    mask(data, "train2").unlink()
    mask(data, "train5").unlink()
    with pytest.raises(UserError, match="3 faults") as fault:
        find_split("voc", data, "train")
    missing = photo(data, "train1"), mask(data, "train2"), mask(data, "train5")
    assert all(str(path) in str(fault.value) for path in missing)
    assert "train0" not in str(fault.value)


def test_a_long_list_of_faults_is_cut_short(data):
    (data / "train.txt").write_text("train0\n" + "".join(f"absent{index}\n" for index in range(30)))
    with pytest.raises(UserError, match="60 faults") as fault:
        find_split("voc", data, "train")
    assert str(fault.value).count("\n") == 21 and "and 40 more" in str(fault.value)


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_split_without_masks_has_void_labels(data, folder_too):
    if folder_too:
        shutil.rmtree(data / "SegmentationClass")
    else:
        for path in (data / "SegmentationClass").glob("val*"):
            path.unlink()
    dataset = load(data, "val")
    assert dataset.split.masks is None
    assert (arrays(dataset)[1] == VOID).all() and arrays(dataset)[0].float().std() > 10


# ---------------------------------------------------------------------------------------------------- class names


def test_class_names_come_from_classes_txt_first(data):
    names = [f"part {index}" for index in range(21)]
    (data / "classes.txt").write_text("\n".join(names))
    assert class_names(find_split("voc", data, "train"), 21) == names


def test_class_names_behind_a_link_to_nowhere_are_missed(data):
    (data / "classes.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no list .*classes\.txt"):
        class_names(find_split("voc", data, "train"), 21)


def test_class_names_of_a_devkit_are_beside_its_lists(data, tmp_path):
    (data / "classes.txt").write_text("background\nroad\n")
    as_devkit(data, tmp_path / "VOC2012")
    assert class_names(find_split("voc", tmp_path, "train"), 2) == ["background", "road"]


def test_a_wrong_count_of_class_names_is_refused(data):
    (data / "classes.txt").write_text("background\nroad\nsky\n")
    with pytest.raises(UserError, match=r'classes\.txt names 3 classes, num_classes is 4; .* "num_classes": 3 '):
        class_names(find_split("voc", data, "train"), 4)


def test_class_names_without_classes_txt(data):
    assert class_names(find_split("voc", data, "train"), 21) == list(CLASS_NAMES)
    assert class_names(find_split("voc", data, "train"), 3) == ["0", "1", "2"]


# ---------------------------------------------------------------------------------------------------- files


def test_an_example_is_uint8_photo_and_labels(data):
    images, labels = arrays(load(data))
    assert images.shape == (6, 3, SIZE, SIZE) and labels.shape == (6, SIZE, SIZE)
    assert images.dtype == labels.dtype == torch.uint8


def test_labels_of_real_photos_are_the_mask_resized_to_nearest(voc2012, tmp_path):
    ids = (voc2012 / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:3]
    for path in (photo, mask):
        path(tmp_path, "").parent.mkdir()
        for id_ in ids:
            shutil.copy(path(voc2012, id_), path(tmp_path, id_))
    (tmp_path / "val.txt").write_text("\n".join(ids))
    _, labels = arrays(load(tmp_path, "val", image_size=64))
    for id_, label in zip(ids, labels, strict=True):
        with Image.open(mask(tmp_path, id_)) as original:
            assert np.array_equal(label, original.resize((64, 64), Image.Resampling.NEAREST))
    assert labels.unique().numel() > 2


def test_photos_are_resized_by_area(data):
    images, _ = arrays(load(data))
    with Image.open(photo(data, "train0")) as original:
        reduced = np.asarray(original.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(images[0], reduced)


def test_a_grey_mask_is_the_same_as_a_palette_mask(data):
    _, labels = arrays(load(data))
    for index in range(6):
        with Image.open(mask(data, f"train{index}")) as image:
            indices = np.array(image)
        Image.fromarray(indices).save(mask(data, f"train{index}"))
    with Image.open(mask(data, "train0")) as image:
        assert image.mode == "L"
    assert torch.equal(arrays(load(data))[1], labels)


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".jpg"), ("CMYK", ".jpg"), ("RGBA", ".png"), ("LA", ".png")])
def test_photos_of_other_modes_are_read(data, mode, suffix):
    (before, *_), _ = arrays(load(data))
    with Image.open(photo(data, "train0")) as image:
        other = image.convert(mode)
    if "A" in mode:
        other.putalpha(77)  # dropped, not blended with black
    photo(data, "train0").unlink()
    other.save(photo(data, "train0").with_suffix(suffix), **{"quality": 95} if suffix == ".jpg" else {})
    (after, *_), _ = arrays(load(data))
    if "L" in mode:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        before = (before * weights).sum(0).expand(3, -1, -1)
    assert (after.float() - before.float()).abs().mean() < 3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_any_bit_depth_hold_indices(data, bits):
    labels = np.arange(16 * 24).reshape(16, 24) % 2**bits % 21
    rows = np.unpackbits(labels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(16, -1)
    scanlines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 24, 16, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    (data / "SegmentationClass" / "train0.png").write_bytes(png)
    Image.new("RGB", (24, 16)).save(data / "JPEGImages" / "train0.jpg")
    mask = data_loader.read_mask(data / "SegmentationClass" / "train0.png", (24, 16), 21)
    assert np.array_equal(np.array(mask), labels)


def test_photos_and_masks_may_be_links(data, tmp_path):
    split = find_split("voc", data, "train")
    before = read_example(split.images[0], split.masks[0], image_size=32, num_classes=21)
    for path in (split.images[0], split.masks[0]):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    split = find_split("voc", data, "train", masks_required=True)
    assert np.array_equal(before, read_example(split.images[0], split.masks[0], image_size=32, num_classes=21))


def test_photos_of_16_bit_keep_their_high_byte(data):
    with Image.open(photo(data, "train0")) as image:
        grey = np.array(image.convert("L"))
    photo(data, "train0").unlink()
    Image.fromarray(grey.astype(np.uint16) * 256 + 99).save(photo(data, "train0").with_suffix(".png"))
    after = arrays(load(data))[0][0]
    Image.fromarray(grey).save(photo(data, "train0").with_suffix(".png"))
    assert torch.equal(arrays(load(data))[0][0], after)


def test_suffixes_may_be_capital(data):
    before = arrays(load(data))[0]
    photo(data, "train0").rename(photo(data, "train0").with_suffix(".JPG"))
    assert torch.equal(arrays(load(data))[0], before)


def exif(*entries: tuple[int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, value); Pillow would not write a faulty one."""
    body = b"".join(struct.pack("<HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


ORIENTATION_6 = (0x112, 3, b"\6\0\0\0")  # a camera held upright
DAMAGED_WIDTH = (0x100, 2, b"ab\0\0")  # text where a number belongs


def store_turned(data: Path, block: bytes) -> None:
    """train0 as a camera stores it: pixels lying on their side, and an EXIF block that says so."""
    with Image.open(photo(data, "train0")) as upright:
        lying = upright.transpose(Image.Transpose.ROTATE_90)
    assert lying.width != lying.height  # a photo left lying would not fit its mask
    lying.save(photo(data, "train0"), quality=100, subsampling=0, exif=block)


def test_a_photo_taken_upright_is_turned_upright(data):
    (before, *_), _ = arrays(load(data))
    store_turned(data, exif(ORIENTATION_6))
    (after, *_), _ = arrays(load(data))
    assert (after.float() - before.float()).abs().mean() < 1


def test_a_faulty_exif_entry_does_not_keep_a_photo_from_being_read(data):
    """Cameras and editors write such blocks; the pixels are whole."""
    (before, *_), _ = arrays(load(data))
    store_turned(data, exif(DAMAGED_WIDTH, ORIENTATION_6))
    (after, *_), _ = arrays(load(data))
    assert (after.float() - before.float()).abs().mean() < 1


def test_an_exif_block_of_other_bytes_does_not_keep_a_photo_from_being_read(data):
    before = arrays(load(data))
    with Image.open(photo(data, "train0")) as image:
        image.save(photo(data, "train0").with_suffix(".png"), exif=b"Exif\0\0garbage!")
    photo(data, "train0").unlink()
    assert torch.equal(arrays(load(data))[0], before[0])


# ---------------------------------------------------------------------------------------------------- irregular files


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


IRREGULAR = [(Path.mkdir, "a folder"), (os.mkfifo, "a FIFO"), (bind, "a socket"), (link_to_device, "a device")]


@pytest.mark.parametrize(("make", "kind"), IRREGULAR, ids=[kind for _, kind in IRREGULAR])
def test_a_file_that_is_not_regular_is_refused_by_kind(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("odd"))
    with pytest.raises(UserError, match=rf"^odd is not a regular file \({kind}\); "):
        refuse_irregular("odd")


def test_a_regular_file_a_link_to_one_and_none_at_all_are_not_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link", "dangling", "absent", "file/below", "null\0", "long" * 100):
        refuse_irregular(tmp_path / name)


@pytest.mark.parametrize("cache", [True, False])
def test_irregular_photos_and_masks_of_a_split_are_named_together(data, cache):
    odd = [photo(data, "train1"), mask(data, "train2"), photo(data, "train4")]
    for path, make in zip(odd, (os.mkfifo, os.mkfifo, link_to_device), strict=True):
        path.unlink()
        make(path)
    truncate(photo(data, "train5"))
    mask(data, "train0").unlink()
    mask(data, "train0").symlink_to(data / "nowhere")
    with pytest.raises(UserError, match="5 faults in split train") as fault:
        load(data, cache=cache)
    first, *lines, last = str(fault.value).splitlines()[1:]
    assert f"{mask(data, 'train0')}: no such file" in first and f"{photo(data, 'train5')}: cannot be read" in last
    for path, kind, line in zip(odd, ("FIFO", "FIFO", "device"), lines, strict=True):
        assert f"{path} is not a regular file (a {kind})" in line


@pytest.mark.parametrize("name", ["train.txt", "classes.txt"])
def test_a_list_that_is_a_fifo_is_refused(data, name):
    (data / name).unlink(missing_ok=True)
    os.mkfifo(data / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file \(a FIFO\)"):
        load(data)


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


def mislabel(path: Path) -> None:
    with Image.open(path) as image:
        labels = np.array(image)
    labels[3, 5] = 77
    colour_mask(labels).save(path)


def paint(data: Path, id_: str, index: int) -> None:
    """One class all over a mask."""
    with Image.open(mask(data, id_)) as image:
        labels = np.full_like(np.array(image), index)
    colour_mask(labels).save(mask(data, id_))


FAULTS = [
    (truncate, photo, "cannot be read as an image"),
    (truncate, mask, "cannot be read as an image"),
    (repaint, mask, "indices_from_colours"),
    (crop, mask, "the mask is 50x40, its photo "),
    (mislabel, mask, "class index 77 "),
]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("spoil", "kind", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_faulty_file_is_named_with_its_fault(data, spoil, kind, message, cache):
    spoil(kind(data, "train3"))
    with pytest.raises(UserError) as fault:
        load(data, cache=cache)
    assert f"{kind(data, 'train3')}: " in str(fault.value) and message in str(fault.value)


@pytest.mark.parametrize("cache", [True, False])
def test_all_faulty_files_are_named_at_once(data, cache):
    for index, (spoil, kind, _) in enumerate(FAULTS):
        spoil(kind(data, f"train{index}"))
    with pytest.raises(UserError, match="5 faults in split train") as fault:
        load(data, cache=cache)
    lines = str(fault.value).splitlines()[1:]
    for line, (index, (_, kind, message)) in zip(lines, enumerate(FAULTS), strict=True):
        assert str(kind(data, f"train{index}")) in line and message in line


def test_no_photo_starts_ghostscript(data, tmp_path, monkeypatch):
    """Pillow hands it what calls itself PostScript, whatever the suffix."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'was_started'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # to look for it anew
    Image.new("RGB", (20, 20)).save(photo(data, "train3"), format="EPS")
    with pytest.raises(UserError, match=r"train3\.jpg: cannot be read as an image"):
        load(data)
    assert not (tmp_path / "was_started").exists()


def test_too_little_memory_is_no_fault_of_the_photo(data, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        load(data)


def test_an_interrupted_decoding_does_not_wait_for_a_file_that_never_answers(data, monkeypatch):
    """As on a network file system whose server is away."""
    answer, opened, image_open = threading.Event(), threading.Event(), Image.open

    def open_slowly(path, *args, **options):
        if path == photo(data, "train2"):
            opened.set()
            answer.wait(20)
        return image_open(path, *args, **options)

    def interrupt():
        opened.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Image, "open", open_slowly)
    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        load(data)
    answer.set()
    assert time.monotonic() - start < 10 and cached(data) == []


def test_faulty_files_leave_no_cache_behind(data):
    truncate(photo(data, "train5"))
    with pytest.raises(UserError):
        load(data)
    assert cached(data) == []


def test_a_mended_data_set_loads(data):
    whole = photo(data, "train5").read_bytes()
    truncate(photo(data, "train5"))
    with pytest.raises(UserError):
        load(data)
    photo(data, "train5").write_bytes(whole)
    assert same(load(data), load(data, cache=False))


@pytest.mark.parametrize(("index", "allowed"), [(20, True), (21, False), (254, False), (255, True)])
def test_labels_end_below_num_classes_and_void_is_always_allowed(data, index, allowed):
    paint(data, "val0", index)
    if allowed:
        assert (arrays(load(data, "val"))[1][0] == index).all()
    else:
        with pytest.raises(UserError, match=rf"val0\.png: class index {index} .*num_classes = 21"):
            load(data, "val")


# ---------------------------------------------------------------------------------------------------- the cache


def test_cache_changes_no_value(data):
    assert same(load(data, cache=True), load(data, cache=False))


def test_cache_of_a_list_longer_than_one_round_of_decoding(data):
    """Files are decoded 256 at a time."""
    ids = [f"copy{index}" for index in range(258)]
    for index, id_ in enumerate(ids):
        os.link(photo(data, f"train{index % 6}"), photo(data, id_))
        os.link(mask(data, f"train{index % 6}"), mask(data, id_))
    images, labels = arrays(load(data))
    (data / "train.txt").write_text("\n".join(ids))
    order = torch.arange(258) % 6
    copies = arrays(load(data))
    assert torch.equal(copies[0], images[order]) and torch.equal(copies[1], labels[order])


def test_without_cache_nothing_is_written(data):
    assert load(data, cache=False).cache_file is None
    assert not (data / ".cache").exists()


def test_cache_is_used_again(data):
    first = load(data).cache_file.stat()
    second = load(data).cache_file.stat()
    assert (first.st_mtime_ns, first.st_ino) == (second.st_mtime_ns, second.st_ino)


def test_cache_is_what_is_read(data):
    """Otherwise the tests of its reuse would pass without any."""
    before = load(data)
    stored = np.load(before.cache_file, mmap_mode="r+")
    stored[2] = 9
    stored.flush()
    images, labels = load(data)[2]
    assert (images == 9).all() and (labels == 9).all()


@pytest.mark.parametrize("size", [0, 50, 5000])
def test_a_cache_that_was_cut_short_is_made_again(data, size):
    before = arrays(load(data))
    (file,) = (data / ".cache").glob("*.npy")
    os.truncate(file, size)
    assert all(torch.equal(one, other) for one, other in zip(arrays(load(data)), before, strict=True))


@pytest.mark.parametrize("cache", [True, False])
def test_links_to_nowhere_are_all_named(data, cache):
    for path in (photo(data, "train0"), data / "SegmentationClass" / "train2.png"):
        path.unlink()
        path.symlink_to(data / "nowhere")
    with pytest.raises(UserError) as error:
        load(data, cache=cache)
    assert "2 faults" in str(error.value) and "train0.jpg" in str(error.value) and "train2.png" in str(error.value)


def test_a_list_that_is_a_folder_is_refused(data):
    (data / "train.txt").unlink()
    (data / "train.txt").mkdir()
    with pytest.raises(UserError, match=r"train\.txt is not a regular file \(a folder\)"):
        load(data)


def test_cache_follows_a_changed_photo(data):
    load(data)
    with Image.open(photo(data, "train2")) as image:
        Image.new("RGB", image.size, (0, 0, 0)).save(photo(data, "train2"))
    after = load(data)
    assert (after[2][0] == 0).all() and same(after, load(data, cache=False))


def test_cache_follows_a_changed_mask(data):
    load(data)
    paint(data, "train2", 5)
    assert (load(data)[2][1] == 5).all()


def test_cache_follows_a_change_that_keeps_the_file_size(data):
    paint(data, "train2", 5)
    size = mask(data, "train2").stat().st_size
    load(data)
    paint(data, "train2", 6)
    assert mask(data, "train2").stat().st_size == size
    assert (load(data)[2][1] == 6).all()


def test_cache_follows_masks_that_are_taken_away(data):
    load(data)
    shutil.rmtree(data / "SegmentationClass")
    assert (arrays(load(data))[1] == VOID).all()


def test_cache_follows_the_image_size(data):
    load(data)
    larger = load(data, image_size=48)
    assert arrays(larger)[0].shape == (6, 3, 48, 48) and same(larger, load(data, image_size=48, cache=False))


@pytest.mark.parametrize("part", [0, 1], ids=["photo", "mask"])
def test_cache_follows_a_change_of_resizing_by_itself(data, monkeypatch, part):
    """Whoever changes how photos or masks are resized need not think of the cache."""
    before, to_square = arrays(load(data)), transforms.to_square

    def changed(image, mask, side, resize, padding):
        result = list(to_square(image, mask, side, resize, padding))
        result[part] = result[part] and result[part].transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return tuple(result)

    for module in (transforms, photos):
        monkeypatch.setattr(module, "to_square", changed)
    transforms.resize_tag.cache_clear()
    after = arrays(load(data))
    transforms.resize_tag.cache_clear()
    assert torch.equal(after[part], before[part].flip(-2)) and torch.equal(after[1 - part], before[1 - part])


@pytest.mark.parametrize("resize", transforms.RESIZES)
@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize(
    "concerned",
    [
        lambda width, height, side: height > width,
        lambda width, height, side: width > 2.5 * height or height > 2.5 * width,
        lambda width, height, side: max(width, height) > side,
        lambda width, height, side: max(width, height) < side,
    ],
    ids=["tall", "long", "larger", "smaller"],
)
def test_the_tag_shows_a_change_that_concerns_some_photos_only(monkeypatch, resize, side, concerned):
    before, to_square = transforms.resize_tag(side, resize), transforms.to_square

    def changed(image, mask, side, resize, padding):
        square, mask = to_square(image, mask, side, resize, padding)
        return ImageOps.mirror(square) if concerned(*image.size, side) else square, mask

    monkeypatch.setattr(transforms, "to_square", changed)
    assert transforms.resize_tag.__wrapped__(side, resize) != before


def test_files_of_one_name_in_two_folders_are_two_to_the_cache(tmp_path):
    """Of equal size and time as well, as from an archive."""
    for grey, side in enumerate(("left", "right")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / side / "photo.bmp")
        os.utime(tmp_path / side / "photo.bmp", (1, 1))
        split = Split("train", ["a"], [tmp_path / side / "photo.bmp"], None, root=tmp_path)
        assert SegmentationDataset(split, class_names=["x", "y"], image_size=SIZE)[0][0].unique().tolist() == [grey]


def test_cache_does_not_hide_labels_above_fewer_classes(data):
    load(data)
    with pytest.raises(UserError, match="num_classes = 2"):
        load(data, num_classes=2)


def test_cache_of_another_number_of_classes_is_another(data):
    assert load(data, num_classes=21).cache_file != load(data, num_classes=22).cache_file


def test_stale_caches_are_removed_and_others_kept(data):
    kept = {load(data, "val").cache_file.name, load(data, image_size=48).cache_file.name}
    stale = load(data).cache_file
    paint(data, "train2", 5)
    assert {*cached(data)} == kept | {stale.name}
    fresh = load(data).cache_file
    assert {*cached(data)} == kept | {fresh.name}


def test_processes_that_come_at_once_share_one_cache(data):
    """Threads here, each with a lock of its own as processes have."""
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: load(data), range(4)))
    assert cached(data) == [datasets[0].cache_file.name]
    assert all(same(dataset, datasets[0]) for dataset in datasets)


def become_stranger() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)


@pytest.fixture
def stranger():
    """Calls functions in a process of a user whom passwd does not know, as in a container; without root, of our own."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=become_stranger) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)


@pytest.fixture
def read_only(stranger):
    """A data set that everybody may read, and a second one."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's are for their owner alone
        os.chmod(folder, 0o755)
        first, second = (make_data(Path(folder) / name) for name in ("first", "second"))
        load(first, cache=False)  # what it imports, a stranger may not read
        first.chmod(0o555)
        (second / ".cache").mkdir(mode=0o555)  # left by the owner of the data
        if not stranger(os.access, first, os.R_OK | os.X_OK):
            pytest.skip("the folder for temporary files is not open to everybody")
        yield first, second


def load_for_user(folder: Path, cache_home: Path) -> tuple[int, Tensor, Path]:
    os.environ["XDG_CACHE_HOME"] = str(cache_home)
    dataset = load(folder)
    return len(dataset), dataset[0][0].sum(), dataset.cache_file


def test_read_only_data_are_cached_in_the_users_folder(read_only, stranger):
    with tempfile.TemporaryDirectory() as cache_home:
        os.chmod(cache_home, 0o777)
        for folder in read_only:
            length, total, file = stranger(load_for_user, folder, Path(cache_home))
            dataset = load(folder, cache=False)
            assert (length, total) == (len(dataset), dataset[0][0].sum())
            assert file.is_relative_to(cache_home) and file.is_file() and cached(folder) == []


def load_without_home(folder: Path) -> list[str]:
    """What is said to a user who has no home, or a useless one."""
    os.environ.pop("XDG_CACHE_HOME", None)
    os.environ.pop("HOME", None)
    said = []
    for home in (None, "/", "/dev/null"):
        if home:
            os.environ["HOME"] = home
        with pytest.raises(UserError) as refusal:
            load(folder)
        said.append(str(refusal.value))
    assert len(load(folder, cache=False)) == 6
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a stranger")
def test_read_only_data_of_a_user_without_a_home_say_where_else_to_go(read_only, stranger):
    data, _ = read_only
    for message in stranger(load_without_home, data):
        assert message.startswith(f"{data} is read-only, ")
        assert '"cache": false' in message and "XDG_CACHE_HOME" in message


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


def batches(dataset: SegmentationDataset, *, epoch: int = 0, **options) -> list[tuple[Tensor, ...]]:
    loader = make_loader(dataset, batch_size=2, **options)
    if "seed" in options:
        loader.batch_sampler.set_epoch(epoch)
    return [tuple(batch) for batch in loader]


def equal(first: list[tuple[Tensor, ...]], second: list[tuple[Tensor, ...]]) -> bool:
    return all(
        torch.equal(one, other)
        for pair, other_pair in zip(first, second, strict=True)
        for one, other in zip(pair, other_pair, strict=True)
    )


def test_loader_without_seed_keeps_the_order_of_the_list(data):
    (data / "train.txt").write_text("train3\ntrain1\ntrain5\ntrain0\ntrain2\n")
    dataset = load(data)
    loaded = batches(dataset)
    assert [len(images) for images, _ in loaded] == [2, 2, 1]
    assert equal([tuple(map(torch.cat, zip(*loaded, strict=True)))], [arrays(dataset)])


@pytest.mark.parametrize("cache", [False, True])
def test_workers_change_no_batch(data, cache):
    dataset = load(data, cache=cache)
    assert equal(batches(dataset, seed=1, num_workers=2), batches(dataset, seed=1, num_workers=0))


def test_workers_that_stay_see_the_new_epoch(data):
    dataset = load(data)
    loader = make_loader(dataset, batch_size=2, seed=1, num_workers=2)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        assert equal([tuple(batch) for batch in loader], batches(dataset, seed=1, epoch=epoch))


def test_seeds_of_examples_differ_from_epoch_to_epoch_and_from_one_another(data):
    dataset = load(data)
    epochs = [torch.cat([seeds for *_, seeds in batches(dataset, seed=1, epoch=epoch)]).tolist() for epoch in range(5)]
    assert len({seed for epoch in epochs for seed in epoch}) == 5 * len(dataset)
    assert epochs[3] == torch.cat([seeds for *_, seeds in batches(dataset, seed=1, epoch=3)]).tolist()


def test_photos_of_both_ways_of_resizing_keep_their_caches(data):
    """Experiments that compare them read the same photos in turn."""
    files = [load(data, resize=resize).cache_file for resize in transforms.RESIZES]
    times = [file.stat().st_mtime_ns for file in files]
    assert [load(data, resize=resize).cache_file for resize in transforms.RESIZES] == files
    assert [file.stat().st_mtime_ns for file in files] == times
    assert files[0].name.startswith("train-32px-21classes-")  # the name that squashed photos have always had


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(data, num_workers):
    dataset = load(data)
    before = torch.get_rng_state()
    batches(dataset, seed=1, num_workers=num_workers)
    batches(dataset, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def epoch_of(seed: int, epoch: int) -> list[tuple[int, int]]:
    sampler = EpochSampler(50, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [[index for index, _ in epoch_of(230, epoch)] for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(50))}) == 5


def test_an_epoch_depends_on_seed_and_number_alone():
    first = epoch_of(230, 3)
    torch.manual_seed(1)
    assert epoch_of(230, 3) == first != epoch_of(231, 3)
    assert epoch_of(231, 2) != first  # as seed + epoch would have it


def test_every_example_of_every_epoch_has_a_seed_of_its_own():
    seeds = [seed for epoch in range(4) for _, seed in epoch_of(230, epoch)]
    assert len(set(seeds)) == len(seeds)


# ---------------------------------------------------------------------------------------------------- VOC's palette


def test_palette_is_the_devkits():
    """Its loop, bit by bit: three bits of the index a round, into ever lower bits of red, green and blue."""
    for index, colour in enumerate(palette().tolist()):
        rest, expected = index, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                expected[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        assert colour == expected


def test_palette_is_that_of_a_real_mask(voc2012):
    with Image.open(next((voc2012 / "SegmentationClass").glob("*.png"))) as image:
        assert image.getpalette() == palette().flatten().tolist()


def test_indices_come_back_from_colours():
    indices = np.array([*range(len(CLASS_NAMES)), VOID], dtype=np.uint8)
    indices = np.random.default_rng(0).permutation(np.tile(indices, 4)).reshape(8, 11)
    colours = np.array(colour_mask(indices).convert("RGB"))
    found = indices_from_colours(colours)
    assert found.dtype == np.uint8 and np.array_equal(found, indices)


@pytest.mark.parametrize("colour", [(0, 0, 1), (127, 0, 0), (255, 255, 255), (128, 64, 128)])
def test_a_colour_of_no_class_is_refused_by_name(colour):
    """Among them that of index 21, which the palette has and VOC's classes have not."""
    colours = np.zeros((4, 5, 3), dtype=np.uint8)
    colours[2, 3] = colour
    with pytest.raises(UserError, match=rf"colour \({colour[0]}, {colour[1]}, {colour[2]}\)"):
        indices_from_colours(colours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_for_a_gpu_are_on_their_way(data):
    dataset = load(data, image_size=48)
    plain = make_loader(dataset, batch_size=4, seed=3)
    loader = make_loader(dataset, batch_size=4, seed=3, num_workers=2, device="cuda")
    for ours, theirs in zip(loader, plain, strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            assert part.is_pinned() and torch.equal(part, expected)
