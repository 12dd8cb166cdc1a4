"""Checkpoints: written whole, read as plain data only, and refused where they do not fit."""

import json
import pickle
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import distributed
from engine.devices import resolve_precision, to_device
from model import UserError, first_line, refuse_irregular
from model.encoders import built_without_memory
from model.layouts import Split, class_names, default_class_names
from model.net import FCN_GCN, class_count, is_of_score_layer, without_unused
from params import ARCHITECTURE, INPUT, Params
from utils import is_out_of_memory, replacing


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds, and the file that it was read from."""

    file: Path
    state: dict[str, Any]


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk, in words of its own insides
            if is_out_of_memory(error):
                raise
            raise OSError(f"cannot write {path}; is the disk full?") from None


def checkpoint_path(model_dir: Path, restore_file: str) -> Path:
    """Return <model_dir>/<restore_file>.pth.tar. Raises UserError for anything but a plain name."""
    if not restore_file or Path(restore_file).name != restore_file:
        raise UserError(
            f"--restore_file {restore_file!r}: give the name of a checkpoint in {model_dir}, as best or last"
        )
    return model_dir / f"{restore_file}.pth.tar"


def load_checkpoint(
    path: str | Path, *, otherwise: str = "use {file}, as with --restore_file {name}"
) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU. Raises UserError if it is absent, damaged or more than plain data.

    otherwise is what to do with another checkpoint of the folder, should this one be damaged.
    """
    path = Path(path)
    refuse_irregular(path)
    existing = sorted(file for file in path.parent.glob("*.pth.tar") if file.exists())  # not links to nowhere
    found = [file.name for file in existing if not (path.exists() and file.samefile(path))]
    others = ""
    if found:
        others = f"; {otherwise.format(file=path.parent / found[0], name=found[0].removesuffix('.pth.tar'))}"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; in this folder: {', '.join(found) or 'none'}") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: damaged, or holds more than tensors and plain values ({first_line(error)}){others}"
        ) from None
    except Exception as error:  # whatever torch.load makes of other bytes: RuntimeError, EOFError, KeyError, ...
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged or unreadable ({first_line(error)}){others}") from None
    return checked(checkpoint, path, others)


def checked(checkpoint: Any, path: Path, others: str = "") -> dict[str, Any]:
    """Return a loaded checkpoint. Raises UserError, which others ends, if it cannot be one."""
    if not isinstance(checkpoint, dict) or not _are_tensors(checkpoint.get("state_dict")):
        raise UserError(f'{path} is not a checkpoint of this network: it has no "state_dict" of tensors')
    averaged, epoch, names = (checkpoint.get(key) for key in ("ema_state_dict", "epoch", "class_names"))
    sound = {
        "params": _is_plain(checkpoint.setdefault("params", {})),
        "ema_state_dict": averaged is None or _are_tensors(averaged),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "epoch": epoch is None or (type(epoch) is int and 0 <= epoch < 10**6),
    }
    if faults := [key for key, is_sound in sound.items() if not is_sound]:
        raise UserError(
            f"{path} is not a checkpoint of this network, or damaged: {', '.join(faults)} cannot be as it is{others}"
        )
    return checkpoint


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        # stored in full, and real numbers
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_complex()
        for name, tensor in value.items()
    )


def _is_plain(params: Any) -> bool:
    try:
        json.dumps(params)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(params, dict)


