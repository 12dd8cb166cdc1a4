"""Measure this program against the original recipe (baseline.py): both sides in turn, ratios of medians.

python benchmarks/run.py --data_dir data prints the table, on the device that there is. Without VOC2012, the drawn
scenes of `python build_dataset.py --sample` serve as well: --data_dir data/sample.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tabulate import tabulate

from benchmarks import baseline
from benchmarks.common import build, in_turn, machine, make_parser, own_memory, peak_memory
from engine.devices import pick_device, resolve_precision, seed_everything
from model.data_loader import Loader, SegmentationDataset, make_loader
from model.layouts import Split, find_split
from model.losses import SegmentationLoss
from model.voc import CLASS_NAMES
from params import Params
from train import train_step

SIZE, BATCH = 224, 5
DECODED = 15  # images of an input pass


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--peak_memory_of", choices=SIDES, help=argparse.SUPPRESS)  # in its own process
    return parser.parse_args()


def cached(split: Split, count: int, device: torch.device) -> Loader:
    """Load the first photos of a split, in batches from the cache."""
    parts = (split.ids[:count], split.images[:count], split.masks[:count])
    dataset = SegmentationDataset(Split(f"benchmark{count}", *parts), class_names=CLASS_NAMES, image_size=SIZE)
    return make_loader(dataset, batch_size=BATCH, seed=0, device=device)


def decoded(split: Split, count: int) -> list[list[torch.Tensor]]:
    """Read the first photos from files, in batches, as the original recipe does."""
    pairs = list(zip(split.images, split.masks, strict=True))[:count]
    examples = [baseline.load(*pair, SIZE) for pair in pairs]
    groups = [examples[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [[torch.stack(part) for part in zip(*group, strict=True)] for group in groups]


def ours(split: Split, device: torch.device) -> Callable[[], None]:
    """Return a training step, as train.py takes it."""
    params = resolve_precision(Params(pretrained=False, batch_size=BATCH, num_workers=0), device)
    training = build(params, device)
    training.model.train()
    criterion = SegmentationLoss(**params.loss_options())
    images, labels = (part.to(device) for part in next(iter(cached(split, BATCH, device)))[:2])
    return lambda: train_step(training, criterion, images, labels, batch_size=len(images))


def theirs(split: Split, device: torch.device) -> Callable[[], float]:
    """Return a training step of the original recipe."""
    images, targets = (part.to(device) for part in decoded(split, BATCH)[0])
    model = baseline.network().to(device).train()
    optimizer = baseline.optimizer(model)
    return lambda: baseline.train_step(model, optimizer, images, targets)


SIDES = {"ours": ours, "theirs": theirs}


def row(what: str, ours: list[float], theirs: list[float], images: int = 1) -> tuple:
    """Return a row of the table: medians with the spread from fastest to slowest, and the ratio of the medians."""

    def text(seconds: list[float]) -> str:
        low, middle, high = (1000 * t / images for t in (min(seconds), statistics.median(seconds), max(seconds)))
        return f"{middle:.4g} ({low:.4g}-{high:.4g}) ms"

    return what, text(theirs), text(ours), f"{statistics.median(theirs) / statistics.median(ours):.2f}"


def input_rows(split: Split, repeats: int) -> list[tuple]:
    """Measure from files to batches of tensors, on one core: the first time, and from the cache."""
    cores, threads, cpu = os.sched_getaffinity(0), torch.get_num_threads(), torch.device("cpu")
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    loader = cached(split, DECODED, cpu)

    def first_pass() -> None:
        torch.from_numpy(np.stack([loader.dataset.decode(index) for index in range(len(loader.dataset))]))

    rows = []
    for what, function in {"first pass": first_pass, "cached": lambda: list(loader)}.items():
        seconds = in_turn(function, lambda: decoded(split, DECODED), repeats=repeats, device=cpu)
        rows.append(row(f"input, {what}, an image, one core", *seconds, len(loader.dataset)))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    return rows


def memory_row(args: argparse.Namespace) -> tuple:
    """Measure the memory of two training steps of each side, each in a process of its own."""
    found = []
    for side in ("theirs", "ours"):
        flags = ["--peak_memory_of", side, "--device", args.device, "--data_dir", args.data_dir]
        done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
        found.append(float(done.stdout))
    return "peak memory, two steps", *(f"{value:.0f} MiB" for value in found), f"{found[0] / found[1]:.2f}"


def main(args: argparse.Namespace) -> None:
    device, before = pick_device(args.device), own_memory("VmRSS")
    split = find_split("voc", args.data_dir, "val", masks_required=True)
    seed_everything(0, deterministic=False)
    if args.peak_memory_of:
        step = SIDES[args.peak_memory_of](split, device)
        step(), step()
        return print(peak_memory(device, before))
    seconds = in_turn(*(side(split, device) for side in SIDES.values()), repeats=args.repeats, device=device)
    rows = [row(f"training step, batch {BATCH}", *seconds), *input_rows(split, args.repeats), memory_row(args)]
    precision = resolve_precision(Params(), device).precision
    print(f"{machine(device)}; {SIZE}x{SIZE}, {precision} against fp32; median (fastest-slowest) of {args.repeats}\n")
    print(tabulate(rows, headers=("", "original recipe", "this program", "ratio"), tablefmt="pipe"))


if __name__ == "__main__":
    main(parse_args())
