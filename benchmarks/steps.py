"""Seconds and memory of a training step: by encoder, image size, batch, precision and compilation.

Every row is a process of its own: the median of its last steps, and the most memory that it needs, less what it has
once all is imported (on a GPU what PyTorch allocated). Where it fails, or runs out of memory, the row says so.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import build, in_turn, machine, make_parser, own_memory, peak_memory
from engine.devices import pick_device, resolve_precision, reuse_memory
from model.encoders import ENCODERS
from model.losses import SegmentationLoss
from params import Params
from train import train_step
from utils import is_out_of_memory

RECIPE = {
    "pretrained": False,
    "stem_maxpool": True,
    "gcn_padding": "same",
    "zero_init_residual": True,  # or a deep encoder overflows in half precision
    "loss_weights": {"cross_entropy": 1.0},
}
SWITCH = {"off": False, "on": True}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    resnets = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=resnets)
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224, 512], help="(default: %(default)s)")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[2], help="(default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=("auto", "fp32", "bf16", "fp16"), default=["auto"])
    parser.add_argument("--compile", nargs="+", choices=SWITCH, default=["off"])
    parser.add_argument("--checkpointing", nargs="+", choices=SWITCH, default=["off", "on"])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # the keys of a row
    return parser.parse_args()


def measure(options: dict[str, Any], repeats: int, device: torch.device) -> str:
    """Return the median time of a step, and the memory needed at most."""
    params = resolve_precision(Params(**RECIPE | options), device)
    reuse_memory(device)
    before = own_memory("VmRSS")
    training, criterion = build(params, device), SegmentationLoss(**params.loss_options())
    shape = params.batch_size, params.image_size, params.image_size
    images = torch.randint(256, (shape[0], 3, *shape[1:]), dtype=torch.uint8, device=device)
    labels = torch.randint(21, shape, device=device)
    step = partial(train_step, training, criterion, images, labels, batch_size=len(images))
    (seconds,) = in_turn(step, repeats=2 * repeats, device=device)
    return f"{statistics.median(seconds[repeats:]):.3g} s | {peak_memory(device, before) / 1024:.2f} GiB"


def measured_apart(options: dict[str, Any], args: argparse.Namespace) -> str:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(options), "--repeats", str(args.repeats)]
    result = subprocess.run([*command, "--device", args.device], stdout=subprocess.PIPE, text=True)
    return result.stdout.strip() or f"ended with status {result.returncode} |"


def main(args: argparse.Namespace) -> None:
    """Print the table, each row as soon as it is measured."""
    device = pick_device(args.device)
    if args.one:
        try:
            return print(measure(args.one, args.repeats, device))
        except Exception as error:
            return print("out of memory |" if is_out_of_memory(error) else f"{type(error).__name__} |")
    auto = resolve_precision(Params(), device).precision
    print(f"{machine(device)}; auto is {auto}; median of {args.repeats}\n")
    keys = ("encoder", "image_size", "batch_size", "precision", "compile", "activation_checkpointing")
    print(f"| {' | '.join(keys)} | a step | memory |\n|{':--|' * 8}")
    choices = args.encoders, args.sizes, args.batch_sizes, args.precisions, args.compile, args.checkpointing
    for values in itertools.product(*choices):
        options = {key: SWITCH.get(value, value) for key, value in zip(keys, values, strict=True)}
        print("|", *(f"{value} |" for value in values), measured_apart(options, args), "|", flush=True)


if __name__ == "__main__":
    main(parse_args())
