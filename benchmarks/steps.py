"""Seconds and memory of a training step: by encoder, image size, batch, precision and compilation.

Every cell is a process of its own, which takes its first steps untimed: the median of the others, and the process's
peak memory less what it has once all is imported (on a GPU what PyTorch allocated). Where a process runs out of memory,
or fails, the cell says so.
"""

import argparse
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.run import own_memory
from engine.devices import autocast, resolve_precision, reuse_memory, to_device
from engine.distributed import pick_device
from engine.training import Training
from model.encoders import ENCODERS
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from params import Params

RECIPE = {
    "pretrained": False,
    "stem_maxpool": True,
    "gcn_padding": "same",
    "zero_init_residual": True,  # or a deep encoder overflows in half precision
    "loss_weights": {"cross_entropy": 1.0},
}


FULL = re.compile(
    r"out of memory|OutOfMemory|MemoryError|an't allocate memory|Cannot allocate memory|ALLOC_FAILED|bad_alloc"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    resnets = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=resnets)
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224, 512], help="(default: %(default)s)")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[2], help="(default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=("auto", "fp32", "bf16", "fp16"), default=["auto"])
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--steps", type=int, default=1, help="timed steps, after as many others (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # the keys of a cell
    return parser.parse_args()


def measure(options: dict[str, Any], steps: int, device: torch.device) -> tuple[float, float]:
    """Return the median of the seconds of a step, and the MiB needed at most."""
    params = resolve_precision(Params(**RECIPE | options), device)
    reuse_memory(device)
    before = own_memory("VmRSS")
    model = FCN_GCN(**params.network_options(), pretrained=False)
    to_device(model, params, device)
    training, criterion = Training(model, params, 1000), SegmentationLoss(**params.loss_options())
    shape = params.batch_size, params.image_size, params.image_size
    images = torch.randn(shape[0], 3, *shape[1:], device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(21, shape, device=device)
    seconds = []
    for _ in range(2 * steps):
        start = time.perf_counter()
        with autocast(device, params.precision):
            logits = training.forward(images)
        training.step(criterion(logits, labels), ends_group=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else own_memory("VmHWM") - before
    return statistics.median(seconds[steps:]), peak


def cell(options: dict[str, Any], args: argparse.Namespace) -> str:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(options), "--steps", str(args.steps)]
    result = subprocess.run([*command, "--device", args.device], capture_output=True, text=True)
    if result.returncode:
        print(*result.stderr.splitlines()[-1:], file=sys.stderr)
        return "out of memory" if result.returncode == -signal.SIGKILL or FULL.search(result.stderr) else "failed"
    seconds, memory = map(float, result.stdout.split())
    return f"{seconds:.3g} s, {memory / 1024:.2f} GiB"


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends two
    raise KeyboardInterrupt


def main(args: argparse.Namespace) -> int:
    """Print the table, of the rows that there was time for. Returns the exit status."""
    device = pick_device(args.device)
    if args.one:
        print(*measure(args.one, args.steps, device))
        return 0
    rows, status = [], 0
    choices = args.encoders, args.sizes, args.batch_sizes, args.precisions, args.compile
    signal.signal(signal.SIGTERM, stop)  # sent where the time is limited
    try:
        for encoder, size, batch, precision, compiled in tqdm([*itertools.product(*choices)], unit="row"):
            options = {"encoder": encoder, "image_size": size, "batch_size": batch, "precision": precision}
            cells = [
                cell(options | {"compile": compiled == "on", "activation_checkpointing": again == "on"}, args)
                for again in args.checkpointing
            ]
            rows.append([*options.values(), compiled, *cells])
    except KeyboardInterrupt:
        status = 1
    titles = {"off": "a step", "on": "with activation_checkpointing"}
    headers = ["encoder", "size", "batch", "precision", "compile", *(titles[again] for again in args.checkpointing)]
    print(tabulate(rows, headers=headers, tablefmt="pipe"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    auto = resolve_precision(Params(), device).precision
    print(f"\n{name}, PyTorch {torch.__version__}, auto is {auto}, median of {args.steps}")
    return status


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
