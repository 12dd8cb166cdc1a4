"""Checkpoints: written whole, read as plain data only, and refused where they do not fit."""

import hashlib
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.devices import is_main, resolve_precision, to_device
from model import UserError, first_line
from model.encoders import ENCODERS
from model.layouts import Split, class_names, default_class_names
from model.net import FCN_GCN, class_count, is_of_score_layer, without_unused
from model.weights import unwrapped
from params import NEEDED_BY_WEIGHTS, WITHOUT_EFFECT, Params
from utils import is_out_of_memory, replacing


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
        raise UserError(f"--restore_file {restore_file!r}: give the name of a checkpoint in {model_dir}, as best")
    return model_dir / f"{restore_file}.pth.tar"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU. Raises UserError if it is absent, damaged or more than plain data."""
    others = ", ".join(sorted(file.name for file in path.parent.glob("*.pth.tar") if file != path)) or "none"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint {path}; in this folder: {others}") from None
    except Exception as error:  # whatever torch.load makes of other bytes: UnpicklingError, EOFError, KeyError, ...
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is refused: damaged, or more than tensors and plain values ({first_line(error)}); "
            f"other checkpoints of this folder: {others}"
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f'{path} is not a checkpoint of this network: it has no "state_dict"')
    checkpoint.setdefault("params", {})
    return checkpoint | {"state_dict": unwrapped(checkpoint["state_dict"])}


def load_weights(model: nn.Module, state_dict: dict[str, Any], source: str | Path) -> None:
    """Load network weights, all of them and no others, but for the unused brN.bn.* of the original implementation.

    Raises UserError with what load_state_dict() says of those that are surplus, missing or of another shape.
    """
    try:
        model.load_state_dict(without_unused(state_dict))
    except (RuntimeError, AttributeError, TypeError) as error:
        faults = textwrap.shorten(str(error).partition("\n")[2] or str(error), 300, placeholder=" ...")
        raise UserError(f"{source} does not fit the network that params.json describes: {faults}") from None


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


def init_from(model: FCN_GCN, file: Path, params: Params) -> list[str]:
    """Load weights only. Score layers stay as initialised if their class count differs.

    Returns lines that say which those are, and what else is not as it was for these weights.
    """
    checkpoint = load_checkpoint(file)
    needed = ("encoder", "head", "kernel_size", "boundary_refinement")
    check_unchanged(needed, checkpoint, params, file)
    check_normalization(model, checkpoint, file)
    given, fresh = predicting_weights(checkpoint), model.state_dict()
    others = [key for key in NEEDED_BY_WEIGHTS if key not in (*needed, "num_classes")]
    changed = ", ".join(differences(params_of(checkpoint, file, params), params, others).values())
    notes = [f"{file} was trained with other values: {changed}"] if changed else []
    if class_count(given) != class_count(fresh):
        given = {name: tensor for name, tensor in given.items() if not is_of_score_layer(name)}
        given |= {name: tensor for name, tensor in fresh.items() if is_of_score_layer(name)}
        layers = ", ".join(n for n, part in model.named_children() if is_of_score_layer(n) and [*part.parameters()])
        notes.append(f"{file} has another number of classes; these layers start afresh: {layers}")
    load_weights(model, given, file)
    return notes


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Return 16 hexadecimal digits that tell these weights from all others, on whatever device they are."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def origin(checkpoint: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for the weights of one recipe, whatever its seed, on the same data.

    So runs that began from the seeds of a recipe differ in nothing but their seed. Without params: weights_digest().
    """
    if not checkpoint["params"]:
        return weights_digest(predicting_weights(checkpoint))
    recipe = {key: value for key, value in checkpoint["params"].items() if key not in ("seed", *WITHOUT_EFFECT)}
    learned = [recipe, checkpoint.get("class_names"), *filter(None, [checkpoint.get("images")])]  # older ones have none
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


def predicting_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights to evaluate and predict with: the averaged ones if the run kept any."""
    return checkpoint.get("ema_state_dict") or checkpoint["state_dict"]


def to_predict_with(state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a last.pth.tar that prediction needs, which is a best.pth.tar."""
    kept = {
        key: state[key] for key in ("epoch", "class_names", "images", "normalization", "set", "params") if key in state
    }
    return kept | {"state_dict": predicting_weights(state)}


