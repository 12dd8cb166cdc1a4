"""Segment photos: for each a palette PNG of class indices, an overlay with a legend, and a JSON of class areas."""

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import (
    UserError,
    add_testing_flags,
    end_at_once_on_interrupt,
    experiment_parser,
    load_network,
    pick_device,
    positive,
    replacing,
    run_main,
    stop_if_asked,
    write_json,
)


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__, data=False)
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="files, folders (with all below them) and quoted patterns as 'a/*.jpg'",
    )
    parser.add_argument(
        "--restore_file", default="best", help="which checkpoint of model_dir: best, last (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("predictions"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--tile", type=positive, metavar="N", help="look at large photos in overlapping tiles of N pixels a side"
    )
    add_testing_flags(parser)
    return parser.parse_args()


# Before the seconds that importing torch takes, so that --help and a typing error answer at once.
if __name__ == "__main__":
    ARGS = parse_args()
    end_at_once_on_interrupt()

import numpy as np
from tqdm import tqdm

from evaluate import segmenter
from model.data_loader import IMAGE_SUFFIXES, default_class_names, read_photo
from model.inference import Segmenter
from model.voc import colour_mask
from visualize import overlay

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp")  # of photos in folders
LEAST_AREA = 0.0005  # of a photo, to be in the legend


def find_photos(given: Sequence[str], output_dir: Path) -> dict[Path, Path]:
    """Every photo by what its results are called, without suffix, below output_dir.

    A folder keeps its structure; what lies in output_dir is not a photo. Raises UserError where there is none, and for
    two photos whose results would have the same name.
    """
    photos: dict[Path, Path] = {}
    for pattern in given:
        matches = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        found = [(file, root) for match in matches for file, root in _below(match, output_dir.resolve())]
        if not found:
            raise UserError(f"{pattern}: no such photo, and no folder of photos ({', '.join(SUFFIXES)})")
        for file, root in found:
            name = file.relative_to(root).with_suffix("")
            other = photos.setdefault(name, file)
            if other.resolve() != file.resolve():
                raise UserError(f"the results of {other} and {file} would have the same name; predict them apart")
    return photos


def _below(path: Path, output_dir: Path) -> list[tuple[Path, Path]]:
    """The photos of a folder with that folder, or a file with its own."""
    if not path.is_dir():
        return [(path, path.parent)]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return [(file, path) for file in files if output_dir not in file.resolve().parents]


def predict(file: Path, segmenter: Segmenter, names: Sequence[str], output: Path, *, tile: int | None) -> None:
    """Write the three results of one photo. Raises UserError if it cannot be read."""
    photo = read_photo(file)
    prediction = segmenter.segment(photo, tile=tile).cpu().numpy()
    counts = np.bincount(prediction.ravel(), minlength=len(names))
    shares = {int(index): counts[index] / prediction.size for index in np.argsort(-counts, kind="stable")}
    output.parent.mkdir(parents=True, exist_ok=True)
    legend = {index: f"{names[index]} {share:.1%}" for index, share in shares.items() if share >= LEAST_AREA}
    pictures = {".png": colour_mask(prediction), "_overlay.png": overlay(photo, prediction, legend)}
    for suffix, picture in pictures.items():
        with replacing(output.with_name(output.name + suffix)) as temporary:
            picture.save(temporary, format="PNG")
    areas = {names[index]: {"pixels": int(counts[index]), "share": share} for index, share in shares.items() if share}
    size = {"width": photo.width, "height": photo.height}
    write_json(output.with_name(output.name + ".json"), {"photo": str(file), **size, "areas": areas})


def main(args: argparse.Namespace) -> int:
    if args.tile is not None and args.tile < 32:
        raise UserError(f"--tile {args.tile}: a tile has at least 32 pixels a side")
    photos = find_photos(args.photos, args.output_dir)
    device = pick_device(args.device)
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    ask = segmenter(model, params, device, args)
    names = checkpoint.get("class_names") or default_class_names(params.num_classes)
    faults = []
    with tqdm(photos.items(), desc="predicting", unit="img", leave=False, disable=None) as bar:
        for name, file in bar:
            stop_if_asked()
            try:
                predict(file, ask, names, args.output_dir / name, tile=args.tile)
            except UserError as error:
                faults.append(error)
                bar.write(f"predict.py: {error}; skipped", file=sys.stderr)
    print(f"{len(photos) - len(faults)} of {len(photos)} photos -> {args.output_dir}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(ARGS)))
