"""Every hyperparameter of an experiment: name, default and what is allowed."""

import difflib
import json
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from model import GCN_PADDINGS, HEADS, UserError
from utils import is_number, read_json

LOSS_TERMS = ("bce", "dice", "inverse_dice", "cross_entropy", "balanced_cross_entropy", "focal", "lovasz")
LOSS_CONSTANTS = ("focal_gamma",)  # called after a term and the keyword that it takes


def _key(default: Any, allowed: str, check: Callable[[Any], bool]) -> Any:
    metadata = {"allowed": allowed, "check": check}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _number(default: float | None, allowed: str, check: Callable[[float], bool]) -> Any:
    nullable = default is None
    allowed = f"a number {allowed}" + (" or null" if nullable else "")
    return _key(default, allowed, lambda v: (nullable and v is None) or (is_number(v) and check(v)))


def _integer(
    default: int | None, minimum: int, maximum: int = 2**31 - 1, *, also: str = "", check: Callable = lambda v: True
) -> Any:
    nullable = default is None
    most = f" and at most {maximum}" if maximum < 2**31 - 1 else ""
    allowed = f"an integer of at least {minimum}{most}{also}" + (" or null" if nullable else "")
    return _key(
        default,
        allowed,
        lambda v: (nullable and v is None) or (type(v) is int and minimum <= v <= maximum and check(v)),
    )


def _one_of(default: str, *others: str) -> Any:
    options = (default, *others)
    return _key(
        default, " or ".join(json.dumps(option) for option in options), lambda v: isinstance(v, str) and v in options
    )


def _flag(default: bool) -> Any:
    return _key(default, "true or false", lambda v: isinstance(v, bool))


def _are_loss_weights(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(LOSS_TERMS):
        return False
    return all(is_number(w) and w >= 0 for w in value.values()) and any(value.values())


@dataclass(frozen=True)
class Params:
    """The hyperparameters of one experiment: every key that params.json may hold, its default and what is allowed."""

    learning_rate: float = _number(0.001, "above 0", lambda v: v > 0)
    batch_size: int = _integer(5, 1)
    num_epochs: int = _integer(35, 1)
    dropout_rate: float = _number(0.0, "from 0 to below 1", lambda v: 0 <= v < 1)
    save_summary_steps: int = _integer(100, 1)
    num_workers: int = _integer(4, 0)
    num_channels: int | None = _integer(None, 1)

    dataset: str = _one_of("voc", "sample")
    image_size: int = _integer(224, 32, 16384)
    num_classes: int = _integer(21, 2, 255)
    augment: bool = _flag(False)
    normalize: bool = _flag(True)
    cache: bool = _flag(True)
    train_split: str = _key(
        "train", "the name of a list", lambda v: isinstance(v, str) and v.isprintable() and v == Path(v).name != ""
    )

    loss_weights: dict[str, float] = _key(
        {"bce": 0.4, "dice": 0.4, "inverse_dice": 0.2},
        f"an object of weights of at least 0, not all of them 0, for {', '.join(LOSS_TERMS)}",
        _are_loss_weights,
    )
    focal_gamma: float = _number(2.0, "of at least 0", lambda v: v >= 0)
    optimizer: str = _one_of("sgd", "adamw")
    momentum: float = _number(0.99, "from 0 to below 1", lambda v: 0 <= v < 1)
    weight_decay: float = _number(0.0005, "of at least 0", lambda v: v >= 0)
    schedule: str = _one_of("constant", "poly", "cosine")
    warmup_epochs: int = _integer(0, 0)
    clip_grad_norm: float | None = _number(None, "above 0", lambda v: v > 0)
    ema_decay: float | None = _number(None, "from 0 to below 1", lambda v: 0 <= v < 1)
    accumulation_steps: int = _integer(1, 1)
    early_stopping_patience: int | None = _integer(None, 1)
    keep_last: bool = _flag(True)

    precision: str = _one_of("auto", "fp32", "bf16", "fp16")
    channels_last: bool = _flag(True)
    compile: bool = _flag(False)
    seed: int = _integer(230, 0, 2**63 - 1, also=" and below 2^63")
    deterministic: bool = _flag(False)

    kernel_size: int = _integer(7, 3, 255, also=" that is odd", check=lambda v: v % 2 == 1)
    head: str = _one_of(*HEADS)
    boundary_refinement: bool = _flag(True)
    stem_maxpool: bool = _flag(False)
    gcn_padding: str = _one_of(*GCN_PADDINGS)
    zero_init_residual: bool = _flag(False)
    pretrained: bool = _flag(True)

    @classmethod
    def load(cls, path: str | Path) -> "Params":
        """Read params.json. Raises UserError naming the file and, for each fault, key, value and what is allowed."""
        values = read_json(path, if_absent="an experiment is a folder with a params.json, {} for the defaults")
        if not isinstance(values, dict):
            raise UserError(f'{path} must hold one JSON object, as {{"learning_rate": 0.01}}')
        return cls.parse(values, path)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str | Path) -> "Params":
        """Params of the given keys and values. Raises UserError that begins with source and names every fault."""
        if faults := [fault for key, value in values.items() if (fault := cls.fault(key, value))]:
            raise UserError(f"{source}: {'; '.join(faults)}")
        params = cls(**values)
        if params.warmup_epochs >= params.num_epochs:
            raise UserError(
                f'{source}: "warmup_epochs" is {params.warmup_epochs}; '
                f'allowed: fewer than "num_epochs", {params.num_epochs}'
            )
        return params

    @classmethod
    def fault(cls, key: str, value: Any) -> str | None:
        """What is wrong with a key and its value, in words; None if nothing is."""
        known: dict[str, Field] = {f.name: f for f in fields(cls)}
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {json.dumps(nearest[0])}?" if nearest else f"known keys: {', '.join(known)}"
            return f"unknown key {json.dumps(key)}; {hint}"
        rule = known[key].metadata
        return None if rule["check"](value) else f'"{key}" is {json.dumps(value)}; allowed: {rule["allowed"]}'

    def network_options(self) -> dict[str, Any]:
        """The keywords of model.net.FCN_GCN but for pretrained."""
        return {key: getattr(self, key) for key in (*ARCHITECTURE, "dropout_rate", "zero_init_residual")}

    def loss_options(self) -> dict[str, Any]:
        """The keywords of model.losses.SegmentationLoss but for over_processes."""
        return {"weights": self.loss_weights, **{key: getattr(self, key) for key in LOSS_CONSTANTS}}

    def input_options(self) -> dict[str, Any]:
        """The keywords of model.transforms.to_input."""
        return {"normalize": self.normalize, "channels_last": self.channels_last}

    @property
    def scoring_batch_size(self) -> int:
        """Of loaders that score: batch_size, but no more than one process can hold of what many may have trained on."""
        return max(1, min(self.batch_size, SCORED_AT_ONCE // self.image_size**2))


SCORED_AT_ONCE = 32 * 224**2  # pixels
ARCHITECTURE = ("num_classes", "kernel_size", "head", "boundary_refinement", "stem_maxpool", "gcn_padding")
