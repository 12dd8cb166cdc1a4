"""Where data sets keep their photos, masks and lists: one function for each layout.

For a new one, write a function from the folder and the name of a list to a Split, and give it a name in LAYOUTS.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from unicodedata import normalize

from PIL import Image
from torchvision.datasets import Cityscapes

from model import UserError, read_text
from model.photos import IMAGE_SUFFIXES, UNREADABLE, LabelMap, check_palette, read_mask, read_photo
from model.sample import draw_sample
from model.voc import CLASS_NAMES, VOID, Colour

NAMES = ("classes.txt", "labelmap.txt")  # of files with the names of classes, the latter CVAT's
GROUP = "group.txt"  # has the regular expression by which photos were kept together when the lists were dealt
AUGMENTED = ("trainaug", "train_aug")  # the names of the list whose masks may be in SegmentationClassAug
FOLDER_OR_SUFFIX = re.compile(rf"^.*[/\\]|({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)
MASK_ENDS = re.compile("_(mask|gt|label|labels|L)$")  # of the names of masks that are longer than their photos'


@dataclass(frozen=True)
class Split:
    """The photos of one list and their masks; masks is None where not one photo has one."""

    name: str
    ids: list[str]
    images: list[Path]
    masks: list[Path] | None
    class_names: list[str] | None = None  # None where the data set does not name its classes
    names_source: str = ""  # where the names stand, for messages
    label_map: LabelMap | None = None  # of the values in masks; None: they are class indices and void
    root: Path | None = None  # the folder to keep a cache in; None: the one above the photos
    group: str | None = None  # a regular expression: photos for which it captures the same text belong together
    colours: dict = field(default_factory=dict, compare=False)  # that indices have in the masks, see check_palette()

    def read(self, index: int, num_classes: int) -> tuple[Image.Image, Image.Image | None]:
        """Decode a photo and its mask, None without masks; see read_photo() and read_mask()."""
        photo = read_photo(self.images[index])
        if self.masks is None:
            return photo, None
        mask = read_mask(self.masks[index], photo, num_classes, self.label_map)
        if mask.mode == "P" and self.label_map is None:
            names = self.class_names or default_class_names(num_classes)
            check_palette(self.masks[index], mask, names, self.colours)
        return photo, mask


def find_split(dataset: str, data_dir: str | Path, name: str, *, masks_required: bool = False) -> Split:
    """Find the files of a list. Raises UserError for an unusable list, and naming all missing files."""
    where = f"split {name} of {data_dir}"
    if Path(name).name != name:
        raise UserError(f"split {name!r}: give the name of a list without folder and suffix, as val")
    split = LAYOUTS[dataset](Path(data_dir), name)
    if {len(split.images), len(split.ids if split.masks is None else split.masks)} != {len(split.ids)} or not split.ids:
        raise UserError(f"{where} has {len(split.ids)} ids, {len(split.images)} photos, {len(split.masks or [])} masks")
    if bad := next((id_ for id_ in split.ids if Path(id_).name != id_), None):
        raise UserError(f"{where}: ids name files, and {bad!r} is no name of a file")
    for kind, names in (("photo", split.ids), ("class name", split.class_names or [])):
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{where} has the {kind} {', '.join(repeated[:5])} more than once")
    without_photo, without_mask = _absent("photo", split.images), _absent("mask", split.masks or [])
    no_masks = split.masks is None or len(without_mask) == len(split.ids)
    if missing := without_photo + ([] if no_masks else without_mask):
        raise list_faults(where, missing)
    if no_masks and masks_required:
        why = "".join(f"; {fault}" for fault in without_mask[:1])
        raise UserError(f"{where} has no masks: it can be predicted, not scored or trained on{why}")
    return replace(split, masks=None) if no_masks else split


def _absent(kind: str, paths: Sequence[Path]) -> list[str]:
    """Return a fault for every file that is not there; the first says what is there instead."""
    missing = [path for path in paths if not os.path.exists(path)]
    faults = [f"no {kind} {path}" for path in missing]
    if missing:
        folder = missing[0].parent
        there = sorted(os.listdir(folder)) if folder.is_dir() else []
        like = [name for name in there if name.startswith(missing[0].stem)] or there
        faults[0] += f" (there: {', '.join(like[:2]) or 'nothing'})"
    return faults


def voc(data_dir: Path, name: str) -> Split:
    """Find a split in VOC's layout: photos and masks in two folders, lists of their names, and perhaps classes.txt."""
    images, masks, lists = voc_folders(data_dir)
    root, file = images.parent, lists / f"{name}.txt"
    if name in AUGMENTED:
        file = next((path for name in AUGMENTED if (path := lists / f"{name}.txt").exists()), file)
    photos = images_by_name(images)
    masks_by_name = images_by_name(masks, photos)
    if name in AUGMENTED:
        masks_by_name |= images_by_name(root / "SegmentationClassAug", photos)
    entries = [_entry(normalize("NFC", line), file, photos, root) for line in read_list(file)]
    source = next((path for name in NAMES for path in (lists / name, root / name) if path.exists()), None)
    names, label_map = _classes(source) if source else (None, None)
    group = read_text(lists / GROUP, errors="replace").rstrip("\r\n") if (lists / GROUP).exists() else None
    return Split(
        name,
        [id_ for id_, _ in entries],
        [photos.get(id_, images / f"{id_}.jpg") for id_, _ in entries],
        [mask or masks_by_name.get(id_, masks / f"{id_}.png") for id_, mask in entries],
        class_names=names,
        names_source=str(source or f"{data_dir}, which has no classes.txt"),
        label_map=label_map,
        root=root,
        group=group or None,
    )


