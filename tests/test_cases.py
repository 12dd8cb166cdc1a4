"""What people's data really look like: each form is read, or refused in a line that says what to do."""

import json
import re
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_experiment, run_script
from PIL import Image, ImageEnhance
from test_data_loader import arrays, blank, load, mask, paint, photo

from build_dataset import write_lists
from engine import run
from model import UserError, locked
from model.data_loader import SegmentationDataset, check_classes, seen_in_training, too_dark
from model.inference import OriginalDataset, Segmenter
from model.layouts import class_names, find_split, images_by_name
from model.photos import check_palette, read_mask, read_photo
from model.voc import CLASS_NAMES, VOID, palette
from params import Params
from predict import find_photos

Change = Callable[[np.ndarray, Path], None]


def masks(data: Path, change: Change) -> None:
    """Let change(indices, path) write every mask anew."""
    for path in (data / "SegmentationClass").iterdir():
        with Image.open(path) as image:
            indices = np.array(image)
        change(indices, path)


def said(data: Path, **options) -> str:
    """What is said of the masks of train, in one line or a few."""
    with pytest.raises(UserError) as fault:
        load(data, cache=False, **options)
    assert str(fault.value).count("\n") <= 3
    return str(fault.value)


def save(array: np.ndarray, path: Path, **options) -> None:
    Image.fromarray(array).save(path, **options)


# ---------------------------------------------------------------------------------------------------- forms of masks


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"format": "JPEG", "quality": 95}),
        ("WEBP", {"format": "WEBP", "lossless": True}),
        ("TIFF", {"format": "TIFF", "compression": "jpeg"}),
    ],
)
def test_lossy_masks_are_refused_whatever_the_suffix_and_whatever_noise_they_hold(data, form, options):
    masks(data, lambda indices, path: save(np.where(indices % VOID, 7, 0).astype(np.uint8), path, **options))
    message = said(data)
    assert f".png: the mask is {form}, lossy: class indices in it are noise" in message and "num_classes" not in message
    assert "make it anew as PNG (and 5 more of this kind)" in message


WHOLE: dict[str, Change] = {
    "grey and alpha": lambda indices, path: Image.fromarray(indices).convert("LA").save(path),
    "equal channels": lambda indices, path: Image.fromarray(indices).convert("RGB").save(path),
    "equal channels and alpha": lambda indices, path: Image.fromarray(indices).convert("RGBA").save(path),
    "16 bits": lambda indices, path: save(indices.astype(np.uint16), path),
    "32 bits": lambda indices, path: save(indices.astype(np.int32), path, format="TIFF"),
    "floats": lambda indices, path: save(indices.astype(np.float32), path, format="TIFF"),
}


