"""Data sets, decoded once into a memory-mapped cache, and their loaders."""

import glob
import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from model import UserError, attempt, cores, locked, replacing
from model.layouts import Split, list_faults
from model.parallel import shard
from model.transforms import PADDING, Colour, resize_tag, to_square
from model.voc import VOID

ALIKE, ALIKE_TURNED = 0.93, 0.97  # see seen_in_training()
COMPARED = 2e7  # pairs of photos at most; of VOC2012 with SBD there are 1.5e7
AT_ONCE = 256  # examples in memory while a split is decoded
CACHE_VERSION = 2  # part of every cache's name: raise it when files are decoded otherwise; resizing has its own tag


class SegmentationDataset(Dataset):
    """One split as squares of image_size: photo and mask, and the seed of the example where an order comes with seeds.

    dataset[index] is uint8 (3, S, S) and uint8 (S, S), dataset[index, seed] the same and the seed, for
    transforms.augment. All files are decoded and checked when the data set is made: into a memory-mapped file that
    all processes share, see build_cache(), or, with cache False, to be decoded again at each access.
    class_names has a name for each class index; a higher index in a mask, but for void, is an error.
    Raises UserError listing every faulty file of the split.
    """

    def __init__(
        self,
        split: Split,
        *,
        class_names: Sequence[str],
        image_size: int,
        resize: str = "squash",
        padding: Colour = PADDING,
        cache: bool = True,
    ):
        self.split = split
        self.class_names = class_names
        self.image_size = image_size
        self.resize = resize
        self.padding = padding
        self.cache_file = build_cache(self) if cache else None
        # Now: a run with other files may replace the cache, and without one every faulty file is to be found.
        _ = self._examples if cache else self.thumbnails

    @cached_property
    def _examples(self) -> np.ndarray | None:
        return None if self.cache_file is None else np.load(self.cache_file, mmap_mode="r")

    @cached_property
    def thumbnails(self) -> np.ndarray:
        """float32 (N, 192): the mean colours of every photo in 8 x 8 cells, from about 64 x 64 of its pixels."""
        step = max(1, self.image_size // 64)
        side = -(-self.image_size // step) // 8  # of a cell
        squares = self.decode_all() if self._examples is None else self._examples
        cells = (x[::step, ::step][: 8 * side, : 8 * side, :3].reshape(8, side, 8, side, 3) for x in squares)
        return np.stack([x.mean((1, 3), dtype=np.float32).ravel() for x in cells])

    def __len__(self) -> int:
        return len(self.split.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        index, *seed = key if isinstance(key, tuple) else (key,)
        example = torch.from_numpy(self.decode(index) if self._examples is None else np.array(self._examples[index]))
        return example[..., :3].permute(2, 0, 1), example[..., 3], *seed

    def __getstate__(self) -> dict:
        # A worker that is sent the data set maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_examples", "thumbnails")}

    def collate(self, examples: list[tuple]) -> Sequence[Tensor]:
        """Make a batch of examples, also of none, as a process's share of a small batch may be."""
        if examples:
            return default_collate(examples)
        images = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return images, images[:, 0], torch.empty(0, dtype=torch.int64)

    def decode(self, index: int) -> np.ndarray:
        """Return uint8 (S, S, 4) from the files: red, green, blue, class index (void without a mask)."""
        photo, mask = self.split.read(index, len(self.class_names))
        photo, mask = to_square(photo, mask, self.image_size, self.resize, self.padding)
        labels = np.full((self.image_size, self.image_size), VOID, np.uint8) if mask is None else np.array(mask)
        return np.dstack([np.array(photo), labels])

    def decode_all(self) -> Iterator[np.ndarray]:
        """Yield every example in order, decoded on all cores. Raises UserError at the end, naming every faulty file."""
        faults, decode = [], partial(attempt, self.decode)
        bar = tqdm(total=len(self), desc=f"reading {self.split.name}", unit="img", leave=False, disable=None)
        # Not concurrent.futures, which at its end would wait for a thread whose file never answers.
        with bar, ThreadPool(cores()) as pool:
            for start in range(0, len(self), AT_ONCE):  # imap() would read ahead without bound
                for result in pool.imap(decode, range(start, min(start + AT_ONCE, len(self)))):
                    bar.update()
                    if isinstance(result, UserError):
                        faults.append(str(result))
                    else:
                        yield result
        if faults:
            raise list_faults(f"split {self.split.name}", faults)


def seen_in_training(train: SegmentationDataset, other: SegmentationDataset) -> list[str]:
    """Return a line where photos of a split are those that are trained on, or nearly, as frames of a video are.

    They are if the concordance of their thumbnails (Lin, 1989, but for the term of the means) is above ALIKE. On
    VOC2012's photos: none of 314 in val; of photos that are moved by 1, 2, 3, 4 %, a part of them elsewhere, 89, 85,
    60, 37 %. Copies that are mirrored or turned, as by an augmentation before the split, are alike above ALIKE_TURNED:
    none of VOC2012's.
    """
    if len(train) * len(other) > COMPARED:
        return []
    a, b = other.thumbnails, train.thumbnails
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)
    spread = a.shape[1] * (a.var(1)[:, None] + b.var(1))
    alike = np.argwhere(squares - 2 * a @ b.T <= (1 - ALIKE) * spread)
    for cells in (b.reshape(-1, 8, 8, 3), b.reshape(-1, 8, 8, 3)[:, :, ::-1]):
        for turned in (np.rot90(cells, quarter, (1, 2)).reshape(b.shape) for quarter in range(4)):
            alike = np.concatenate([alike, np.argwhere(squares - 2 * a @ turned.T <= (1 - ALIKE_TURNED) * spread)])
    name, pairs = other.split.name, [(other.split.ids[index], train.split.ids[like]) for index, like in alike]
    return [
        f"{len({*alike[:, 0]})} of {len(other)} photos of {name} are, or nearly are, one of {train.split.name}: "
        f"{example} and {trained}, for example; scores of {name} say little: see data/README.md"
        for example, trained in pairs[:1]
    ]


def check_classes(dataset: SegmentationDataset) -> None:
    """Raise UserError where the masks hold no more than one class, of which all would be predicted, and rightly."""
    found: set[int] = set()
    for _, labels, *_ in (dataset[index] for index in range(len(dataset))):  # mostly the first one has two
        found |= {*labels.unique().tolist()} - {VOID}
        if len(found) > 1:
            return
    raise UserError(
        f"the masks of {dataset.split.name} hold no class beside void (255), or only one; "
        "where an object is painted in 255, write its class index instead"
    )


def too_dark(dataset: SegmentationDataset) -> list[str]:
    """Return a line where none of some thirty photos has a value in the upper three quarters of the range."""
    some = [dataset[index] for index in range(0, len(dataset), 1 + len(dataset) // 32)]
    padding = torch.tensor(dataset.padding).view(3, 1, 1)  # whose mask is void, as that of pixels nobody has labelled
    seen = (photo * ((labels != VOID) | (photo != padding).any(0)) for photo, labels in some)
    brightest = max(int(photo.max()) for photo in seen)
    advice = "where 10 to 14 bits lie in files of 16, or values from 0 to 1, scale them to the whole range"
    return [
        f"none of {len(some)} photos looked at in {dataset.split.name} is brighter than {brightest} of 255; {advice}"
    ] * (brightest < 64)


def build_cache(dataset: SegmentationDataset) -> Path:
    """Return the cache file of a data set, uint8 (N, S, S, 4), built now unless it is there.

    Its name changes with the files, the size, the way of resizing and the number of classes; those that it replaces are
    deleted. One process builds, others wait for it.
    """
    split, size = dataset.split, dataset.image_size
    root = split.root or split.images[0].parent.parent
    folder = cache_folder(root)
    shape = f"{size}px" if dataset.resize == "squash" else f"{size}px-{dataset.resize}"
    prefix = f"{split.name}-{shape}-{len(dataset.class_names)}classes"
    file = folder / f"{prefix}-{_digest(dataset, root)}.npy"
    with locked(folder / f"{prefix}.lock"):
        if not file.exists() or file.stat().st_size < len(dataset) * size**2 * 4:  # as after half a copy
            # Not a writable map: a full disk would end that with SIGBUS.
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(dataset), size, size, 4)}
                np.lib.format.write_array_header_2_0(stream, header)
                stream.writelines(example.data for example in dataset.decode_all())
            name = glob.escape(prefix)
            for stale in {*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*")} - {file}:
                with suppress(OSError):  # another run has it open, on Windows
                    stale.unlink()
    return file


def _digest(dataset: SegmentationDataset, root: Path) -> str:
    """Return what the name of a cache says of its content."""
    split = dataset.split
    tag = resize_tag(dataset.image_size, dataset.resize, dataset.padding)
    label_map = sorted((split.label_map or {}).items(), key=str)
    parts: list[object] = [(CACHE_VERSION, tag, len(dataset.class_names), label_map)]
    for path in [*split.images, *(split.masks or [])]:
        status = path.stat()
        parts.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    return hashlib.sha256("".join(map(repr, parts)).encode()).hexdigest()[:16]


def cache_folder(root: Path) -> Path:
    """Return <root>/.cache or, for data that are read-only, a folder in the user's cache.

    A folder without a write bit is meant to stay as it is, also by root, who could write there.
    """
    folder = root / ".cache"
    if root.stat().st_mode & 0o222:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "global_convolutional_network" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Batches(Sampler):
    """The batches of an epoch that one of several processes takes part in, as lists of what a data set is asked for.

    With a seed, for training, each epoch has its own order, which depends on nothing but seed and epoch, and each
    example comes as (index, seed of its own); a process has its share of every batch, in the last one perhaps nothing.
    Without, for scoring, they are indices in the order of the list, and batches are dealt out whole, so that each holds
    the same images whatever the number of processes. sizes has the images of each of these batches, with a seed those
    of all shares together.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0
        self.rank, self.world_size = rank, world_size
        sizes = [min(batch_size, length - start) for start in range(0, length, batch_size)]
        self.sizes = sizes[rank::world_size] if seed is None else sizes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list]:
        order = range(self.length) if self.seed is None else self._shuffled(self.seed)
        batches = (list(order[start : start + self.batch_size]) for start in range(0, self.length, self.batch_size))
        if self.seed is None:
            return islice(batches, self.rank, None, self.world_size)
        shares = ((batch, shard(len(batch), self.rank, self.world_size)) for batch in batches)
        return (batch[own.start : own.stop] for batch, own in shares)

    def _shuffled(self, seed: int) -> list[tuple[int, int]]:
        epoch_seed = np.random.SeedSequence((seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(epoch_seed))
        order = torch.randperm(self.length, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.length,), generator=generator).tolist()
        return list(zip(order, seeds, strict=True))


class Loader(DataLoader):
    """Batches that loader processes, or this one, fetch from a data set."""

    dataset: Any
    batch_sampler: Batches


def make_loader(
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    collate: Callable[[list], Any] | None = None,
) -> Loader:
    """Return batches of uint8 (B, 3, S, S) and (B, S, S), the last one smaller where the data set ends.

    With a seed every epoch has its own order (call loader.batch_sampler.set_epoch), and a batch also int64 (B), a seed
    for each example; without, they come in the order of the list. One of several processes gets its part of them, see
    Batches. For a GPU they lie in pinned memory.

    collate makes a batch of a list of examples, by default as the data set does.
    """
    batches = Batches(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size)
    workers = min(num_workers, cores(), len(batches))
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=begin_loader_process,
        collate_fn=collate or dataset.collate,
        persistent_workers=workers > 0,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # its own, so that fetching data does not advance the network's random numbers
    )


def begin_loader_process(worker: int) -> None:
    """Leave signals to the main process, and let it know where a batch cannot be sent."""
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]  # which prints it only
    # Ctrl-C and batch systems signal all processes; a worker that dies before the main process has understood would
    # look like a crash. So it dies a little later, for at the end the main process itself ends workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # Windows has neither this nor a SIGTERM that can be caught
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))  # a death by signal is raised in the main one
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(2))


def _send_error(queue: Queue, error: Exception, batch: Any) -> None:
    """Send the main process the error that is handled now, in the place of (number, batch), for it to raise."""
    if not isinstance(batch, tuple):
        os._exit(1)  # bytes that nobody takes
    number, result = batch
    if isinstance(result, ExceptionWrapper):
        result.exc_type = RuntimeError  # an error of whose own kind none can be sent
    else:
        result = ExceptionWrapper(where="in a loader process that sends a batch")
    queue.put((number, result))
