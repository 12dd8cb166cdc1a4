"""An estimate of the time that a computation needs on a device of given speed, operation by operation."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = ("empty", "_unsafe_view", "detach", "lift")  # what such names begin with moves nothing
OVERWRITE = ("copy_", "fill_", "zero_")  # do not read what they write to


class Operation(NamedTuple):
    name: str
    flops: int
    bytes: int


class Operations(TorchDispatchMode):
    """Lists every operation with its FLOP and with the bytes of what it reads and of what it writes."""

    def __init__(self):
        super().__init__()
        self.seen: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.name().removeprefix("aten::").split(".")[0]
        if not function.is_view and not name.startswith(FREE):
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            self.seen.append(Operation(name, flops, _traffic(function, name, args, kwargs, result)))
        return result


def _traffic(function, name: str, args: tuple, kwargs: dict, result) -> int:
    """Bytes of all distinct operands and results, and once more of operands that are changed in place."""
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    operands = _sizes([value for key, value in given.items() if not (name in OVERWRITE and key in changed)])
    written = _sizes([given[key] for key in changed if key in given])
    results = {place: size for place, size in _sizes(result).items() if place not in written and place not in operands}
    return sum(sum(sizes.values()) for sizes in (operands, written, results))


def _sizes(values) -> dict[tuple, int]:
    """Bytes of every distinct tensor; an expanded one has no more than lie in memory."""
    return {
        (tensor.data_ptr(), tensor.shape, tensor.dtype): min(tensor.nbytes, tensor.untyped_storage().nbytes())
        for tensor in tree_leaves(values)
        if isinstance(tensor, torch.Tensor)
    }


@dataclass(frozen=True)
class Bound:
    """What a computation needs: seconds on that device, FLOP, bytes moved, and the seconds by operation."""

    seconds: float
    flops: int
    bytes: int
    by_operation: dict[str, float]


def bound(step: Callable, peak: float, bandwidth: float) -> Bound:
    """The roofline (Williams et al., 2009, doi 10.1145/1498765.1498785) of every operation of a step, added up.

    Each takes its FLOP at peak (FLOP/s) or its bytes at bandwidth (bytes/s), whichever is longer. Fused operations
    would move fewer bytes, and what stays in the processor's cache moves faster.
    """
    with Operations() as operations:
        step()
    seconds = defaultdict(float)
    for operation in operations.seen:
        seconds[operation.name] += max(operation.flops / peak, operation.bytes / bandwidth)
    flops, bytes_ = (sum(column) for column in list(zip(*operations.seen, strict=True))[1:])
    return Bound(sum(seconds.values()), flops, bytes_, dict(sorted(seconds.items(), key=lambda item: -item[1])))
