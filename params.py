"""Every hyperparameter of an experiment: name, default, what is allowed, and what it means.

`python params.py` prints the table of docs/PARAMS.md.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model import UserError
from model.encoders import ENCODERS, TIMM
from model.layouts import LAYOUTS
from model.losses import TERMS, Focal, constants
from model.metrics import CHOOSING
from model.net import FCN_GCN, GCN_PADDINGS, HEADS
from model.transforms import RESIZES
from optimization import OPTIMIZERS, PRECISIONS, SCHEDULES
from utils import is_number, read_json


def _key(default: Any, allowed: str, check: Callable[[Any], bool], meaning: str) -> Any:
    """Declare a key of params.json. Where the default is null, null is allowed too."""
    metadata = {"allowed": allowed, "check": check, "meaning": meaning}
    if default is None:
        metadata |= {"allowed": f"{allowed} or null", "check": lambda v: v is None or check(v)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda v: v > 0,
    "of at least 0": lambda v: v >= 0,
    "from 0 to below 1": lambda v: 0 <= v < 1,
    "from 0 to 1": lambda v: 0 <= v <= 1,
    "from 0 to 100": lambda v: 0 <= v <= 100,
}


def _number(default: float | None, range_: str, meaning: str) -> Any:
    return _key(default, f"a number {range_}", lambda v: is_number(v) and RANGES[range_](v), meaning)


def _integer(default: int | None, minimum: int, meaning: str, *, maximum: int = 2**31 - 1) -> Any:
    most = f" and at most {maximum}" if maximum != 2**31 - 1 else ""
    allowed = f"an integer of at least {minimum}{most}"
    return _key(default, allowed, lambda v: type(v) is int and minimum <= v <= maximum, meaning)


def _one_of(default: str, registry: Iterable[str], meaning: str) -> Any:
    options = list(registry)
    return _key(default, ", ".join(map(json.dumps, options)), lambda v: isinstance(v, str) and v in options, meaning)


def _flag(default: bool, meaning: str) -> Any:
    return _key(default, "true, false", lambda v: isinstance(v, bool), meaning)


def _typed(kind: Any, value: Any) -> Any:
    """Return a value as its key's type has it: JSON writes 1 and 1.0, which are one experiment."""
    if isinstance(value, dict):
        return {name: float(weight) for name, weight in value.items()}
    return float(value) if type(value) is int and kind in (float, float | None) else value


def _meant(key: str, known: Iterable[str]) -> list[str]:
    """Return the known keys that may be meant: lr is learning_rate, epochs one of several, others are misspelt."""
    words = {name: name.split("_") for name in known}
    shortened = [name for name in known if key == "".join(word[0] for word in words[name])]
    parts = [name for name in known if {*key.split("_")} <= {*words[name]}]
    return shortened or parts or difflib.get_close_matches(key, known, n=1, cutoff=0.5)