def load_network(model_dir: Path, restore_file: str, device: torch.device) -> tuple[FCN_GCN, Params, dict[str, Any]]:
    """Return the network of an experiment with the weights of a checkpoint, on device, its params, and the checkpoint.

    The params are those that it was trained with; keys of params.json that have been changed since are named on
    stderr. Raises UserError for a faulty params.json, a faulty checkpoint, or two that do not belong together.
    """
    file = checkpoint_path(model_dir, restore_file)
    checkpoint = load_checkpoint(file)
    now = Params.load(model_dir / "params.json", checkpoint.get("set"))
    params = resolve_precision(trained_params(checkpoint, now, file), device)
    on_meta = params.encoder in ENCODERS  # without random weights, which take longer than the checkpoint's
    with torch.device("meta") if on_meta else nullcontext():
        model = FCN_GCN(**params.network_options(), pretrained=False)
    if on_meta:
        model.to_empty(device="cpu")
    check_normalization(model, checkpoint, file)
    load_weights(model, predicting_weights(checkpoint), file)
    to_device(model, params, device)
    return model.eval(), params, checkpoint


HOW_TO_COMPUTE = ("batch_size", "precision", *WITHOUT_EFFECT)  # what is predicted, all but rounding the same


def trained_params(checkpoint: dict[str, Any], now: Params, file: Path) -> Params:
    """Return what a checkpoint was trained with, and of params.json, now, only how to compute.

    Says on stderr, in rank 0, which other keys have been changed since.
    """
    trained = replace(params_of(checkpoint, file, now), **{key: getattr(now, key) for key in HOW_TO_COMPUTE})
    if (text := ", ".join(differences(trained, now).values())) and is_main():
        print(f"params.json has been changed since {file} was trained, and counts as it was: {text}", file=sys.stderr)
    return trained


def params_of(checkpoint: dict[str, Any], file: Path, now: Params) -> Params:
    """Return the params in a checkpoint; those of now for the original implementation, whose have none."""
    return Params.parse(checkpoint["params"], file) if checkpoint["params"] else now


def differences(then: Params, now: Params, keys: Iterable[str] = ()) -> dict[str, str]:
    """Return, by key, where params differ in all keys or those that are given, as "seed" 1 -> 2."""
    before, after = asdict(then), asdict(now)
    changed = [key for key in keys or before if before[key] != after[key]]
    return {key: f'"{key}" {json.dumps(before[key])} -> {json.dumps(after[key])}' for key in changed}


def check_unchanged(
    keys: Iterable[str], checkpoint: dict[str, Any], params: Params, file: Path, way_on: str = "set it back"
) -> None:
    """Raise UserError if params.json has since changed a key without which the checkpoint means something else."""
    if changed := ", ".join(differences(params_of(checkpoint, file, params), params, keys).values()):
        raise UserError(f"{file} was trained with other values than params.json has: {changed}; {way_on}")


def agreed_class_names(checkpoint: dict[str, Any], file: Path, split: Split | None, num_classes: int) -> list[str]:
    """Return the names of the classes in a checkpoint, read from file, and in a data set, which must agree.

    Where only one of them has names, those; {} is no checkpoint, None a data set that is not there. Raises UserError
    naming the first class that they call differently.
    """
    numbers = [str(index) for index in range(num_classes)]  # which stand for names that are not known
    trained = checkpoint.get("class_names") or numbers
    named = (split and split.class_names) or default_class_names(num_classes)
    if trained == numbers:
        return class_names(split, num_classes) if split else named
    if split is None or named == numbers:
        return trained
    for index, (then, now) in enumerate(zip_longest(trained, named)):
        if then != now:
            then, now = ("missing" if name is None else f'"{name}"' for name in (then, now))
            raise UserError(
                f"class {index} is {then} in {file}, {now} in {split.names_source}; "
                "give the data that the run was trained on with --data_dir, or correct the names there"
            )
    return trained
