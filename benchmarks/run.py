"""Measure this program against the original recipe (baseline.py): both sides in turn, ratios of medians.

python benchmarks/run.py [--data_dir data] prints the table, on the device that there is. Without --data_dir, drawn
scenes of the size of VOC's photos stand in for them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torchvision
from PIL import Image
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from benchmarks import baseline, roofline
from engine import distributed
from engine.devices import autocast, input_options, resolve_precision, seed_everything, to_device
from engine.evaluation import evaluate
from engine.training import Training
from model.data_loader import Loader, SegmentationDataset, make_loader
from model.layouts import Split, find_split
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from model.photos import read_example
from model.sample import draw_scene
from model.transforms import BRIGHTNESS, CONTRAST, HUE, SATURATION, SCALES, augment, to_input
from model.voc import CLASS_NAMES, colour_mask
from params import Params
from train import train_epoch

SIZE, BATCH = 224, 5
PHOTO = (500, 375)  # VOC's usual size
EPOCH = {"cpu": (20, 10), "cuda": (320, 160)}  # images to train and to validate on
SMALL, COUNTS = 64, (100, 1_000, 10_000)  # image size and images of the scaling test


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="VOC2012, for real photos")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--peak_memory_of", choices=("baseline", "ours"), help=argparse.SUPPRESS)  # in its own process
    return parser.parse_args()


def cached(split: Split, count: int, device: torch.device | str = "cpu") -> Loader:
    """The first photos of a split, in batches from the cache."""
    parts = (split.ids[:count], split.images[:count], split.masks[:count])
    dataset = SegmentationDataset(Split(f"benchmark{count}", *parts), class_names=CLASS_NAMES, image_size=SIZE)
    return make_loader(dataset, batch_size=BATCH, seed=0, device=device)


class Sides:
    """Both sides' network, on the same photos."""

    def __init__(self, split: Split, device: torch.device):
        self.device, self.split = device, split
        self.params = resolve_precision(Params(pretrained=False, batch_size=BATCH, num_workers=0), device)
        seed_everything(0, deterministic=False)

    def baseline(self) -> tuple[Callable, Callable]:
        """Functions for one training step and for the evaluation of one batch."""
        examples = [baseline.load(*self.split_pair(index), SIZE) for index in range(BATCH)]
        images, targets = (torch.stack(part).to(self.device) for part in zip(*examples, strict=True))
        model = baseline.network().to(self.device)
        optimizer = baseline.optimizer(model)

        def step() -> None:
            model.train()
            baseline.train_step(model, optimizer, images, targets)

        def evaluate_batch() -> None:
            model.eval()
            baseline.evaluate_batch(model, images, targets)

        return step, evaluate_batch

    def ours(self) -> tuple[Callable, Callable]:
        """The same, as train.py does it."""
        training = self.training()
        criterion = SegmentationLoss(**self.params.loss_options())
        loader = cached(self.split, BATCH, self.device)
        images, labels, _ = next(iter(loader))

        def step() -> None:
            training.model.train()
            with autocast(self.device, self.params.precision):
                logits = training.forward(to_input(images, self.device, **input_options(training.model, self.params)))
            training.step(criterion(logits, labels.to(self.device)), ends_group=True)

        return step, lambda: evaluate(training.model, loader, self.params, self.device)

    @property
    def epoch_sizes(self) -> list[int]:
        """Return images to train and to validate on, fewer if there are not as many."""
        return [min(count, len(self.split.ids)) for count in EPOCH[self.device.type]]

    def training(self) -> Training:
        model = FCN_GCN(**self.params.network_options(), pretrained=False)
        to_device(model, self.params, self.device)
        return Training(model, self.params, steps_per_epoch=1000)

    def epochs(self) -> tuple[Callable, Callable]:
        """A whole epoch with validation, as this program (its data cached) and as the original recipe do it."""
        counts = self.epoch_sizes
        training = self.training()
        loaders = [cached(self.split, count, self.device) for count in counts]

        def ours() -> None:
            train_epoch(training, loaders[0])
            evaluate(training.eval_model, loaders[1], self.params, self.device)

        model = baseline.network().to(self.device)
        optimizer = baseline.optimizer(model)
        pairs = list(zip(self.split.images, self.split.masks, strict=True))
        workers = 0 if self.device.type == "cpu" else 4  # which would compete with the training for the same cores
        their_loaders = [baseline.loader(pairs[:count], SIZE, BATCH, workers) for count in counts]
        return ours, lambda: baseline.epoch(model, optimizer, *their_loaders, self.device)

    def split_pair(self, index: int) -> tuple[Path, Path]:
        return self.split.images[index], self.split.masks[index]