def _are_loss_weights(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(TERMS):
        return False
    return all(is_number(w) and w >= 0 for w in value.values()) and any(value.values())


@dataclass(frozen=True)
class Params:
    """The hyperparameters of one experiment."""

    learning_rate: float = _number(0.001, "above 0", "before schedule and warm-up")
    batch_size: int = _integer(5, 1, "images per step, over all processes")
    num_epochs: int = _integer(35, 1, "passes over the training images")
    dropout_rate: float = _number(0.0, "from 0 to below 1", "Dropout2d before each head")
    save_summary_steps: int = _integer(100, 1, "batches between two checks for NaN")
    num_workers: int = _integer(4, 0, "loader processes, at most one per core")
    num_channels: int | None = _integer(None, 1, "unused; old files have it")

    dataset: str = _one_of("voc", LAYOUTS, "layout of `--data_dir`; `sample`: built-in scenes, drawn on first use")
    image_size: int = _integer(224, 32, "side of the network's square input, in pixels", maximum=16384)
    resize: str = _one_of("squash", RESIZES, "`squash` changes the aspect ratio; `letterbox` pads with the mean colour")
    num_classes: int = _integer(21, 2, "background included", maximum=255)
    augment: bool = _flag(False, "random scale of 0.5-2x and crop, flip, colour jitter")
    cutmix: float = _number(0.0, "from 0 to 1", "probability that a box of photo and mask comes from another photo")
    normalize: bool = _flag(True, "by the mean and deviation of the encoder's weights; false: values in [0, 1]")
    cache: bool = _flag(True, "decode each split once, into `<data>/.cache` or the user's cache folder")
    train_split: str = _key(
        "train",
        "the name of a list",
        lambda v: isinstance(v, str) and v == Path(v).name != "",
        "to train on, as `trainaug`; validation is on val",
    )

    loss_weights: dict[str, float] = _key(
        {"bce": 0.4, "dice": 0.4, "inverse_dice": 0.2},
        f"weights of at least 0, not all of them 0, for {', '.join(TERMS)}",
        _are_loss_weights,
        "replaces the default as a whole. `balanced_cross_entropy`: pixels of a class of n in the batch weigh 1/√n. "
        "Validation: photo by photo",
    )
    focal_gamma: float = _number(Focal.gamma, "from 0 to 100", "the larger, the less well-classified pixels count")
    optimizer: str = _one_of("sgd", OPTIMIZERS, "SGD with momentum, or AdamW")
    momentum: float = _number(0.99, "from 0 to below 1", "SGD's")
    weight_decay: float = _number(0.0005, "of at least 0", "of the weights")
    decay_norms_and_biases: bool = _flag(True, "false: no `weight_decay` for norms, biases, scales of layers")
    encoder_learning_rate_factor: float = _number(1.0, "of at least 0", "times the learning rate, for the encoder")
    schedule: str = _one_of("constant", SCHEDULES, "`poly` (power 0.9) and `cosine` fall towards 0 with every step")
    warmup_epochs: int = _integer(0, 0, "linear rise of the learning rate; fewer than `num_epochs`")
    clip_grad_norm: float | None = _number(None, "above 0", "largest norm of the gradient")
    ema_decay: float | None = _number(None, "from 0 to below 1", "evaluate a mean of the weights; 0.999: 1,000 steps")
    accumulation_steps: int = _integer(1, 1, "batches per step of the optimizer")
    best_metric: str = _one_of("mIoU", CHOOSING, "chooses `best.pth.tar`, the early stop and the order of results")
    early_stopping_patience: int | None = _integer(None, 1, "epochs without a better `best_metric`")
    keep_last: bool = _flag(True, "false: a finished run deletes `last.pth.tar` and cannot train on")

    precision: str = _one_of("auto", ["auto", *PRECISIONS], "auto: bf16 from Ampere on and on CPUs with AMX, else fp32")
    channels_last: bool = _flag(True, "memory format of the convolutions")
    compile: bool = _flag(False, "torch.compile, on a GPU with CUDA graphs")
    seed: int = _integer(230, 0, "of weights, order, augmentation, dropout", maximum=2**63 - 1)
    deterministic: bool = _flag(False, "only deterministic algorithms: two runs on one machine agree bit for bit")

    encoder: str = _key(
        "resnet50",
        f'{", ".join(map(json.dumps, ENCODERS))}, "{TIMM}NAME"',
        lambda v: isinstance(v, str) and (v in ENCODERS or v.startswith(TIMM)),
        "a ResNet of torchvision, or a model of timm with maps of strides 4 to 32",
    )
    kernel_size: int = _key(
        7, "an odd integer from 3 to 255", lambda v: type(v) is int and v in range(3, 256, 2), "k of the heads"
    )
    head: str = _one_of("gcn", HEADS, "or the paper's comparisons: 1 x 1, k x k, a stack of 3 x 3")
    boundary_refinement: bool = _flag(True, "the BR blocks")
    stem_maxpool: bool = _flag(False, "true: output stride 32 as in the paper, under a third of the operations")
    gcn_padding: str = _one_of("swapped", GCN_PADDINGS, "`swapped`: the original implementation's; `same`: the paper's")
    zero_init_residual: bool = _flag(False, "blocks of BR, and of an encoder without `pretrained`, begin as shortcuts")
    zero_init_heads: bool = _flag(False, "the heads' last layers begin at 0: for large activations, as EfficientNet's")
    pretrained: bool | str = _key(
        True,
        "true, false or the name of a file",
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v != ""),
        "ImageNet weights for the encoder, installed or downloaded; or a file, `.pth` or `.safetensors`",
    )
    freeze_encoder_statistics: bool = _flag(False, "the encoder's batch norm keeps its running statistics in training")
    activation_checkpointing: bool = _flag(False, "less memory for more time: stages are computed again for gradients")

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> "Params":
        """Read params.json, and let changes take the place of its values. Raises UserError naming file and faults."""
        values = read_json(path, if_absent="an experiment is a folder with a params.json, {} for the defaults")
        if not isinstance(values, dict):
            raise UserError(f'{path} must hold one JSON object, as {{"learning_rate": 0.01}}')
        return cls.parse(values | dict(changes or {}), f"{path} with --set" if changes else path)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str | Path) -> "Params":
        """Make params of keys and values. Raises UserError that begins with source and names every fault."""
        if faults := [fault for key, value in values.items() if (fault := cls.fault(key, value))]:
            raise UserError(f"{source}: {'; '.join(faults)}")
        params = cls(**{key: _typed(cls.__annotations__[key], value) for key, value in values.items()})
        if broken := params.broken_rules():
            raise UserError(f"{source}: {'; '.join(broken)}")
        return params

    @classmethod
    def fault(cls, key: str, value: Any) -> str | None:
        """Say what is wrong with a key and its value; None if nothing is."""
        known: dict[str, Field] = {f.name: f for f in fields(cls)}
        if key not in known:
            meant = " or ".join(map(json.dumps, _meant(key.lower(), known)))
            hint = f"did you mean {meant}?" if meant else f"known keys: {', '.join(known)}"
            return f"unknown key {json.dumps(key)}; {hint}"
        rule = known[key].metadata
        if rule["check"](value):
            return None
        of_two = key == "image_size" and isinstance(value, list | str)
        hint = '; it is the side of a square: "resize": "letterbox" keeps the shape of photos' if of_two else ""
        return f'"{key}" is {json.dumps(value)}; allowed: {rule["allowed"]}{hint}'

    def broken_rules(self, processes: int | None = None) -> list[str]:
        """Say what is wrong with several keys together, for training in that many processes if given."""
        share, rest = divmod(self.batch_size, processes or 1)
        warmup = f'"warmup_epochs" is {self.warmup_epochs}; allowed: fewer than "num_epochs", {self.num_epochs}'
        divided = f'"batch_size" is {self.batch_size}, over all processes, and cannot be divided among {processes}'
        alone = '"compile" and "activation_checkpointing" together are for one process; set one of them to false'
        cutmix = '"cutmix" mixes the photos of a process, which has only one; raise "batch_size", or set "cutmix" to 0'
        rules = [
            (warmup, self.warmup_epochs >= self.num_epochs),
            (divided, rest > 0),
            (alone, self.compile and self.activation_checkpointing and (processes or 1) > 1),
            (cutmix, processes is not None and self.cutmix > 0 and share < 2),
        ]
        return [fault for fault, broken in rules if broken]

    def network_options(self) -> dict[str, Any]:
        """Return the keywords of model.net.FCN_GCN but for pretrained."""
        return {key: getattr(self, key) for key in NETWORK}

    def loss_options(self) -> dict[str, Any]:
        """Return the keywords of model.losses.SegmentationLoss but for over_processes."""
        return {"weights": self.loss_weights, **{key: getattr(self, key) for key in constants()}}

    @property
    def scoring_batch_size(self) -> int:
        """Images: batch_size, but SCORED_AT_ONCE pixels at most, for many processes may have shared it in training."""
        return max(1, min(self.batch_size, SCORED_AT_ONCE // self.image_size**2))


if _missing := sorted(constants().keys() - Params.__dataclass_fields__):
    raise TypeError(f"Params lacks {_missing}, which terms of the loss take; add a line for each, as focal_gamma")


SCORED_AT_ONCE = 32 * 224**2  # pixels
# Options of the network: its keywords. Weights depend on all but TRAINING_OPTIONS, and on how photos are resized.
NETWORK = tuple(key for key in inspect.signature(FCN_GCN).parameters if key != "pretrained")
TRAINING_OPTIONS = (
    *("dropout_rate", "zero_init_residual", "zero_init_heads"),
    *("freeze_encoder_statistics", "activation_checkpointing"),
)
NEEDED_BY_WEIGHTS = (*(key for key in NETWORK if key not in TRAINING_OPTIONS), "resize")
# Whatever these are, a run ends with the same result.
WITHOUT_EFFECT = ("save_summary_steps", "num_workers", "num_channels", "cache", "keep_last", "channels_last", "compile")


def comparable_over(metric: str) -> tuple[str, ...]:
    """Return the keys in which epochs and experiments agree that a metric of validation can rank among each other."""
    pixels = ("dataset", "num_classes", "image_size", "resize")
    return (*pixels, "loss_weights", *constants()) if metric == "loss" else pixels


def table() -> str:
    rows = ["key | default | allowed | meaning", "---|---|---|---"]
    for key, value in asdict(Params()).items():
        about = Params.__dataclass_fields__[key].metadata
        rows.append(f"`{key}` | `{json.dumps(value)}` | {about['allowed']} | {about['meaning']}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