def _entry(line: str, file: Path, photos: Mapping[str, Path], root: Path) -> tuple[str, Path | None]:
    """Return the name of the photo in a line of a list, and its mask where the line has one.

    A line is a name, or a file; behind it may be the mask's file below root, or the flag 1 of one of VOC's classes.
    """
    first, *second = line.rsplit(maxsplit=1)
    name = FOLDER_OR_SUFFIX.sub("", first)
    if line in photos or not second or name not in photos:  # names may have blanks
        return line if line in photos else FOLDER_OR_SUFFIX.sub("", line), None
    if second == ["1"]:
        return name, None
    if not second[0].lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"{file}: {line!r}: a line is a photo, or a photo and its mask, or a photo and VOC's flag 1")
    return name, root / second[0].lstrip("/")


def _classes(file: Path) -> tuple[list[str], LabelMap | None]:
    """Return the names in classes.txt or CVAT's labelmap.txt, and the class indices of what masks hold; None: the same.

    A line is a name, or name:red,green,blue:... Where it is void, its pixels are, and later indices move down by one.
    labelme's __ignore__ is no line: it is 255 in masks.
    """
    names, label_map = list[str](), dict[int | Colour, int]({VOID: VOID})
    for value, line in enumerate(line for line in read_list(file) if not line.startswith("#") and line != "__ignore__"):
        match = re.match(r"(.+?):(\d+),(\d+),(\d+)(:|$)", line)
        name = match[1] if match else line
        index = label_map[value] = VOID if name.casefold() == "void" else len(names)
        names += [name] if index != VOID else []
        if match and label_map.setdefault(tuple(map(int, match.group(2, 3, 4))), index) != index:
            raise UserError(f"{file}: {name} has the colour of another class")
    return names, label_map if len(label_map) > len(names) + 1 else None


def sample(data_dir: Path, name: str) -> Split:
    """Find a split of the built-in scenes, drawn under data_dir on first use."""
    return voc(draw_sample(data_dir / "sample"), name)


# The train ids by name, in their order, and the labelIds of the masks.
CITYSCAPES = {label.name: label.id for label in Cityscapes.classes if 0 <= label.train_id < VOID}


