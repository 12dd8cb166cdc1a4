"""How often a comparison errs, in experiments that are put together from real ones. docs/COMPARING.md has the table.

A run of a recipe has for each class what one of the recipe's real runs, drawn by lot, predicts for its pixels, on
photos that are drawn from the real ones. So it is known what the recipe reaches: the mean of many such runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tabulate import tabulate
from tqdm import tqdm

from comparing import Counts, between_seeds, check_same_photos, difference, mIoU, read_counts, resample
from engine.cli import run_main
from model import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs="+", type=Path, required=True, help="counts_*.npz of a recipe's runs")
    parser.add_argument(
        "--baseline", nargs="+", type=Path, required=True, help="those of another's, on the same photos"
    )
    parser.add_argument("--photos", nargs="+", type=int, default=[20, 60, 157, 500], help="(default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 5], help="(default: %(default)s)")
    parser.add_argument("--experiments", type=int, default=400, help="for each cell (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="(default: %(default)s)")
    return parser.parse_args()


def draw_run(rng: np.random.Generator, recipe: Sequence[Counts]) -> Counts:
    """Take the pixels of each label from one of a recipe's runs."""
    first, classes = recipe[0], np.arange(len(recipe[0].class_names))
    taken = rng.integers(len(recipe), size=len(classes))
    pixels = np.stack([run.pixels for run in recipe])[taken, :, classes]  # (C, N, C)
    return Counts(first.ids, first.class_names, pixels.swapaxes(0, 1))


def on_photos(run: Counts, places: np.ndarray) -> Counts:
    return Counts([run.ids[place] for place in places], run.class_names, run.pixels[places])


def exchanged(rng: np.random.Generator, first: Counts, other: Counts) -> list[Counts]:
    """Let chance decide, photo by photo, which of two runs is which: then neither is better."""
    swap = rng.random((len(first.ids), 1, 1)) < 0.5
    return [Counts(first.ids, first.class_names, np.where(mask, other.pixels, first.pixels)) for mask in (swap, ~swap)]


def reached(run: Counts) -> float:
    return float(mIoU(run.pixels.sum(0)))


def simulate(
    rng: np.random.Generator,
    ours: Sequence[Counts],
    baseline: Sequence[Counts],
    photos: int,
    seeds: int,
    others: int,
    args: argparse.Namespace,
) -> tuple[float, float, float]:
    """Return how often 0 lies outside of the interval, how often the truth does, and the mean width.

    others is the number of further runs of each recipe, from which it is known what seeds change.
    """
    many = [np.mean([reached(draw_run(rng, recipe)) for _ in range(1000)]) for recipe in (ours, baseline)]
    truth = many[0] - many[1]
    without_0 = without_truth = width = 0.0
    for _ in range(args.experiments):
        places = rng.integers(len(ours[0].ids), size=photos)
        drawn = [
            [on_photos(draw_run(rng, recipe), places) for _ in range(seeds + others)] for recipe in (ours, baseline)
        ]
        resampled = iter(resample([*drawn[0], *drawn[1]], resamples=args.resamples, seed=int(rng.integers(2**32))))
        sides = [[next(resampled) for _ in side] for side in drawn]
        spread = between_seeds([side[seeds:] for side in sides])
        found, _ = difference(*(side[:seeds] for side in sides), others=spread, seed=int(rng.integers(2**32)))
        without_0 += not found.low <= 0 <= found.high
        without_truth += not found.low <= truth <= found.high
        width += found.high - found.low
    return without_0 / args.experiments, without_truth / args.experiments, width / args.experiments


def simulate_photos(rng: np.random.Generator, runs: Sequence[Counts], photos: int, args: argparse.Namespace) -> float:
    """Return how often 0 lies outside of the interval for two runs that differ by chance only, photo by photo."""
    missed = 0
    for _ in range(args.experiments):
        places = rng.integers(len(runs[0].ids), size=photos)
        pair = exchanged(rng, *(on_photos(draw_run(rng, runs), places) for _ in range(2)))
        resampled = resample(pair, resamples=args.resamples, seed=int(rng.integers(2**32)))
        found, _ = difference(resampled[:1], resampled[1:])
        missed += not found.low <= 0 <= found.high
    return missed / args.experiments


def main() -> int:
    args, rng = parse_args(), np.random.default_rng(0)
    ours, baseline = ([read_counts(path) for path in paths] for paths in (args.ours, args.baseline))
    if len(ours) < 2 or len(baseline) < 2:
        raise UserError("a recipe needs two runs at least, for what a seed changes")
    for path, run in zip([*args.ours, *args.baseline], [*ours, *baseline], strict=True):
        check_same_photos(ours[0], run, (str(args.ours[0]), str(path)))
    levels = [[reached(run) for run in recipe] for recipe in (ours, baseline)]
    for name, level in zip(("ours", "baseline"), levels, strict=True):
        print(f"{name}: mIoU {np.mean(level):.4f} ± {np.std(level, ddof=1):.4f}, {len(level)} runs")
    rows: list[list] = []
    chance = "one run, the same seed: they differ by chance only"
    kinds = {
        chance: (1, 0),
        "one run, marked *(one seed)*": (1, 0),
        "one run, three others of each in the table": (1, 3),
    }
    kinds |= {f"{seeds} runs": (seeds, 0) for seeds in args.seeds}
    cells = [(kind, photos) for kind in kinds for photos in args.photos]
    for kind, photos in tqdm(cells, disable=None):
        if kind == chance:
            rows.append([kind, photos, simulate_photos(rng, ours, photos, args), None, None, None])
            continue
        same, _, _ = simulate(rng, ours, ours, photos, *kinds[kind], args)
        found, off, width = simulate(rng, ours, baseline, photos, *kinds[kind], args)
        rows.append([kind, photos, same, off, found, width])
    headers = ["a side", "photos", "no difference: 0 outside", "truth outside", "a difference: 0 outside", "width"]
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=("", "", ".0%", ".0%", ".0%", ".3f"), missingval="-"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
