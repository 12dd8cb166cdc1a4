"""What the benchmarks share: times in turn, memory, flags, the machine's name."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from engine.devices import resolve_precision, to_device
from engine.training import Training
from model.net import FCN_GCN
from params import Params


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: %(default)s)")
    return parser


def build(params: Params, device: torch.device) -> Training:
    """Build the network of params with random weights, and its optimizer."""
    model = FCN_GCN(**params.network_options(), pretrained=False)
    to_device(model, params, device)
    return Training(model, params, batches=1000)


def in_turn(*sides: Callable[[], object], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of each side's runs, after one of each that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for repeat in tqdm(range(repeats + 1), unit="run", leave=False):
        for side, function in enumerate(sides):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def own_memory(kind: str) -> float:
    """Return MiB of this process: "VmRSS" as it is, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


def peak_memory(device: torch.device, before: float) -> float:
    """Return MiB at most, on the CPU beyond what the process had before, on a GPU what PyTorch allocated."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else own_memory("VmHWM") - before


def machine(device: torch.device) -> str:
    """Return the device, its cores and threads, and PyTorch's version, for the line above a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        matrix_units = "with" if resolve_precision(Params(), device).precision == "bf16" else "without"
        name = f"{platform.processor() or 'CPU'} {matrix_units} matrix units"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{name}, {cores} cores, {threads} threads, PyTorch {torch.__version__}"
