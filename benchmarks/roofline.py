"""The least time that a computation can take, operation by operation, on a device of given speed."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Lists every operation as (name, FLOP, bytes): those of its operands and results, each read or written once."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            self.seen.append((function.name(), flops, sum(tensor.nbytes for tensor in tensors)))
        return result


@dataclass(frozen=True)
class Bound:
    """What a computation needs at least: seconds on that device, FLOP, bytes moved, and the seconds by operation."""

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
    for name, flops, bytes_ in operations.seen:
        seconds[name.removeprefix("aten::").split(".")[0]] += max(flops / peak, bytes_ / bandwidth)
    flops, bytes_ = (sum(operation[i] for operation in operations.seen) for i in (1, 2))
    return Bound(sum(seconds.values()), flops, bytes_, dict(sorted(seconds.items(), key=lambda item: -item[1])))
