"""Measure how a training step scales from one process to several on this machine, and the bytes that they exchange.

python benchmarks/scaling.py [--processes 2] prints the table: one GPU each where there is CUDA, otherwise one CPU
thread each. It needs no data set. In a network namespace of its own, without any other traffic, it also counts what
passes through the loopback:

unshare --net --map-root-user sh -c "ip link set lo up && python benchmarks/scaling.py --device cpu"
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks.run import compared
from engine import distributed, ranks
from engine.cli import positive, run_main
from engine.devices import autocast, input_options, resolve_precision, seed_everything, to_device
from engine.training import Training
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from model.parallel import shard
from model.transforms import to_input
from params import Params
from utils import RunFailed, write_json

WARM_UP = 2  # steps that do not count: in the first DistributedDataParallel learns in what order gradients come


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, meaning in (
        ("--processes", 2, "how many to compare with one"),
        ("--image_size", 224, "pixels a side"),
        ("--batch_size", 4, "images of a step of one process"),
        ("--steps", 3, "timed steps of each start"),
        ("--repeats", 3, "starts of each side, in turn"),
    ):
        parser.add_argument(flag, type=positive, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # what the processes of one start write to
    args = parser.parse_args()
    if args.batch_size % args.processes:
        parser.error(f"--batch_size {args.batch_size} cannot be divided among {args.processes} processes")
    return args


def make_step(training: Training, batch_size: int) -> Callable:
    """This process's part in a training step, as train.train_epoch takes it, on random images; returns its seconds."""
    device, params = training.device, training.params
    count = len(shard(batch_size, ranks.rank(), ranks.world_size()))
    shape = (params.image_size, params.image_size)
    images = torch.randint(256, (count, 3, *shape), dtype=torch.uint8).to(device)
    labels = torch.randint(params.num_classes, (count, *shape), dtype=torch.uint8).to(device)
    criterion = SegmentationLoss(**params.loss_options(), over_processes=True)

    def step(*, ends_group: bool = True) -> float:
        start = time.perf_counter()
        with training.synchronized(batch_size, ends_group=ends_group), autocast(device, params.precision):
            logits = training.forward(to_input(images, device, **input_options(training.model, params)))
        training.step(criterion(logits, labels), ends_group=ends_group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


class Messages(TorchDispatchMode):
    """Lists the bytes that this process gives to each collective operation, those of backward passes too."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)][-1]  # after any results
            self.bytes.append(given.nbytes)
        return function(*args, **(kwargs or {}))


def traffic(step: Callable, *, ends_group: bool) -> tuple[int, int]:
    """Messages and bytes that this process gives away in a step; those of gradients with the last of a group only."""
    with Messages() as messages:
        step(ends_group=ends_group)
    return len(messages.bytes), sum(messages.bytes)


def sent_to_itself() -> int | None:
    """Bytes that this machine has sent through the loopback; None where it has a network too, so other traffic."""
    interfaces = dict(line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    return int(interfaces.popitem()[1].split()[8]) if [*map(str.strip, interfaces)] == ["lo"] else None


def measure(args: argparse.Namespace) -> None:
    """Write what one start of the processes finds: seconds by batch size, of several processes also their traffic."""
    with distributed.processes(args.device) as device:
        params = resolve_precision(Params(image_size=args.image_size), device)
        seed_everything(params.seed, deterministic=False)
        model = FCN_GCN(**params.network_options(), pretrained=False)
        to_device(model, params, device)
        training = Training(model, params, steps_per_epoch=1000)
        training.model.train()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread each"
        result = {"device": name, "precision": params.precision, "seconds": {}}
        for batch_size in sorted({args.batch_size, args.batch_size * ranks.world_size()}):
            step = make_step(training, batch_size)
            result["seconds"][batch_size] = [step() for _ in range(WARM_UP + args.steps)][WARM_UP:]
        if ranks.world_size() > 1:
            if (before := sent_to_itself()) is not None:
                step()
                result["loopback"] = sent_to_itself() - before
            result["traffic"] = [traffic(step, ends_group=last) for last in (True, False)]
            result["parameters"] = sum(weight.nbytes for weight in model.parameters())
        if ranks.is_main():
            write_json(args.result, result)


def start(processes: int, args: argparse.Namespace, result: Path) -> dict:
    """What that many processes, started by torchrun, measure."""
    flags = [f"--{key}={value}" for key, value in (vars(args) | {"result": result}).items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, *launcher, __file__, *flags], env=environment).returncode:
        raise RunFailed(f"{processes} processes could not be measured, see above")
    return json.loads(result.read_text())


def main(args: argparse.Namespace) -> None:
    if args.result:
        return measure(args)
    count, batch_size = args.processes, args.batch_size
    runs: dict[int, list[dict]] = {1: [], count: []}
    with tempfile.TemporaryDirectory() as folder:
        for processes in tqdm([*runs] * args.repeats, unit="start", leave=False):
            runs[processes].append(start(processes, args, Path(folder, "result.json")))

    def seconds(processes: int, size: int) -> list[float]:
        return [value for run in runs[processes] for value in run["seconds"][str(size)]]

    alone, last = seconds(1, batch_size), runs[count][-1]
    rows = [
        (*compared(f"a step, {batch_size} images in all (strong scaling)", seconds(count, batch_size), alone), count),
        (*compared(f"a step, {batch_size} images each (weak scaling)", seconds(count, count * batch_size), alone), 1),
    ]
    if count > 1:
        (messages, total), (others, rest) = last["traffic"]
        rows += [
            ("each gives to sums of gradients", "-", f"{total - rest:,} bytes in {messages - others} messages"),
            ("their size by count of the parameters", "-", f"{last['parameters']:,} bytes"),
            ("each gives to batch norm and the loss", "-", f"{rest:,} bytes in {others} messages"),
        ]
        if "loopback" in last:
            rows.append(("all send through the loopback", "-", f"{last['loopback']:,} bytes"))
    print(
        f"{last['device']}, PyTorch {torch.__version__}, {args.image_size}x{args.image_size}, {last['precision']}; "
        f"median (fastest-slowest) of {args.steps} steps in each of {args.repeats} starts\n"
    )
    print(tabulate(rows, headers=("", "1 process", f"{count} processes", "ratio", "ideal"), tablefmt="pipe"))


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