def cityscapes(data_dir: Path, name: str) -> Split:
    """Find leftImg8bit/<split>/<city>/<id>_leftImg8bit.png and gtFine/<split>/<city>/<id>_gtFine_labelIds.png.

    The 15 of the 34 labels that the benchmark ignores are void.
    """
    folder, photo_end, mask_end = data_dir / "leftImg8bit" / name, "_leftImg8bit.png", "_gtFine_labelIds.png"
    images = sorted(folder.glob(f"*/*{photo_end}"))
    if not images:
        raise UserError(f"no photo {folder}/<city>/<id>{photo_end}; give Cityscapes' folder with --data_dir")
    ids = [image.name.removesuffix(photo_end) for image in images]
    cities = [data_dir / "gtFine" / name / image.parent.name for image in images]
    return Split(
        name,
        ids,
        images,
        [city / f"{id_}{mask_end}" for city, id_ in zip(cities, ids, strict=True)],
        class_names=list(CITYSCAPES),
        names_source="Cityscapes",
        label_map=dict.fromkeys(range(34), VOID) | {label: index for index, label in enumerate(CITYSCAPES.values())},
        root=data_dir,
    )


LAYOUTS: dict[str, Callable[[Path, str], Split]] = {"voc": voc, "sample": sample, "cityscapes": cityscapes}


def voc_folders(data_dir: Path) -> tuple[Path, Path, Path]:
    """Return where photos, masks and lists are. Raises UserError where there are no photos.

    Lists are beside JPEGImages or, in a devkit, in VOC2012/ImageSets/Segmentation.
    """
    for root in (data_dir, data_dir / "VOC2012", data_dir / "VOCdevkit" / "VOC2012"):
        lists = root / "ImageSets" / "Segmentation"
        if (root / "JPEGImages").is_dir():
            return root / "JPEGImages", root / "SegmentationClass", lists if lists.is_dir() else root
    raise UserError(
        f"{data_dir} holds no data set (JPEGImages/ with train.txt and val.txt, or VOC2012/). Get VOC2012 with "
        "`python build_dataset.py`, or try `python train.py --model_dir experiments/quickstart`, which needs none"
    )


def read_list(path: Path) -> list[str]:
    """Return the lines of a list file. Raises UserError if it is absent or empty."""
    try:
        lines = read_text(path, errors="replace").splitlines()
    except FileNotFoundError:
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt") if p.name not in (*NAMES, GROUP)))
        found = found or "none; `python build_dataset.py --split 0.8 0.1 0.1` deals photos into lists"
        raise UserError(f"no list {path}; splits here: {found}") from None
    if ids := [line.strip() for line in lines if line.strip()]:
        return ids
    raise UserError(f"{path} lists no image")


def images_by_name(folder: Path, photos: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """Return every photo of a folder by its name without suffix or, given the photos, every mask by its photo's name.

    A mask is NAME.png, or else whatever is called NAME, or NAME and one of MASK_ENDS. Raises UserError where two are.
    """
    found: dict[str, Path] = {}
    paths = folder.iterdir() if folder.is_dir() else ()
    for path in sorted(paths, key=lambda path: (path.suffix != ".png", path)):
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *UNREADABLE) and not path.name.startswith("."):
            name = normalize("NFC", path.stem)
            if photos is not None and name not in photos:
                name = MASK_ENDS.sub("", name)
            first = found.setdefault(name, path)
            if first != path and (photos is None or normalize("NFC", first.name) != f"{name}.png"):
                raise UserError(f"{first} and {path} have the same name, or are masks of one photo; keep one of them")
    return found


def class_names(split: Split, num_classes: int) -> list[str]:
    """Return the data set's names, or the default ones where it has none. Raises UserError if their number differs."""
    names = split.class_names or default_class_names(num_classes)
    if len(names) != num_classes:
        raise UserError(
            f"{split.names_source} names {len(names)} classes, num_classes is {num_classes}; make them agree: "
            f'set "num_classes": {len(names)} in params.json, or correct the names, background first'
        )
    return names


def default_class_names(num_classes: int) -> list[str]:
    """Return VOC's names where there are 21 classes, else the indices as text."""
    return list(CLASS_NAMES) if num_classes == len(CLASS_NAMES) else [str(index) for index in range(num_classes)]


def list_faults(where: str, faults: list[str]) -> UserError:
    """Return an error that names the faults; of many that differ in files and numbers only, the first."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\s*(\S*[/\\]\S*|\d+|\(.*\))", "", fault), []).append(fault)
    parts = ([f"{few[0]} (and {len(few) - 1} more of this kind)"] if len(few) > 3 else few for few in kinds.values())
    lines = [*chain.from_iterable(parts)]
    return UserError(
        f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{len(faults)} faults in {where}", *lines])
    )