@pytest.mark.parametrize("form", WHOLE)
def test_masks_in_which_nothing_is_lost_are_read(data, form):
    expected = arrays(load(data, cache=False))[1]
    masks(data, WHOLE[form])
    assert torch.equal(arrays(load(data, cache=False))[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, path: save(i.astype(np.uint16) * 256, path),
            "is I;16, .*: values are whole numbers from 0 to 255",
        ),
        (
            lambda i, path: save(i / np.float32(2), path, format="TIFF"),
            "is F, .*: values are whole numbers from 0 to 255",
        ),
        (lambda i, path: save(np.dstack([i, i // 2]), path), "is LA, .*, and nothing is transparent"),
        (
            lambda i, path: save(palette()[i], path),
            "is RGB, not a palette or grey PNG .* labelmap.txt can say which class",
        ),
    ],
    ids=["16 bits", "floats", "alpha", "colours"],
)
def test_masks_in_which_something_is_lost_are_refused_by_kind(data, change, message):
    masks(data, change)
    assert re.search(rf"the mask {message}.*\(and 5 more of this kind\)", said(data))


def test_sixteen_bits_a_channel_are_not_halved_to_nothing(tmp_path):
    """Pillow keeps the high byte of each channel, which is 0 of every class index."""
    rows = b"".join(b"\0" + np.full((9, 3), 7, ">u2").tobytes() for _ in range(8))
    png = b"\x89PNG\r\n\x1a\n"
    parts = (b"IHDR", struct.pack(">IIBBBBB", 9, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    for name, content in parts:
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    (tmp_path / "mask.png").write_bytes(png)
    with pytest.raises(UserError, match="the mask is RGB, not a palette or grey PNG"):
        read_mask(tmp_path / "mask.png", blank(9, 8), 21)


def test_advice_to_raise_num_classes_comes_last(data):
    masks(data, lambda indices, path: paint(path, 77))
    message = said(data)
    assert re.search(r"class index 77 .*; correct it, or, .* line 78 of classes\.txt, or raise num_classes", message)


# ---------------------------------------------------------------------------------------------------- colours


def renumber(order: list[int], path: Path) -> None:
    """Let index i of a palette mask become order[i], and take its colour along."""
    with Image.open(path) as image:
        indices, colours = np.array(image), np.array(image.getpalette()).reshape(-1, 3)
    anew = np.zeros_like(colours)
    anew[order] = colours[: len(order)]
    colours[: len(order)] = anew[: len(order)]
    again = Image.fromarray(np.array([*order, *range(len(order), 256)], np.uint8)[indices]).convert("P")
    again.putpalette(colours.astype(np.uint8).tobytes())
    again.save(path)


SWAPPED = [*range(21)]
SWAPPED[1], SWAPPED[20] = 20, 1


def originals(data: Path, names: Sequence[str] = CLASS_NAMES) -> list[np.ndarray]:
    """The masks of train as evaluate.py --original_size reads them."""
    dataset = OriginalDataset(find_split("voc", data, "train"), class_names=names)
    return [np.array(dataset[index][2]) for index in range(len(dataset))]


def test_an_index_of_two_colours_is_refused_with_both_files(data):
    (data / "classes.txt").write_text("\n".join(f"kind {index}" for index in range(21)))
    for index in range(6):
        with Image.open(mask(data, f"train{index}")) as image:
            image.putpalette([(7 * value + index // 3) % 256 for value in range(768)])
            image.save(mask(data, f"train{index}"))
    named = r"train\d.png: index \d+ has the colour \(.*\), but \(.*\) in .*train\d\.png: a program numbered colours"
    assert re.search(named, said(data))
    with pytest.raises(UserError, match="a program numbered colours afresh"):
        originals(data)


@pytest.mark.parametrize("names", [None, [f"kind {index}" for index in range(21)]], ids=["VOC's names", "others"])
def test_palettes_numbered_afresh_all_alike_are_refused_by_vocs_colours(data, names):
    """Others use VOC's colours too, as labelme does."""
    if names:
        (data / "classes.txt").write_text("\n".join(names))
    masks(data, lambda indices, path: renumber(SWAPPED, path))
    named = r"index \d+ has the colour \(.*\), VOC's for (aeroplane|tvmonitor|kind \d+): a program numbered"
    assert re.search(named, said(data))
    with pytest.raises(UserError, match="a program numbered colours afresh"):
        originals(data, names or CLASS_NAMES)


def test_a_palette_of_ones_own_is_no_fault(data):
    """CamVid's has two of VOC's colours at other indices."""
    colours = [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192)]
    (data / "classes.txt").write_text("sky\nbuilding\npole\nroad\npavement\n")

    def own(indices: np.ndarray, path: Path) -> None:
        image = Image.fromarray((np.arange(indices.size).reshape(indices.shape) % 5).astype(np.uint8)).convert("P")
        image.putpalette(np.array(colours, np.uint8).tobytes())
        image.save(path)

    masks(data, own)
    assert sorted(arrays(load(data, num_classes=5))[1].unique().tolist()) == [0, 1, 2, 3, 4]


def test_the_colours_of_real_masks_are_no_fault(voc2012):
    split = find_split("voc", voc2012, "val")
    for path in split.masks[::8]:
        with Image.open(path) as image:
            image.load()
        check_palette(path, image, CLASS_NAMES, split.colours)
    assert len(split.colours) > 10


# ---------------------------------------------------------------------------------------------------- names of classes

LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:10,128,0:a,b:\nvoid:1,2,3::\ncar:250,50,83::\n"
COLOURS = np.array([(0, 0, 0), (10, 128, 0), (1, 2, 3), (250, 50, 83)], np.uint8)


@pytest.mark.parametrize("form", ["colours", "palette", "indices"])
def test_labelmap_of_cvat_names_classes_and_their_colours(data, form):
    (data / "labelmap.txt").write_text(LABELMAP)
    masks(data, lambda i, path: save((np.arange(i.size) % 4).astype(np.uint8).reshape(i.shape), path))
    expected = [np.array([0, 1, VOID, 2])[np.array(Image.open(mask(data, f"train{index}")))] for index in range(6)]
    if form != "indices":
        masks(data, lambda i, path: save(COLOURS[i], path))
    if form == "palette":  # in any order
        masks(data, lambda i, path: Image.fromarray(i).convert("P", palette=1).save(path))
    names = ["background", "road", "car"]
    assert find_split("voc", data, "train").class_names == names
    assert all(np.array_equal(*pair) for pair in zip(originals(data, names), expected, strict=True))
    assert load(data, num_classes=3)[0][1].unique().tolist() == [0, 1, 2, VOID]


def test_a_colour_that_labelmap_does_not_name_is_named(data):
    (data / "labelmap.txt").write_text(LABELMAP)
    masks(data, lambda i, path: save(palette()[i], path))
    assert re.search(r"colour \(.*\) is that of no class; correct it, or labelmap\.txt", said(data, num_classes=3))
    (data / "labelmap.txt").write_text("a:0,0,0::\nb:0,0,0::\n")
    with pytest.raises(UserError, match=r"labelmap\.txt: b has the colour of another class"):
        find_split("voc", data, "train")


def test_a_line_void_makes_an_index_void_and_later_ones_move_down(data):
    (data / "classes.txt").write_text("background\nVoid\nroad\n")
    masks(data, lambda i, path: save(np.where(i == VOID, VOID, i % 3).astype(np.uint8), path))
    with Image.open(mask(data, "train0")) as image:
        stored = np.array(image)
    split = find_split("voc", data, "train")
    assert split.class_names == ["background", "road"] and class_names(split, 2) == ["background", "road"]
    found = originals(data, split.class_names)[0]
    assert np.array_equal(found, np.select([stored == 0, stored == 2], [0, 1], VOID))
    paint(mask(data, "train0"), 9)
    assert "9 is not in the data set's label_map or classes.txt" in said(data, num_classes=2)


# ---------------------------------------------------------------------------------------------------- lists and names


@pytest.mark.parametrize(
    "line",
    [
        "JPEGImages/{}.jpg SegmentationClass/{}.png",
        "/JPEGImages/{}.jpg\t/SegmentationClass/{}.png",
        "{}.jpg",
        "JPEGImages\\{}.jpg",
        "{}  1",
    ],
)
def test_lists_of_other_programs_give_the_same(data, line):
    before = find_split("voc", data, "train")
    (data / "train.txt").write_text("".join(line.replace("{}", id_) + "\n" for id_ in before.ids))
    after = find_split("voc", data, "train")
    assert (after.ids, after.images, after.masks) == (before.ids, before.images, before.masks)


def test_a_list_says_which_masks(data):
    """In a folder of any name, and though others have the photos' names; a missing one is missed."""
    shutil.copytree(data / "SegmentationClass", data / "Refined")
    lines = [f"JPEGImages/train{index}.jpg Refined/train{index}.png" for index in range(2)]
    (data / "train.txt").write_text("\n".join(lines))
    assert {path.parent.name for path in find_split("voc", data, "train").masks} == {"Refined"}
    (data / "Refined" / "train1.png").unlink()
    with pytest.raises(UserError, match=r"no mask .*Refined/train1\.png \(there: train"):
        find_split("voc", data, "train")


def test_lines_that_are_no_photo_say_what_a_line_is(data):
    (data / "train.txt").write_text("train0 -1\ntrain1 1\n")
    with pytest.raises(
        UserError,
        match=r"train\.txt: 'train0 -1': a line is a photo, or a photo and its mask, or a photo and VOC's flag 1",
    ):
        find_split("voc", data, "train")
    (data / "train.txt").write_text("JPEGImages/train0.jpg\nJPEGImages/other.jpg SegmentationClass/other.png\n")
    with pytest.raises(UserError, match=r"no photo .*JPEGImages/other\.jpg \(there: "):
        find_split("voc", data, "train")


def test_names_may_have_blanks_and_suffixes_of_their_own(data):
    for before, after in (("train0", "my photo 1"), ("train1", "a.png")):
        photo(data, before).rename(photo(data, after))
        mask(data, before).rename(mask(data, after))
    (data / "train.txt").write_text("my photo 1\na.png\n")
    assert find_split("voc", data, "train", masks_required=True).ids == ["my photo 1", "a.png"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_another_form_of_unicode_are_found(data, form):
    there, listed = (unicodedata.normalize(each, "grün") for each in (form, "NFD" if form == "NFC" else "NFC"))
    photo(data, "train0").rename(photo(data, there))
    mask(data, "train0").rename(mask(data, there))
    (data / "train.txt").write_text(f"{listed}\n", encoding="utf-8")
    split = find_split("voc", data, "train", masks_required=True)
    assert split.ids == [unicodedata.normalize("NFC", listed)] and split.images[0].stem == there


@pytest.mark.parametrize("name", ["trainaug", "train_aug"])
@pytest.mark.parametrize("asked", ["trainaug", "train_aug"])
def test_trainaug_takes_the_masks_of_its_own_folder(data, name, asked):
    (data / "SegmentationClassAug").mkdir()
    shutil.copy(data / "SegmentationClass" / "train0.png", data / "SegmentationClassAug")
    (data / f"{name}.txt").write_text("train0\ntrain1\n")
    folders = [path.parent.name for path in find_split("voc", data, asked).masks]
    assert folders == ["SegmentationClassAug", "SegmentationClass"], "what is not there is where VOC has it"
    assert {path.parent.name for path in find_split("voc", data, "val").masks} == {"SegmentationClass"}


@pytest.mark.parametrize("suffix", [".tif", ".bmp", ".webp", ".TIFF"])
def test_photos_of_other_formats_are_found(data, suffix):
    for path in (data / "JPEGImages").glob("*"):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        path.unlink()
    assert load(data, cache=False).split.images[0].suffix == suffix


@pytest.mark.parametrize("name", ["{}.PNG", "{}_mask.png", "{}_L.png", "{}.bmp"])
def test_masks_of_other_names_are_found_and_dealt(data, name):
    for path in list((data / "SegmentationClass").iterdir()):
        path.rename(path.with_name(name.format(path.stem)))
    assert find_split("voc", data, "train", masks_required=True).masks[0].name == name.format("train0")
    for path in data.glob("*.txt"):
        path.unlink()
    write_lists(data, [0.7, 0.3, 0], seed=1)
    assert len(find_split("voc", data, "train", masks_required=True).ids) == 6


def test_a_mask_is_not_guessed(data):
    """Where two may be meant, where it is that of another photo, where it has another name; the one of old stays."""
    path = mask(data, "train0")
    shutil.copy(path, path.with_name("train0_mask.png"))
    assert find_split("voc", data, "train").masks[0] == path
    path.rename(path.with_name("train0_gt.png"))
    with pytest.raises(
        UserError, match=r"train0_gt\.png and .*train0_mask\.png have the same name, or are masks of one"
    ):
        find_split("voc", data, "train")
    path.with_name("train0_gt.png").unlink()
    shutil.copy(photo(data, "train0"), photo(data, "train0_mask"))
    with pytest.raises(UserError, match=r"no mask .*train0\.png \(there: train0_mask\.png\)"):
        find_split("voc", data, "train")
    for other in (data / "SegmentationClass").iterdir():
        other.rename(other.with_suffix(".tga"))
    with pytest.raises(UserError, match=r"has no masks: .*; no mask .*train0\.png \(there: train0.*\.tga"):
        find_split("voc", data, "train", masks_required=True)


# ---------------------------------------------------------------------------------------------------- photos


def test_a_mask_of_the_stored_pixels_is_told_that_its_photo_was_turned(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo(data, "train0")) as image:
        width, height = image.size
        image.save(photo(data, "train0"), exif=exif)
    sizes = f"the mask is {width}x{height}, its photo {height}x{width}"
    assert said(data).endswith(f"{sizes}, turned upright as its EXIF says: turn the mask too")
    with Image.open(photo(data, "train0")) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(photo(data, "train0"))
    assert said(data).endswith(sizes)


def test_a_photo_of_too_many_pixels_has_a_way_on(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(UserError, match=r"photo\.png: more than 179 megapixels cannot be read; cut photo and mask"):
        read_photo(tmp_path / "photo.png")


def frame(image: Image.Image, rng: np.random.Generator, move: float) -> Image.Image:
    """Another frame of the video that a photo is of: moved, brighter or darker, and something in another place."""
    width, height = image.size
    angle = rng.uniform(0, 2 * np.pi)
    left, top = (round(side * (0.05 + move * way(angle))) for side, way in ((width, np.cos), (height, np.sin)))
    image = image.crop((left, top, left + width * 9 // 10, top + height * 9 // 10))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.97, 1.03))
    image.paste(image.crop((5, 5, 5 + width // 6, 5 + height // 6)), (width // 2, height // 2))
    return image


@pytest.mark.parametrize(("move", "least"), [(0, 3), (0.02, 2)])
def test_frames_of_what_is_trained_on_are_counted_and_others_are_not(data, move, least):
    def datasets(cache: bool) -> list[SegmentationDataset]:
        return [load(data, name, image_size=64, cache=cache) for name in ("train", "val")]

    assert seen_in_training(*datasets(True)) == []
    rng = np.random.default_rng(0)
    for index in range(3):
        with Image.open(photo(data, f"train{index}")) as image:
            frame(image, rng, 0).save(photo(data, f"train{index}"))
            other = frame(image, rng, move)
        other.save(photo(data, f"val{index}"), quality=75)
        Image.new("L", other.size).save(mask(data, f"val{index}"))
        Image.new("L", other.size).save(mask(data, f"train{index}"))
    (line,) = seen_in_training(*datasets(True))
    assert [line] == seen_in_training(*datasets(False))
    found = re.match(
        r"(\d) of 3 photos of val are, or nearly are, one of train: val\d and train\d, for example; ", line
    )
    assert found and int(found[1]) >= least


def test_photos_in_two_lists_are_counted_when_lists_are_dealt(data, capsys):
    for path in data.glob("*.txt"):
        path.unlink()
    for path in (data / "JPEGImages").glob("val*"):
        shutil.copy(photo(data, "train0"), path)
    write_lists(data, [0.5, 0.5, 0], seed=4)
    out = capsys.readouterr().out
    assert re.search(r"\d of \d photos of val are, or nearly are, one of train: .*README.md\n$", out), out


def test_many_faults_of_a_kind_are_one_line_and_few_are_all_named(data):
    (data / "train.txt").write_text("train0\n" + "".join(f"absent{index}\n" for index in range(30)))
    with pytest.raises(UserError, match="60 faults in split train") as fault:
        find_split("voc", data, "train")
    _, photos_line, masks_line = str(fault.value).splitlines()
    assert photos_line.endswith("(and 29 more of this kind)") and "no photo" in photos_line and "no mask" in masks_line


def test_names_of_hidden_files_are_no_photos(data):
    """As macOS leaves them on other systems."""
    shutil.copy(photo(data, "train0"), data / "JPEGImages" / "._train0.jpg")
    assert len(find_split("voc", data, "train").ids) == 6


def test_a_file_of_several_pages_is_refused_and_one_with_a_thumbnail_is_read(tmp_path):
    """As ImageJ's stacks are, or masks with a page for each class; the first page would be taken for the whole."""
    first, second, small = (Image.new("L", size, 1) for size in ((32, 32), (32, 32), (8, 8)))
    first.save(file := tmp_path / "stack.tif", save_all=True, append_images=[second])
    for read in (lambda: read_photo(file), lambda: read_mask(file, blank(32, 32), 2)):
        with pytest.raises(UserError, match=r"stack.tif: has 2 pages, .* save each as a file"):
            read()
    first.save(file, save_all=True, append_images=[small])
    assert read_photo(file).size == (32, 32) and np.array(read_mask(file, blank(32, 32), 2)).min() == 1
    first.convert("RGB").save(
        file := tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[blank(32, 32)]
    )
    assert read_photo(file).size == (32, 32)


def test_the_names_of_labelme_are_those_of_its_indices(data):
    """Its labels.txt begins with __ignore__, of index -1, which is 255 in the masks."""
    (data / "classes.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    assert find_split("voc", data, "train").class_names == ["_background_", "cat", "dog"]
    assert tuple(palette(["_background_", "cat", "dog"])[0]) == (0, 0, 0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_text_files_are_read_as_powershell_writes_them(data, encoding):
    (data / "train.txt").write_text("train0\r\ntrain1\r\n", encoding=encoding)
    (data / "params.json").write_text('{"num_epochs": 3}', encoding=encoding)
    assert find_split("voc", data, "train").ids == ["train0", "train1"]
    assert Params.load(data / "params.json").num_epochs == 3


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "I;16", "CMYK", "HSV"])
def test_photos_of_other_modes_than_rgb_are_refused_in_a_notebook(mode):
    """The indices of a palette would pass for grey."""
    segmenter = Segmenter(torch.nn.Identity(), torch.device("cpu"), image_size=32)
    for photo_ in (Image.new(mode, (40, 40)), np.zeros((40, 40, 3), np.uint8), "photo.jpg"):
        with pytest.raises(UserError, match="mode RGB"):
            segmenter.segment(photo_)


def test_copies_that_are_mirrored_or_turned_are_counted(data):
    """As by an augmentation before the split."""
    for index, turn in enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90)):
        with Image.open(photo(data, f"train{index}")) as image:
            image.transpose(turn).save(photo(data, f"val{index}"), quality=80)
        with Image.open(mask(data, f"train{index}")) as image:
            image.transpose(turn).save(mask(data, f"val{index}"))
    (line,) = seen_in_training(*(load(data, name, image_size=64) for name in ("train", "val")))
    assert line.startswith("2 of 3 photos of val are, or nearly are, one of train: ")


def test_augmented_copies_of_roboflow_come_into_one_list(data, capsys):
    for path in data.glob("*.txt"):
        path.unlink()
    for index in range(6):
        for place in (photo, mask):
            place(data, f"train{index}").rename(place(data, f"im{index // 2}_jpg.rf.{index:032x}"))
    write_lists(data, [0.6, 0.4, 0], seed=1)
    lists = [
        {line.partition(".")[0] for line in (data / f"{name}.txt").read_text().split()} for name in ("train", "val")
    ]
    assert not lists[0] & lists[1] and len(lists[0] | lists[1]) == 6 and " groups -> " in capsys.readouterr().out


def test_photos_that_use_a_small_part_of_the_range_are_named(data):
    """Of 12 bits in files of 16, say."""
    masks(data, lambda indices, path: save(np.full_like(indices, VOID), path))  # as where a few pixels are labelled
    assert too_dark(load(data)) == too_dark(load(data, resize="letterbox")) == []
    for path in (data / "JPEGImages").iterdir():
        with Image.open(path) as image:
            grey = np.array(image.convert("L")).astype(np.uint16) * 16
        path.unlink()
        Image.fromarray(grey).save(path.with_suffix(".png"))
    for resize in ("squash", "letterbox"):
        (line,) = too_dark(load(data, resize=resize))
        assert re.match(r"none of 6 photos looked at in train is brighter than 1\d of 255; ", line)


def test_an_object_in_a_single_photo_makes_a_second_class(data):
    masks(data, lambda indices, path: save(np.where(path.stem == "train5", indices > 0, 0).astype(np.uint8), path))
    check_classes(load(data))
    masks(data, lambda indices, path: save(np.zeros_like(indices), path))
    with pytest.raises(UserError, match="hold no class beside void"):
        check_classes(load(data))


def test_classes_that_no_mask_has_are_named_after_the_first_epoch(trained):
    (line,) = [line for line in (trained[0] / "train.log").read_text().splitlines() if "in no mask of train" in line]
    assert "at 32 pixels a side: " in line and "person" in line and line.endswith("; cannot be learned")


@pytest.mark.parametrize("drawn", [{"augment": True}, {"cutmix": 0.5}], ids=str)
def test_classes_that_are_in_no_mask_as_augmented_may_be_in_another_epoch(data, tmp_path, drawn):
    experiment = make_experiment(tmp_path / "run", num_epochs=1, **drawn)
    said = run_script("train.py", "--model_dir", experiment, "--data_dir", data).stdout
    (line,) = re.findall("in no mask of train, .*", said)
    assert line.startswith("in no mask of train, as augmented in epoch 1, at 32 pixels a side: ") and "person" in line
    assert line.endswith("; another epoch may have them")


def test_photos_of_a_split_that_were_trained_on_are_counted(experiment, trained, tmp_path):
    """As of VOC's trainval."""
    data = shutil.copytree(trained[1], tmp_path / "moved")
    (data / "trainval.txt").write_text((data / "train.txt").read_text() + (data / "val.txt").read_text())
    record = json.loads((experiment / "run.json").read_text()) | {"data_dir": str(data)}
    (experiment / "run.json").unlink()  # a link to the one that other tests read
    (experiment / "run.json").write_text(json.dumps(record))
    for split, words in (("trainval", "6 of them are in train too"), ("val", ""), ("train", "")):
        out = run_script("evaluate.py", "--model_dir", experiment, "--split", split).stdout
        assert words in out and (words or "of them are in" not in out)
        assert re.search(r" at 32x32, \d of 21 classes, epoch ", out)


def test_a_folder_that_is_held_says_what_torchrun_is_for_under_slurm(tmp_path, monkeypatch):
    (tmp_path / "params.json").write_text("{}")
    monkeypatch.setattr(run, "LOCK_PATIENCE", 0)
    with locked(tmp_path / run.RUN_LOCK):
        for tasks, hint in (("1", False), ("4", True)):
            monkeypatch.setenv("SLURM_NTASKS", tasks)
            with pytest.raises(UserError, match="another train") as error, run.sole_run(tmp_path):
                pass
            assert ("torchrun" in str(error.value)) == hint


def test_photos_of_phones_that_cannot_be_read_are_named_and_not_passed_over(data):
    for name in ("IMG_1.HEIC", "IMG_2.avif"):
        (data / "JPEGImages" / name).write_bytes(b"no JPEG")
        assert data / "JPEGImages" / name in find_photos([str(data / "JPEGImages")], data / "out").values()
    assert images_by_name(data / "JPEGImages").keys() >= {"IMG_1", "IMG_2"}
    photo(data, "train0").rename(file := data / "JPEGImages" / "train0.jfif")
    assert find_split("voc", data, "train").images[0] == file
