"""Segment photos: for each a palette PNG of class indices, an overlay with a legend, and a JSON of class areas."""

import argparse
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.checkpoints import agreed_class_names, checkpoint_path, load_network
from engine.cli import add_folder, add_restore_file, experiment_parser, positive, run_main
from engine.devices import autocast, input_options, pick_device
from model import UserError, attempt, cores
from model.data_loader import begin_loader_process
from model.inference import Segmenter, fold_batch_norm
from model.layouts import find_split
from model.net import FCN_GCN
from model.photos import IMAGE_SUFFIXES, UNREADABLE, read_photo
from model.voc import colour_mask
from params import Params
from utils import make_folder, save_picture, walk, write_json
from visualize import overlay

RESULTS = (".png", "_overlay.png", ".json")
LEAST_AREA = 0.0005  # of a photo, to be in the legend
READERS = 4  # processes at most that read photos ahead


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__, data="data set whose class names must be the checkpoint's")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="files, folders and quoted patterns as 'a/*.jpg'")
    add_restore_file(parser)
    add_folder(parser, "--output_dir", "predictions", "folder of the results")
    parser.add_argument("--tile", type=positive, metavar="N", help="look at overlapping tiles of N x N pixels")
    add_testing_flags(parser)
    return parser.parse_args()


def add_testing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say at which sizes a photo is predicted."""
    scales = "average over these multiples of image_size, as 0.75 1 1.25"
    parser.add_argument("--scales", type=float, nargs="+", metavar="S", help=scales)
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")


def find_photos(given: Sequence[str], output_dir: Path, endings: Sequence[str] = RESULTS) -> dict[Path, Path]:
    """Return every photo by the name of its results, without suffix: its place below the folder, pattern or file given.

    endings are those of the results of a photo. Raises UserError where there is no photo, one lies beside the results,
    or two would have the same result.
    """
    found: dict[str, tuple[Path, Path]] = {}  # by the real path, so that nothing is predicted twice
    for pattern in given:
        photos = list(_matches(pattern, output_dir))
        if not photos:
            raise UserError(f"{pattern}: no photo is there ({', '.join(IMAGE_SUFFIXES)})")
        for file, root in photos:
            found.setdefault(os.path.realpath(file), (file, root))

    stems = [file.relative_to(root).with_suffix("") for file, root in found.values()]
    counts = Counter(stems)
    names = [
        stem if counts[stem] == 1 else stem.with_name(f"{stem.name}_{file.suffix[1:]}")
        for stem, (file, _) in zip(stems, found.values(), strict=True)
    ]
    results = Counter(path for name in names for path in result_paths(output_dir / name, endings))
    folders = {os.path.realpath(result.parent) for result in results}
    if beside := next((photo for photo in found if os.path.dirname(photo) in folders), None):
        raise UserError(f"results would lie beside the photo {beside}, or replace it; choose another --output_dir")
    if twice := next((result for result, count in results.items() if count > 1), None):
        raise UserError(f"two photos would both have the result {twice}; predict them apart")
    return {name: file for name, (file, _) in zip(names, found.values(), strict=True)}


def _matches(pattern: str, output_dir: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the photos of a file, folder or pattern, each with the folder below which its name begins.

    What lies in output_dir is an earlier result, not a photo, unless a folder in it was asked for.
    """
    results, exists = output_dir.resolve(), Path(pattern).exists()
    for match in map(Path, [pattern] if exists else sorted(glob.glob(pattern, recursive=True))):
        if match.is_dir():
            asked_for = match.resolve().is_relative_to(results)
            for folder, _, names in walk(match):
                if asked_for or not folder.resolve().is_relative_to(results):
                    yield from ((folder / name, match) for name in names if _is_photo(name) and name[0] != ".")
        elif exists or _is_photo(match.name):
            yield match, match.parent


def _is_photo(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *UNREADABLE))


def result_paths(output: Path, endings: Sequence[str] = RESULTS) -> list[Path]:
    return [output.with_name(output.name + ending) for ending in endings]


