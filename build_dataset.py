"""Get a data set ready: VOC2012, with SBD if wanted, the built-in sample, or lists for your own photos."""

import argparse
import io
import math
import os
import random
import re
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from http.client import HTTPException
from itertools import accumulate
from pathlib import Path, PurePosixPath

from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from engine.cli import require, run_main
from model import UserError
from model.layouts import VOCFolders, find_split, ids_in, photos_by_id
from model.sample import draw_sample
from utils import RunFailed, write_text

ARCHIVE = "VOCtrainval_11-May-2012.tar"
MIRROR = f"http://pjreddie.com/media/files/{ARCHIVE}"
DOWNLOAD = object()  # what stands for the file of --sbd where none is given
SBD_ARCHIVE = "benchmark.tgz"
SBD_MEMBER = re.compile(r"benchmark_RELEASE/dataset/(img|cls)/([^/]+)\.(?:jpg|mat)")
MEMBER = re.compile(
    r"VOCdevkit/VOC2012/(JPEGImages/[^/]+\.jpg|SegmentationClass/[^/]+\.png|ImageSets/Segmentation/[^/]+\.txt)"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder to fill (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, help=f"unpack this {ARCHIVE} instead of downloading it (2 GB)")
    source.add_argument(
        "--sbd",
        type=Path,
        nargs="?",
        const=DOWNLOAD,
        metavar="ARCHIVE",
        help="write trainaug.txt: VOC2012's train and the photos that the Semantic Boundaries Dataset adds to it, "
        f"from this {SBD_ARCHIVE} or, without a file, from a download of it (1.4 GB)",
    )
    source.add_argument("--sample", action="store_true", help="draw the small built-in data set under DATA_DIR/sample")
    source.add_argument(
        "--split",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VAL", "TEST"),
        help="write lists for your own DATA_DIR/JPEGImages and SegmentationClass; three shares of 1, as 0.8 0.1 0.1",
    )
    parser.add_argument("--seed", type=int, default=230, help="of --split (default: %(default)s)")
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="of --split: keep the photos together for whose names this regular expression captures the same text, as "
        "'(.*)_[0-9]+' the frames of each video",
    )
    return parser.parse_args()


def download(urls: list[str], folder: Path, md5: str, *, filename: str = ARCHIVE, flag: str = "--archive") -> Path:
    """Fetch an archive from the first address that delivers it intact; at once if it is already there.

    Raises RunFailed naming every address and what it answered.
    """
    failures = []
    for url in urls:
        try:
            print(f"downloading {url}")
            download_url(url, str(folder), filename=filename, md5=md5)
            return folder / filename
        except (OSError, HTTPException, RuntimeError) as error:  # no answer, half an answer, another MD5
            failures.append(f"{url}: {error}")
            (folder / filename).unlink(missing_ok=True)
    raise RunFailed(
        f"no download of {filename} ({'; '.join(failures)}). Get the file by other means and pass it with {flag} FILE"
    )


