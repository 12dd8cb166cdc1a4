"""Seconds and memory of a training step by encoder and image size, without and with activation_checkpointing.

Every cell is a process of its own: two steps, of which the second is timed, and the process's peak memory less what it
has once all is imported. Where a process runs out of memory the cell says so.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.run import own_memory
from engine.devices import autocast, resolve_precision, to_device
from engine.distributed import pick_device
from engine.training import Training
from model import ENCODERS
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from params import Params


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--encoders", nargs="+", choices=ENCODERS, default=[f"resnet{n}" for n in (18, 34, 50, 101, 152)]
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224, 512])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # encoder, size, whether to checkpoint
    return parser.parse_args()


def measure(encoder: str, size: int, checkpointing: bool, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step, and the MiB that two steps need at most."""
    options = {"stem_maxpool": True, "gcn_padding": "same", "pretrained": False, "loss_weights": {"cross_entropy": 1.0}}
    params = Params(encoder=encoder, image_size=size, activation_checkpointing=checkpointing, **options)
    params = resolve_precision(params, device)
    before = own_memory("VmRSS")
    model = FCN_GCN(**params.network_options(), pretrained=False)
    to_device(model, params, device)
    training, criterion = Training(model, params, 1000), SegmentationLoss(**params.loss_options())
    images = torch.randn(batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(21, (batch_size, size, size), device=device)
    for _ in range(2):
        start = time.perf_counter()
        with autocast(device, params.precision):
            logits = training.forward(images)
        training.step(criterion(logits, labels), ends_group=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 2**20
    return seconds, own_memory("VmHWM") - before


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if args.one:
        encoder, size, checkpointing = args.one
        print(*measure(encoder, int(size), checkpointing == "True", args.batch_size, device))
        return
    rows = []
    for encoder in tqdm(args.encoders, unit="encoder"):
        row = [encoder]
        for size in args.sizes:
            for checkpointing in (False, True):
                command = [sys.executable, __file__, "--one", encoder, str(size), str(checkpointing)]
                command += ["--batch_size", str(args.batch_size), "--device", args.device]
                result = subprocess.run(command, capture_output=True, text=True)
                found = result.stdout.split()
                row.append(f"{float(found[0]):.2f} s, {float(found[1]) / 1024:.2f} GiB" if found else "out of memory")
        rows.append(row)
    headers = ["", *(f"{size}{', checkpointing' * again}" for size in args.sizes for again in (False, True))]
    print(tabulate(rows, headers=headers, tablefmt="pipe"))
    precision = resolve_precision(Params(), device).precision
    threads = torch.get_num_threads()
    print(f"\n{device}, {threads} threads, PyTorch {torch.__version__}, {precision}, batch {args.batch_size}")


if __name__ == "__main__":
    main(parse_args())