def write_results(file: Path, photo: Image.Image, prediction: np.ndarray, names: Sequence[str], output: Path) -> None:
    counts = np.array(Image.fromarray(prediction).histogram()[: len(names)])  # bincount takes 8 bytes a pixel
    shares = {int(index): counts[index] / prediction.size for index in np.argsort(-counts, kind="stable")}
    legend = {index: f"{names[index]} {share:.1%}" for index, share in shares.items() if share >= LEAST_AREA}
    areas = {names[index]: {"pixels": int(counts[index]), "share": share} for index, share in shares.items() if share}
    mask_file, overlay_file, json_file = result_paths(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(colour_mask(prediction, names), mask_file)
    save_picture(overlay(photo, prediction, names, legend), overlay_file)
    write_json(json_file, {"photo": str(file), "width": photo.width, "height": photo.height, "areas": areas})


def make_segmenter(
    model: FCN_GCN, params: Params, device: torch.device, *, scales: Sequence[float] | None = None, flip: bool = False
) -> Segmenter:
    """Return what segments photos, at several scales and mirrored if asked. Raises UserError for unusable scales.

    The network gets its batch norm folded and is of no other use then.
    """
    fold_batch_norm(model)
    return Segmenter(
        model,
        device,
        image_size=params.image_size,
        resize=params.resize,
        padding=model.encoder.padding,
        scales=scales or (1.0,),
        flip=flip,
        autocast=partial(autocast, device, params.precision),
        **input_options(model, params),
    )


def open_network(
    model_dir: Path, restore_file: str, device: torch.device, data_dir: Path | None = None, **looks: Any
) -> tuple[Segmenter, list[str], Params, dict[str, Any]]:
    """Return what segments photos with a checkpoint, the names of its classes, its params, and the checkpoint.

    looks are keywords of make_segmenter(). Raises UserError where the names are not those of a data set, if given.
    """
    model, params, checkpoint = load_network(model_dir, restore_file, device)
    split = find_split(params.dataset, data_dir, "val") if data_dir and params.dataset != "sample" else None
    names = agreed_class_names(checkpoint, checkpoint_path(model_dir, restore_file), split, params.num_classes)
    return make_segmenter(model, params, device, **looks), names, params, checkpoint


def load(
    model_dir: str | Path,
    *,
    restore_file: str = "best",
    data_dir: Path | None = None,
    device: str = "auto",
    scales: Sequence[float] | None = None,
    flip: bool = False,
) -> tuple[Segmenter, list[str]]:
    """Load a trained network, in a notebook say: load(...)[0].segment(photo) of an RGB photo gives its class map.

    Returns a Segmenter and the names of the classes. Raises UserError as the command does.
    """
    return open_network(Path(model_dir), restore_file, pick_device(device), data_dir, scales=scales, flip=flip)[:2]


def main(args: argparse.Namespace) -> int:
    """Predict every photo. Returns the exit status: 1 if one cannot be read."""
    if args.tile is not None and args.tile < 32:
        raise UserError(f"--tile {args.tile}: a tile has at least 32 pixels a side")
    photos = find_photos(args.photos, args.output_dir)
    options = {key: getattr(args, key) for key in ("restore_file", "data_dir", "device", "scales", "flip")}
    segmenter, names = load(args.model_dir, **options)
    make_folder(args.output_dir, "--output_dir")
    loader: DataLoader = DataLoader(
        list(photos.values()),  # type: ignore[arg-type]  # whatever has a length and indices
        batch_size=None,
        collate_fn=partial(attempt, read_photo),
        num_workers=0 if args.tile else min(READERS, cores(), len(photos)),  # photos that need tiles are large
        worker_init_fn=begin_loader_process,
    )
    faults = 0
    bar = tqdm(loader, desc="predicting", unit="img", leave=False, disable=None)
    for (name, file), photo in zip(photos.items(), bar, strict=True):
        if isinstance(photo, UserError):
            faults += 1
            bar.write(f"predict.py: {photo}; skipped", sys.stderr)
        else:
            prediction = segmenter.segment(photo, tile=args.tile).cpu().numpy()
            write_results(file, photo, prediction, names, args.output_dir / name)
    print(f"{len(photos) - faults} of {len(photos)} photos -> {args.output_dir}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