def in_turn(*sides: Callable, repeats: int, bar: tqdm, device: torch.device) -> list[list[float]]:
    """Seconds of each side's runs, after one of each that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats + 1):
        for side, function in enumerate(sides):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[side].append(time.perf_counter() - start)
        bar.update()
    return seconds


def compared(what: str, ours: list[float], theirs: list[float], scale: float = 1000, unit: str = "ms") -> tuple:
    """A row of the table: medians with the spread from fastest to slowest, and the ratio of the medians."""

    def text(seconds: list[float]) -> str:
        low, middle, high = (scale * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
        return f"{middle:.4g} ({low:.4g}-{high:.4g}) {unit}"

    return what, text(theirs), text(ours), f"{statistics.median(theirs) / statistics.median(ours):.2f}"


def peak_memory(side: str, args: argparse.Namespace) -> tuple[float, float]:
    """MiB at most, of a process that does two training steps: in all, and beyond what it has when all is imported.

    On a GPU both are what PyTorch allocated.
    """
    command = [sys.executable, __file__, "--peak_memory_of", side, "--device", args.device, "--data_dir", args.data_dir]
    total, own = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.split()
    return float(total), float(own)


def print_peak_memory(sides: Sides, side: str) -> None:
    imported = own_memory("VmRSS")
    step, _ = getattr(sides, side)()
    for _ in range(2):
        step()
    if sides.device.type == "cuda":
        print(*2 * [torch.cuda.max_memory_allocated() / 2**20])
    else:
        peak = own_memory("VmHWM")  # not getrusage's, which counts the process that started this one too
        print(peak, peak - imported)


def input_pipeline(split: Split, repeats: int, bar: tqdm) -> list[tuple]:
    """From files to a batch of tensors, on one core: the first time, and from the cache; and the augmentation.

    The original recipe has none: the other side of that row are torchvision's transforms, photo by photo.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = 20
    pairs = list(zip(split.images, split.masks, strict=True))[:count]
    loader = cached(split, count)

    def theirs() -> None:
        for start in range(0, count, BATCH):
            images, targets = zip(*(baseline.load(*pair, SIZE) for pair in pairs[start : start + BATCH]), strict=True)
            torch.stack(images), torch.stack(targets)

    def first_pass() -> None:
        for start in range(0, count, BATCH):
            batch = [read_example(*pair, image_size=SIZE, num_classes=21) for pair in pairs[start : start + BATCH]]
            torch.from_numpy(np.stack(batch))

    def from_cache() -> None:
        for _ in loader:
            pass

    one_by_one = v2.Compose(
        [
            v2.ScaleJitter((SIZE, SIZE), scale_range=SCALES),
            v2.RandomCrop((SIZE, SIZE), pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=BRIGHTNESS, contrast=CONTRAST, saturation=SATURATION, hue=HUE),
        ]
    )

    def augmented() -> None:
        for batch in batches:
            augment(*batch)

    def augmented_one_by_one() -> None:
        for images, labels, _ in batches:
            for image, mask in zip(images, labels, strict=True):
                one_by_one(tv_tensors.Image(image), tv_tensors.Mask(mask))

    batches = list(loader)
    how: dict[str, Any] = {"repeats": repeats, "bar": bar, "device": torch.device("cpu")}
    changed = in_turn(augmented, augmented_one_by_one, **how)
    first = compared("input, first pass, an image", *in_turn(first_pass, theirs, **how), 1000 / count)
    again = compared("input, cached, an image", *in_turn(from_cache, theirs, **how), 1000 / count)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    return [first, again, compared("augmentation, an image", *changed, 1000 / count)]