def load_weights(model: nn.Module, state_dict: dict[str, Any], source: str | Path) -> None:
    """Load network weights, all of them and no others.

    Checkpoints of the original implementation hold unused brN.bn.* tensors, which are ignored. Raises UserError naming
    every other tensor that is surplus, missing or of another shape.
    """
    given = without_unused(state_dict)
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"surplus {name}" for name in given if name not in wanted]
    faults += [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{source} does not fit the network that params.json describes: {', '.join(faults[:8])}{more}")
    model.load_state_dict(given)


def check_normalization(model: FCN_GCN, checkpoint: dict[str, Any], file: Path) -> None:
    """Raise UserError if photos would now be normalized otherwise than for the weights of a checkpoint.

    They are as timm says of the encoder, and another version of timm may say something else. Older checkpoints do not
    say how they were.
    """
    then, now = checkpoint.get("normalization"), [model.mean, model.std]
    if then is not None and then != now:
        raise UserError(
            f"{file} was trained on photos normalized with mean and deviation {then}, here they are {now}; set "
            '"normalize" back, or install the version of timm that run.json names'
        )


def init_from(model: FCN_GCN, file: Path, params: Params) -> str:
    """Load weights only. Score layers stay as initialised if their class count differs; returns which those are."""
    checkpoint = load_checkpoint(file, otherwise="use --init_from {file}")
    check_compatible(("encoder", "head", "kernel_size", "boundary_refinement"), checkpoint, params, file)
    check_normalization(model, checkpoint, file)
    given, fresh = predicting_weights(checkpoint), model.state_dict()
    layers = ""
    if class_count(given) != class_count(fresh):
        given = {name: tensor for name, tensor in given.items() if not is_of_score_layer(name)}
        given |= {name: tensor for name, tensor in fresh.items() if is_of_score_layer(name)}
        layers = ", ".join(n for n, part in model.named_children() if is_of_score_layer(n) and [*part.parameters()])
    load_weights(model, given, file)
    return layers


def predicting_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights to evaluate and predict with: the averaged ones if the run kept any."""
    return checkpoint.get("ema_state_dict") or checkpoint["state_dict"]


def load_network(model_dir: Path, restore_file: str, device: torch.device) -> tuple[FCN_GCN, Params, dict[str, Any]]:
    """Return the network of an experiment with the weights of a checkpoint, on device, its params, and the checkpoint.

    Raises UserError for a faulty params.json, a faulty checkpoint, or two that do not belong together.
    """

    def read() -> tuple[Params, Path, dict[str, Any]]:
        params = resolve_precision(Params.load(model_dir / "params.json"), device)
        file = checkpoint_path(model_dir, restore_file)
        checkpoint = load_checkpoint(file)
        check_compatible((*ARCHITECTURE, *INPUT), checkpoint, params, file)
        return params, file, checkpoint

    params, file, checkpoint = distributed.broadcast_from_main(read)
    on_meta = built_without_memory(params.encoder)  # without random weights, which take longer than the checkpoint's
    with torch.device("meta") if on_meta else nullcontext():
        model = FCN_GCN(**params.network_options(), pretrained=False)
    if on_meta:
        model.to_empty(device="cpu")
    with distributed.together():
        check_normalization(model, checkpoint, file)
        load_weights(model, predicting_weights(checkpoint), file)
    to_device(model, params, device)
    return model.eval(), params, checkpoint


def agreed_class_names(checkpoint: dict[str, Any], file: Path, split: Split | None, num_classes: int) -> list[str]:
    """Return the names of the classes in a checkpoint, read from file, and in a data set, which must agree.

    Where only one of them has names, those; None is a data set that is not there. Raises UserError naming the first
    class that they call differently.
    """
    numbers = [str(index) for index in range(num_classes)]  # which stand for names that are not known
    trained = checkpoint.get("class_names") or []
    trained = trained if len(trained) == num_classes else numbers
    if split is None:
        return default_class_names(num_classes) if trained == numbers else trained
    if trained == numbers:
        return class_names(split, num_classes)
    named = split.class_names or default_class_names(num_classes)
    if named == numbers:
        return trained
    for index, (then, now) in enumerate(zip_longest(trained, named)):
        if then != now:
            then, now = ("missing" if name is None else f'"{name}"' for name in (then, now))
            raise UserError(
                f"class {index} is {then} in {file}, {now} in {split.names_source}; "
                "give the data that the run was trained on with --data_dir, or correct the names there"
            )
    return trained


def check_compatible(keys: Iterable[str], checkpoint: dict[str, Any], params: Params, source: str | Path) -> None:
    """Raise UserError if params.json has since changed a key without which the checkpoint means something else."""
    trained_with = checkpoint["params"] and asdict(Params()) | checkpoint["params"]  # older ones lack some keys
    for key in keys if trained_with else ():
        now = getattr(params, key)
        if trained_with[key] != now:
            then, now = json.dumps(trained_with[key]), json.dumps(now)
            raise UserError(f'{source} was trained with "{key}": {then}, params.json says {now}; set it back')
