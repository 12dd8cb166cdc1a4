"""Where data sets keep their photos, masks and lists: one function for each layout.

For a new one, write a function from the folder and the name of a list to a Split, and give it a name in LAYOUTS.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torchvision.datasets import Cityscapes

from model import UserError
from model.photos import IMAGE_SUFFIXES, read_mask, read_photo
from model.sample import draw_sample
from model.voc import CLASS_NAMES, VOID


@dataclass(frozen=True)
class Split:
    """The photos of one list and their masks; masks is None where not one photo has one."""

    name: str
    ids: list[str]
    images: list[Path]
    masks: list[Path] | None
    class_names: list[str] | None = None  # None where the data set does not name its classes
    names_source: str = ""  # where the names stand, for messages
    label_map: Mapping[int, int] | None = None  # of the values in masks; None: they are class indices and void
    root: Path | None = None  # the folder to keep a cache in; None: the one above the photos

    def read(self, index: int, num_classes: int) -> tuple[Image.Image, Image.Image | None]:
        """Decode a photo and its mask, None without masks; see read_photo() and read_mask()."""
        photo = read_photo(self.images[index])
        if self.masks is None:
            return photo, None
        return photo, read_mask(self.masks[index], photo.size, num_classes, self.label_map)


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
    without_mask = [f"no mask {mask}" for mask in split.masks or [] if not os.path.exists(mask)]
    if len(without_mask) == len(split.ids):
        split, without_mask = replace(split, masks=None), []
    if missing := [f"no photo {image}" for image in split.images if not os.path.exists(image)] + without_mask:
        raise list_faults(where, missing)
    if masks_required and split.masks is None:
        raise UserError(f"{where} has no masks: it can be predicted, not scored or trained on")
    return split


def voc(data_dir: Path, name: str) -> Split:
    """Find a split in VOC's layout: photos and masks in two folders, lists of their names, and perhaps classes.txt."""
    images, masks, lists = voc_folders(data_dir)
    ids, source = read_list(lists / f"{name}.txt"), lists / "classes.txt"
    photos = photos_by_id(images)
    names = read_list(source) if source.exists() else None
    return Split(
        name,
        ids,
        [photos.get(id_, images / f"{id_}.jpg") for id_ in ids],
        [masks / f"{id_}.png" for id_ in ids],
        class_names=names,
        names_source=str(source) if names else f"{data_dir}, which has no classes.txt",
        root=images.parent,
    )


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
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except FileNotFoundError:
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt") if p.name != "classes.txt"))
        found = found or "none; `python build_dataset.py --split 0.8 0.1 0.1` deals photos into lists"
        raise UserError(f"no list {path}; splits here: {found}") from None
    if ids := [line.strip() for line in lines if line.strip()]:
        return ids
    raise UserError(f"{path} lists no image")


def photos_by_id(folder: Path) -> dict[str, Path]:
    """Return every photo of a folder by its name without suffix. Raises UserError where two share one."""
    photos: dict[str, Path] = {}
    found = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)
    for path in (path for path in found if not path.name.startswith(".")):
        if photos.setdefault(path.stem, path) != path:
            raise UserError(f"{photos[path.stem]} and {path} have the same name; keep one of them")
    return photos


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
    """Return an error that names the first faults of many."""
    if len(faults) == 1:
        return UserError(f"{where}: {faults[0]}")
    more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
    return UserError("\n  ".join([f"{len(faults)} faults in {where}", *faults[:20], *more]))
