"""Where data sets keep their photos, masks and lists: one function for each layout.

For a new one, write a function from the folder and the name of a list to a Split, and give it a name in LAYOUTS.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import Cityscapes

from model import UserError
from model.photos import IMAGE_SUFFIXES
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


def find_split(dataset: str, data_dir: str | Path, name: str, *, masks_required: bool = False) -> Split:
    """Find the files of a list. Raises UserError for an unusable list, and naming all missing files."""
    if Path(name).name != name:
        raise UserError(f"split {name!r}: give the name of a list without folder and suffix, as val")
    split = LAYOUTS[dataset](Path(data_dir), name)
    if bad := next((id_ for id_, count in Counter(split.ids).items() if count > 1 or Path(id_).name != id_), None):
        raise UserError(f"split {name} of {data_dir}: ids name files, so they are unique and without /; {bad!r} is not")
    for value, index in (split.label_map or {}).items():
        if not (0 <= value <= 255 and 0 <= index <= 255):
            raise UserError(f"the label_map of {dataset} has {value}: {index}; both are from 0 to 255, void is {VOID}")
    if masks_required and split.masks is None:
        raise UserError(f"split {name} of {data_dir} has no masks: it can be predicted, not scored or trained on")
    return split


def voc(data_dir: Path, name: str) -> Split:
    """Find a split in VOC's layout: photos and masks in two folders, lists of their names, and perhaps classes.txt."""
    folders = VOCFolders.find(data_dir)
    ids, source = read_list(folders.lists / f"{name}.txt"), folders.lists / "classes.txt"
    photos = photos_by_id(folders.images)
    masks = [folders.masks / f"{id_}.png" for id_ in ids]
    present = {entry.name for entry in os.scandir(folders.masks)} if folders.masks.is_dir() else set()
    missing = [f"no photo {folders.images / id_}.jpg" for id_ in ids if id_ not in photos]
    without_mask = [f"no mask {mask}" for mask in masks if mask.name not in present]
    has_masks = len(without_mask) < len(ids)
    if missing := missing + without_mask * has_masks:
        raise list_faults(f"{folders.lists / name}.txt", missing)
    names = read_list(source) if source.exists() else None
    return Split(
        name,
        ids,
        [photos[id_] for id_ in ids],
        masks if has_masks else None,
        class_names=names,
        names_source=str(source) if names else f"{data_dir}, which has no classes.txt",
        root=folders.images.parent,
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
    masks = [city / f"{id_}{mask_end}" for city, id_ in zip(cities, ids, strict=True)]
    missing = [f"no mask {mask}" for mask in masks if not mask.exists()]
    if 0 < len(missing) < len(masks):
        raise list_faults(f"{data_dir / 'gtFine' / name}", missing)
    return Split(
        name,
        ids,
        images,
        None if missing else masks,
        class_names=list(CITYSCAPES),
        names_source="Cityscapes",
        label_map=dict.fromkeys(range(34), VOID) | {label: index for index, label in enumerate(CITYSCAPES.values())},
        root=data_dir,
    )


LAYOUTS: dict[str, Callable[[Path, str], Split]] = {"voc": voc, "sample": sample, "cityscapes": cityscapes}


@dataclass(frozen=True)
class VOCFolders:
    """Where a data set in VOC's layout keeps its photos, its masks and its lists."""

    images: Path
    masks: Path
    lists: Path

    @classmethod
    def find(cls, data_dir: str | Path) -> "VOCFolders":
        """Find lists beside JPEGImages, or a devkit's VOC2012/ImageSets/Segmentation. Raises UserError for neither."""
        data_dir = Path(data_dir)
        for root in (data_dir, data_dir / "VOC2012", data_dir / "VOCdevkit" / "VOC2012"):
            lists = root / "ImageSets" / "Segmentation"
            lists = lists if lists.is_dir() else root
            if (root / "JPEGImages").is_dir():
                return cls(root / "JPEGImages", root / "SegmentationClass", lists)
        raise UserError(
            f"{data_dir} holds no data set (JPEGImages/ with train.txt and val.txt, or VOC2012/). Get VOC2012 with "
            "`python build_dataset.py`, or try `python train.py --model_dir experiments/quickstart`, which needs none"
        )


def read_list(path: Path) -> list[str]:
    """Return the lines of a list file. Raises UserError if it is absent, empty, no text, or repeats one."""
    try:
        ids = ids_in(path.read_bytes())
    except FileNotFoundError:
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt") if p.name != "classes.txt"))
        found = found or "none; `python build_dataset.py --split 0.8 0.1 0.1` deals photos into lists"
        raise UserError(f"no list {path}; splits here: {found}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file ({error.reason})") from None
    if not ids:
        raise UserError(f"{path} lists no image")
    if repeated := [id_ for id_, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{path} lists {', '.join(repeated[:5])} more than once")
    return ids


def ids_in(content: bytes) -> list[str]:
    """Return the ids in the bytes of a list. Raises UnicodeDecodeError where they are not UTF-8."""
    return [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]


def photos_by_id(folder: Path) -> dict[str, Path]:
    """Return every photo of a folder by its name without suffix. Raises UserError when two photos share one."""
    photos: dict[str, Path] = {}
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in photos:
                raise UserError(f"{photos[path.stem]} and {path} have the same name; keep one of them")
            photos[path.stem] = path
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
    shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
    return UserError(
        f"{where}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{len(faults)} faults in {where}", *shown])
    )
