"""Segment photos: for each a palette PNG of class indices, an overlay with a legend, and a JSON of class areas."""

import argparse
import errno
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine import distributed, ranks
from engine.checkpoints import agreed_class_names, checkpoint_path, load_network
from engine.cli import (
    add_restore_file,
    add_testing_flags,
    experiment_parser,
    positive,
    run_main,
    signal_received,
    stop_if_asked,
)
from engine.distributed import pick_device
from engine.evaluation import make_segmenter
from engine.folders import recorded_data_dir
from model.inference import Segmenter
from model.layouts import find_split
from model.photos import IMAGE_SUFFIXES, read_photo
from model.voc import colour_mask
from params import Params
from utils import UserError, make_folder, save_picture, say, walk, write_json
from visualize import overlay

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp")  # of photos in folders
RESULTS = (".png", "_overlay.png", ".json")
LEAST_AREA = 0.0005  # of a photo, to be in the legend
PIXELS_AT_ONCE = 2**24  # of photos; no other is read in the same batch once they have more

T = TypeVar("T")


class Example(NamedTuple):
    name: Path  # of the results, without suffix
    file: Path
    photo: Image.Image | UserError  # or what is wrong with it


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__, data="data set whose class names must be the checkpoint's")
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="files, folders (with all below them) and quoted patterns as 'a/*.jpg'",
    )
    add_restore_file(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("predictions"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--tile", type=positive, metavar="N", help="look at large photos in overlapping tiles of N pixels a side"
    )
    add_testing_flags(parser)
    return parser.parse_args()


def find_photos(given: Sequence[str], output_dir: Path) -> dict[Path, Path]:
    """Return every photo by the name of its results, without suffix: its place below the folder, pattern or file given.

    An output_dir inside a folder is not searched. Raises UserError where there is no photo, where one lies beside the
    results, and where two would have the same result.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # by the real path, so that nothing is predicted twice
    for pattern in given:
        matches = [Path(pattern)] if Path(pattern).exists() else _matches(pattern)
        photos = [(file, root) for match in matches for file, root in _below(match, _real(output_dir))]
        if not photos:
            raise UserError(f"{pattern}: no photo is there ({', '.join(SUFFIXES)})")
        for file, root in photos:
            found.setdefault(_real(file), (file, root))

    stems = [file.relative_to(root).with_suffix("") for file, root in found.values()]
    counts, names = Counter(stems), {}
    for stem, (file, _) in zip(stems, found.values(), strict=True):
        names[stem if counts[stem] == 1 else stem.with_name(f"{stem.name}_{file.suffix[1:]}")] = file
    results = [(output_dir / name).with_name(name.name + suffix) for name in names for suffix in RESULTS]
    places = {_real(result.parent) for result in results}
    if beside := next((photo for photo in found if photo.parent in places), None):
        raise UserError(f"results would lie beside the photo {beside}, or replace it; choose another --output_dir")
    if len(names) < len(found) or len(set(results)) < len(results):
        twice = next(iter({result for result in results if results.count(result) > 1} or stems))
        raise UserError(f"two photos would both have the result {twice}; predict them apart")
    return names


def _matches(pattern: str) -> list[Path]:
    """Return the folders and photos that a pattern as 'a/*.jpg' means."""
    paths = map(Path, sorted(glob.glob(pattern, recursive=True)))
    return [path for path in paths if path.is_dir() or path.suffix.lower() in SUFFIXES]


def _below(path: Path, output_dir: Path) -> list[tuple[Path, Path]]:
    """Return the photos of a folder with that folder, or a file with its own."""
    if not path.is_dir():
        return [(path, path.parent)]
    within_results = output_dir in (_real(path), *_real(path).parents)
    files = [folder / name for folder, _, names in walk(path) for name in names if not name.startswith(".")]
    files = [file for file in sorted(files) if file.suffix.lower() in SUFFIXES]
    return [(file, path) for file in files if within_results or output_dir not in _real(file).parents]


def _real(path: Path) -> Path:
    """Return a path without links; one that leads in a circle as it is."""
    return Path(os.path.realpath(path))


def read(groups: Iterable[Sequence[tuple[Path, Path]]]) -> Iterator[list[Example]]:
    """Yield the examples of each group of (name, file), in parts where the photos are large."""
    for group in groups:
        part, pixels = list[Example](), 0
        for name, file in group:
            try:
                photo = read_photo(file)
            except UserError as error:
                part.append(Example(name, file, error))
                continue
            part.append(Example(name, file, photo))
            pixels += photo.width * photo.height
            if pixels > PIXELS_AT_ONCE:
                yield part
                part, pixels = [], 0
        if part:
            yield part


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator does; a thread makes the next item meanwhile."""
    # Not concurrent.futures, at whose end, and the interpreter's, a thread is waited for that a file never answers.
    with ThreadPool(1) as pool:
        coming = pool.apply_async(next, (items, None))
        while (item := coming.get()) is not None:
            coming = pool.apply_async(next, (items, None))
            yield item


def write(
    part: Sequence[Example], predictions: Sequence[np.ndarray], names: Sequence[str], folder: Path, bar: tqdm
) -> int:
    """Write the results of every photo that could be read. Names the photos that have none and returns how many."""
    remaining, faults = iter(predictions), 0
    for name, file, photo in part:
        if signal_received():
            break
        try:
            if isinstance(photo, UserError):
                raise photo
            write_results(file, photo, next(remaining), names, folder / name)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:  # which the next photo would meet
                raise
            faults += 1
            bar.clear()
            say(f"predict.py: {error}; skipped", sys.stderr)
    return faults


def write_results(file: Path, photo: Image.Image, prediction: np.ndarray, names: Sequence[str], output: Path) -> None:
    """Write the three results of one photo."""
    counts = np.array(Image.fromarray(prediction).histogram()[: len(names)])  # bincount takes 8 bytes a pixel
    shares = {int(index): counts[index] / prediction.size for index in np.argsort(-counts, kind="stable")}
    output.parent.mkdir(parents=True, exist_ok=True)
    legend = {index: f"{names[index]} {share:.1%}" for index, share in shares.items() if share >= LEAST_AREA}
    pictures = colour_mask(prediction, names), overlay(photo, prediction, names, legend)
    files = [output.with_name(output.name + suffix) for suffix in RESULTS]
    for file_out, picture in zip(files, pictures, strict=False):
        save_picture(picture, file_out)
    areas = {names[index]: {"pixels": int(counts[index]), "share": share} for index, share in shares.items() if share}
    size = {"width": photo.width, "height": photo.height}
    write_json(files[-1], {"photo": str(file), **size, "areas": areas})


def load(
    model_dir: str | Path,
    *,
    restore_file: str = "best",
    device: str = "auto",
    scales: Sequence[float] | None = None,
    flip: bool = False,
) -> tuple[Segmenter, list[str]]:
    """Load a trained network, in a notebook say: load(...)[0].segment(photo) of an RGB photo gives its class map.

    Returns what segments photos, see model.inference.Segmenter, and the names of the classes. Raises UserError as the
    command does.
    """
    picked, file = pick_device(device), checkpoint_path(Path(model_dir), restore_file)
    model, params, checkpoint = load_network(Path(model_dir), restore_file, picked)
    names = agreed_class_names(checkpoint, file, None, params.num_classes)
    return make_segmenter(model, params, picked, scales=scales, flip=flip), names


def main(args: argparse.Namespace) -> int:
    with distributed.processes(args.device) as device:
        return run(device, args)


def run(device: torch.device, args: argparse.Namespace) -> int:
    """Predict; of n processes each takes every n-th batch. Returns the exit status: 1 if a photo cannot be read.

    While the network is at work on a batch, one thread reads the next and one writes the results of the one before. Not
    so with --tile: of large photos only one is held at a time.
    """
    photos = distributed.broadcast_from_main(lambda: prepare(args))
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    names = distributed.broadcast_from_main(lambda: find_names(params, checkpoint, args))
    with distributed.together():
        segmenter = make_segmenter(model, params, device, scales=args.scales, flip=args.flip)
        make_folder(args.output_dir, "--output_dir")
    size = 1 if args.tile else params.scoring_batch_size
    items = list(photos.items())
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    own = groups[ranks.rank() :: ranks.world_size()]
    faults = 0
    with (
        tqdm(total=sum(map(len, own)), desc="predicting", unit="img", leave=False, disable=ranks.bar_disabled()) as bar,
        ThreadPoolExecutor(1) as writer,  # which ends the file that it is writing, whatever happens here
    ):
        written: Future[int] = writer.submit(int)  # of nothing yet, 0
        parts = read(own)
        for part in parts if args.tile else ahead(parts):
            stop_if_asked()
            readable = [photo for _, _, photo in part if isinstance(photo, Image.Image)]
            predictions = [map_.cpu().numpy() for map_ in segmenter.segment_all(readable, tile=args.tile)]
            faults += written.result()
            written = writer.submit(write, part, predictions, names, args.output_dir, bar)
            bar.update(len(part))
            if args.tile:
                wait([written])
        faults += written.result()
    stop_if_asked()  # after a signal the last photos are not written
    faults = sum(distributed.gather(faults))
    if ranks.is_main():
        print(f"{len(photos) - faults} of {len(photos)} photos -> {args.output_dir}")
    return 1 if faults else 0


def prepare(args: argparse.Namespace) -> dict[Path, Path]:
    """Return the photos by what their results are called, see find_photos."""
    if args.tile is not None and args.tile < 32:
        raise UserError(f"--tile {args.tile}: a tile has at least 32 pixels a side")
    return find_photos(args.photos, args.output_dir)


def find_names(params: Params, checkpoint: dict, args: argparse.Namespace) -> list[str]:
    """Return the names of the classes: the checkpoint's, which data given with --data_dir must have too.

    Data that the run has recorded need not be there any more, and may have become others, which is said.
    """
    file, root = checkpoint_path(args.model_dir, args.restore_file), args.data_dir or recorded_data_dir(args.model_dir)
    if params.dataset == "sample" or not (args.data_dir or (root and root.is_dir())):
        root = None
    try:
        split = None if root is None else find_split(params.dataset, root, "val")
        return agreed_class_names(checkpoint, file, split, params.num_classes)
    except UserError as error:
        if args.data_dir or not checkpoint.get("class_names"):
            raise
        say(f"predict.py: {error}; here the names are those of {file}", sys.stderr)
        return agreed_class_names(checkpoint, file, None, params.num_classes)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