def scaling(folder: Path, bar: tqdm) -> list[tuple]:
    """Images a second from the cache, and memory that is not the mapped cache, for ever larger data sets."""
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    image, mask = draw_scene(np.random.default_rng(0))
    image.save(folder / "image.jpg")
    colour_mask(np.array(mask)).save(folder / "mask.png")
    for index in range(max(COUNTS)):
        os.link(folder / "image.jpg", folder / "JPEGImages" / f"{index}.jpg")
        os.link(folder / "mask.png", folder / "SegmentationClass" / f"{index}.png")
    rows = []
    for count in COUNTS:
        (folder / "train.txt").write_text("".join(f"{index}\n" for index in range(count)))
        dataset = SegmentationDataset(find_split("voc", folder, "train"), class_names=CLASS_NAMES, image_size=SMALL)
        loader = make_loader(dataset, batch_size=20, num_workers=0, seed=0)
        rates = []
        for epoch in range(1 + 10_000 // count):
            loader.batch_sampler.set_epoch(epoch)
            start = time.perf_counter()
            for _ in loader:
                pass
            rates.append(count / (time.perf_counter() - start))
        rows.append((count, f"{statistics.median(rates[1:]):.0f}", f"{own_memory('RssAnon'):.0f}"))
        bar.update()
    return rows


def own_memory(kind: str) -> float:
    """MiB of this process: "VmRSS" as it is, "VmHWM" at its peak, "RssAnon" what no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


# Runs a script, and says when its training takes the first batch.
FIRST_STEP = """
import os, runpy, sys
import model.transforms
model.transforms.to_input = lambda *_, **options: (print("first step", flush=True), os._exit(0))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seconds_to_first_step(folder: Path, data_dir: Path, device: torch.device, bar: tqdm) -> float:
    """Of train.py on a data set that is cached, until it has the first batch."""
    folder.mkdir()
    params = {"pretrained": False, "image_size": SIZE, "num_workers": 0, "num_epochs": 1}
    (folder / "params.json").write_text(json.dumps(params))
    flags = ["--model_dir", folder, "--data_dir", data_dir.resolve(), "--device", device.type, "--overwrite"]
    command = [sys.executable, "-c", FIRST_STEP, ROOT / "train.py", *flags]
    for _ in range(2):  # the first one makes the cache
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            said = any(line == "first step\n" for line in process.stdout)
            seconds = time.perf_counter() - start
        if not said:
            raise RuntimeError(f"train.py --data_dir {data_dir} took no step")
        bar.update()
    return seconds


def ceilings(device: torch.device, precision: str) -> tuple[float, float]:
    """What this device reaches at best: FLOP/s of a square matrix product in that precision, bytes/s of a copy."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    vector = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)  # pages never written cost nothing
    target = torch.zeros_like(vector)
    none = torch.device("cpu")
    products, copies = in_turn(
        lambda: (matrix @ matrix, device.type == "cuda" and torch.cuda.synchronize()),
        lambda: (target.copy_(vector), device.type == "cuda" and torch.cuda.synchronize()),
        repeats=5,
        bar=tqdm(disable=True),
        device=none,
    )
    return 2 * n**3 / min(products), 2 * vector.nbytes / min(copies)


def idle_share(step: Callable, seconds: float) -> float:
    """Return the share of a step, of so many seconds, in which a GPU has no kernel to run."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy, end = 0.0, 0.0  # microseconds
    for kernel in sorted(kernels, key=lambda kernel: kernel.time_range.start):
        busy += max(0.0, kernel.time_range.end - max(end, kernel.time_range.start))
        end = max(end, kernel.time_range.end)
    return 1 - busy / 1e6 / seconds


def make_scenes(folder: Path, count: int) -> Path:
    """Drawn scenes of the size of VOC's photos."""
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        image, mask = draw_scene(np.random.default_rng(index))
        image.resize(PHOTO).save(folder / "JPEGImages" / f"{index}.jpg", quality=90)
        mask = np.array(mask.resize(PHOTO, Image.Resampling.NEAREST))
        colour_mask(mask).save(folder / "SegmentationClass" / f"{index}.png")
    for name in ("train", "val"):
        (folder / f"{name}.txt").write_text("".join(f"{index}\n" for index in range(count)))
    return folder


def machine(device: torch.device) -> str:
    """Return the device, its cores and threads, for the line above a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        matrix_units = "with" if resolve_precision(Params(), device).precision == "bf16" else "without"
        name = f"{platform.processor() or 'CPU'} {matrix_units} matrix units"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def main(args: argparse.Namespace) -> None:
    device = distributed.pick_device(args.device)
    if args.peak_memory_of:
        return print_peak_memory(Sides(find_split("voc", args.data_dir, "val"), device), args.peak_memory_of)
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=5 * args.repeats + min(3, args.repeats) + 12, unit="run") as bar,
    ):
        temporary = Path(temporary)
        args.data_dir = args.data_dir or make_scenes(temporary / "scenes", 2 * max(EPOCH[device.type]))
        sides = Sides(find_split("voc", args.data_dir, "val"), device)
        (our_step, our_evaluation), (step, evaluation) = sides.ours(), sides.baseline()
        steps = in_turn(our_step, step, repeats=args.repeats, bar=bar, device=device)
        evaluations = in_turn(our_evaluation, evaluation, repeats=args.repeats, bar=bar, device=device)
        rows = [
            compared(f"training step, batch {BATCH}", *steps),
            compared(f"evaluation, batch {BATCH}", *evaluations),
        ]
        epochs = in_turn(*sides.epochs(), repeats=min(3, args.repeats), bar=bar, device=device)
        rows.append(compared(f"an epoch, {' + '.join(map(str, sides.epoch_sizes))} images", *epochs, 1, "s"))
        rows += input_pipeline(sides.split, args.repeats, bar)
        peaks = [peak_memory(side, args) for side in ("baseline", "ours")]
        bar.update(2)
        for what, theirs, ours in zip(("peak memory, two steps", "the same, without libraries"), *peaks, strict=True):
            rows.append((what, f"{theirs:.0f} MiB", f"{ours:.0f} MiB", f"{theirs / ours:.2f}"))
        scaled = scaling(temporary / "scaling", bar)
        first_step = seconds_to_first_step(temporary / "run", args.data_dir, device, bar)
        peak, bandwidth = ceilings(device, sides.params.precision)
        least = roofline.bound(our_step, peak, bandwidth)
        idle = idle_share(our_step, statistics.median(steps[0])) if device.type == "cuda" else None
    print(
        f"{machine(device)}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}; "
        f"{SIZE}x{SIZE}, batch {BATCH}, "
        f"{sides.params.precision} against fp32; median (fastest-slowest) of {args.repeats}\n"
    )
    print(tabulate(rows, headers=("", "original recipe", "this program", "ratio"), tablefmt="pipe"))
    print()
    print(tabulate(scaled, headers=("images", "images/s, cached", "MiB besides the cache"), tablefmt="pipe"))
    print(f"\ntrain.py has its first batch after {first_step:.1f} s, with the data cached")
    seconds = statistics.median(steps[0])
    print(
        f"a matrix product in {sides.params.precision} reaches {peak / 1e9:.0f} GFLOP/s, a copy "
        f"{bandwidth / 1e9:.1f} GB/s; a step is {least.flops / 1e9:.0f} GFLOP and moves {least.bytes / 1e9:.1f} GB, "
        f"operation by operation {1000 * least.seconds:.0f} ms at that speed: {least.seconds / seconds:.0%} is reached"
    )
    parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in [*least.by_operation.items()][:8])
    print(f"of those ms: {parts}")
    if idle is not None:
        print(f"the GPU is idle for {idle:.0%} of a step")


if __name__ == "__main__":
    main(parse_args())