def unpack(archive: Path, data_dir: Path) -> None:
    """Write the segmentation lists of an archive in the official layout, and the photos and masks that they name.

    Files that are there at their full size are left alone, and the lists are written last: once they are there,
    so is all the rest. Raises UserError for an archive that is not one, is cut short, or lacks files that its lists
    name, before anything is written.
    """
    if not archive.is_file():
        raise UserError(f"no archive {archive}")
    try:
        with tarfile.open(archive, "r:") as tar:
            matches = [(MEMBER.fullmatch(PurePosixPath(member.name).as_posix()), member) for member in tar]
            found = {match[1]: member for match, member in matches if match and member.isreg()}
            lists = {
                Path(name).stem: _content(tar, found[name]).decode() for name in found if name.startswith("ImageSets/")
            }
            if not {"train", "val"} <= lists.keys():
                raise UserError(
                    f"{archive} holds no VOCdevkit/VOC2012/ImageSets/Segmentation/; is it {ARCHIVE}, whole?"
                )
            ids = sorted({id_ for text in lists.values() for id_ in text.split()})
            wanted = [f"JPEGImages/{id_}.jpg" for id_ in ids] + [f"SegmentationClass/{id_}.png" for id_ in ids]
            if missing := [name for name in wanted if name not in found]:
                raise UserError(f"{archive} lists {missing[0]} without having it; is it {ARCHIVE}, whole?")
            for name, text in lists.items():
                path = data_dir / f"{name}.txt"
                if path.exists() and path.read_bytes().split() != text.encode().split():
                    raise UserError(f"{path} belongs to another data set; choose another --data_dir")
            for name in tqdm(wanted, desc="unpacking", unit="file", disable=None, leave=False):
                if not (data_dir / name).exists() or (data_dir / name).stat().st_size != found[name].size:
                    _write_whole(data_dir / name, _content(tar, found[name]))
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{archive} cannot be read as a tar archive ({error}); download it again") from None
    for name in sorted(lists, key=lambda name: name == "trainval"):  # whose presence says that all is there
        write_text(data_dir / f"{name}.txt", lists[name])
    counts = ", ".join(f"{len(text.split())} {name}" for name, text in sorted(lists.items()))
    print(f"{len(ids)} photos with masks in {data_dir}: {counts}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular file in an archive."""
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def get_voc(data_dir: Path, archive: Path | None) -> None:
    """Bring VOC2012 into data_dir, downloading it if no archive is given and it is not there."""
    if archive is None:
        if (data_dir / "trainval.txt").exists():
            count = sum(len(find_split("voc", data_dir, name).ids) for name in ("train", "val"))
            print(f"{data_dir} is complete: {count} photos with masks")
            return
        if (data_dir / "train.txt").exists():
            raise UserError(f"{data_dir} holds the lists of another data set; delete them or choose another --data_dir")
        official = DATASET_YEAR_DICT["2012"]
        archive = download([official["url"], MIRROR], data_dir, official["md5"])
        unpack(archive, data_dir)
        print(f"{archive} is no longer needed")
    else:
        unpack(archive, data_dir)


def get_sbd(data_dir: Path, archive: Path | None) -> None:
    """Bring the photos of SBD into a VOC2012 that is in data_dir, downloading them if no archive is given."""
    require("scipy", "masks of SBD")
    folders = VOCFolders.find(data_dir)
    trainaug = folders.lists / "trainaug.txt"
    if trainaug.exists():
        print(f"{trainaug} is complete: {len(find_split('voc', data_dir, 'trainaug').ids)} photos")
        return
    train, val = (find_split("voc", data_dir, name).ids for name in ("train", "val"))
    source = archive or download([SBDataset.url], data_dir, SBDataset.md5, filename=SBD_ARCHIVE, flag="--sbd")
    added = unpack_sbd(source, folders.images, folders.masks, here={*train, *val})
    write_text(trainaug, "".join(f"{id_}\n" for id_ in sorted({*train, *added})))
    print(f"{len(train)} photos of train and {len(added)} of SBD -> {trainaug}")
    if archive is None:
        print(f"{source} is no longer needed")


def unpack_sbd(archive: Path, images: Path, masks: Path, *, here: set[str]) -> set[str]:
    """Write the photos of SBD's archive that are not here, and their masks as grey PNGs, and return their ids.

    Files that are there are left alone. Raises UserError, before anything is written, for any other file.
    """
    if not archive.is_file():
        raise UserError(f"no archive {archive}")
    if not check_integrity(str(archive), SBDataset.md5):
        raise UserError(f"{archive} is not SBD's {SBD_ARCHIVE}, or is damaged (another MD5); download it again")
    added = set()
    with tarfile.open(archive, "r|gz") as tar:
        for member in tqdm(tar, desc="unpacking SBD", unit="file", disable=None, leave=False):
            match = SBD_MEMBER.fullmatch(member.name)
            if not match or match[2] in here:
                continue
            added.add(match[2])
            is_photo = match[1] == "img"
            target = images / f"{match[2]}.jpg" if is_photo else masks / f"{match[2]}.png"
            if not target.exists():
                content = _content(tar, member)
                _write_whole(target, content if is_photo else _mask_of_sbd(content))
    return added


def _mask_of_sbd(content: bytes) -> bytes:
    """Turn a MATLAB file's class indices into a PNG. SBD has no void."""
    from scipy.io import loadmat  # needed for SBD only

    stream = io.BytesIO()
    Image.fromarray(loadmat(io.BytesIO(content))["GTcls"][0]["Segmentation"][0]).save(stream, format="PNG")
    return stream.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole, without waiting for the disk, which for 18,000 files would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


SPLITS = ("train", "val", "test")


def write_lists(data_dir: Path, shares: list[float], seed: int, group: str | None = None) -> None:
    """Deal the photos that have a mask into train.txt, val.txt and test.txt, at random but the same for equal seeds.

    group is a regular expression: photos for which it captures the same text come into the same list.
    """
    images, masks, lists = _folders_to_deal(data_dir, shares)
    photos = photos_by_id(images)
    ids = sorted(id_ for id_ in photos if (masks / f"{id_}.png").is_file())
    if bad := [id_ for id_ in ids if ids_in(f"{id_}\n".encode(errors="replace")) != [id_]]:
        raise UserError(
            f"{images} has names that a list cannot hold, {_some(bad)}; rename these photos and their masks: UTF-8, no "
            "blank at either end, no line separator"
        )
    groups = [[id_] for id_ in ids] if group is None else grouped(ids, group)
    parts = deal(groups, shares, seed)
    if empty := [name for name in (SPLITS if shares[2] and group else SPLITS[:2]) if not parts[name]]:
        kind = f"with a mask in {masks}" if group is None else f"make {len(groups)} groups by --group {group!r}"
        raise UserError(f"{len(ids)} photos of {images} {kind}: too few, none is left for {' and '.join(empty)}")
    counts = []
    for name, part in parts.items():
        listed = sorted(id_ for members in part for id_ in members)
        if part:
            write_text(lists / f"{name}.txt", "".join(f"{id_}\n" for id_ in listed))
        counts.append(f"{len(listed)} {name}" + (f" (groups: {len(part)})" if group else ""))
    print(f"{', '.join(counts)} -> {lists}" + (" (groups stay whole, so the shares are approximate)" if group else ""))
    if len(photos) > len(ids):
        print(f"{len(photos) - len(ids)} photos without a mask are in no list")


def _folders_to_deal(data_dir: Path, shares: list[float]) -> tuple[Path, Path, Path]:
    """Return where the photos and masks are and the lists are to be. Raises UserError if they cannot be dealt."""
    if (
        any(not 0 <= share <= 1 for share in shares)
        or not math.isclose(sum(shares), 1, abs_tol=1e-6)
        or 0 in shares[:2]
    ):
        raise UserError(
            f"--split {' '.join(f'{s:g}' for s in shares)}: give three shares that sum to 1, train and val above 0"
        )
    images, masks = data_dir / "JPEGImages", data_dir / "SegmentationClass"
    for folder, content in ((images, "photos"), (masks, "masks, palette PNGs of the same names")):
        if not folder.is_dir():
            raise UserError(f"no {folder}; put your {content} there")
    lists = data_dir / "ImageSets" / "Segmentation"
    lists = lists if lists.is_dir() else data_dir
    for name in SPLITS:
        if (lists / f"{name}.txt").exists():
            raise UserError(f"{lists / name}.txt is already there; delete the lists to deal them anew")
    return images, masks, lists


def _some(names: list[str]) -> str:
    """Return the first few names, with whatever a terminal would not show spelled out."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def grouped(ids: list[str], pattern: str) -> list[list[str]]:
    """Return the ids for which a regular expression captures the same text, or, without groups of its own, matches it.

    Raises UserError for one that is not valid, and naming ids that it does not match.
    """
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--group {pattern!r} is not a regular expression: {error}") from None
    groups: dict[object, list[str]] = {}
    unmatched = []
    for id_ in ids:
        match = regex.search(id_)
        if match is None:
            unmatched.append(id_)
        else:
            groups.setdefault(match.groups() or match[0], []).append(id_)
    if unmatched:
        raise UserError(f"--group {pattern!r} does not match {_some(unmatched)}; it must match every name")
    return list(groups.values())


def deal(groups: list[list[str]], shares: Sequence[float], seed: int) -> dict[str, list[list[str]]]:
    """Shuffle groups and give each to the split in whose share of all ids its middle falls.

    A split whose share is one photo or more gets one group at least, if there are enough groups.
    """
    groups = groups.copy()
    random.Random(seed).shuffle(groups)
    total = sum(map(len, groups))
    ends = [round(total * shares[0]), round(total * (shares[0] + shares[1]))]
    starts = accumulate(map(len, groups), initial=0)
    splits = [bisect_right(ends, start + len(group) / 2) for start, group in zip(starts, groups, strict=False)]
    train, val, test = (round(total * share) >= 1 for share in shares)
    first = min(max(splits.count(0), train), len(groups) - val - test)
    second = min(max(splits.count(0) + splits.count(1), first + val), len(groups) - test)
    return dict(zip(SPLITS, (groups[:first], groups[first:second], groups[second:]), strict=True))


def main(args: argparse.Namespace) -> None:
    if args.data_dir.exists() and not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir} is not a folder")
    if args.group is not None and not args.split:
        raise UserError(f"--group {args.group!r} is of use with --split only")
    if args.sbd:
        get_sbd(args.data_dir, None if args.sbd is DOWNLOAD else args.sbd)
    elif args.sample:
        print(f"the sample is in {draw_sample(args.data_dir / 'sample')}")
    elif args.split:
        write_lists(args.data_dir, args.split, args.seed, args.group)
    else:
        get_voc(args.data_dir, args.archive)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
