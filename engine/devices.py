"""Where and how exactly a network computes: device, memory format, precision, random numbers."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import nn

from engine import ranks
from model import cores
from optimization import PRECISIONS
from params import Params

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


def to_device(model: nn.Module, params: Params, device: torch.device) -> None:
    """Move a network to its device, in the memory format that params ask for."""
    model.to(device).to(memory_format=torch.channels_last if params.channels_last else torch.contiguous_format)


def reuse_memory(device: torch.device) -> None:
    """Let malloc keep the memory that a step on the CPU frees, for the next step.

    Otherwise it goes back to the kernel, which fills it with zeros before it gives it out again; benchmarks/RESULTS.md
    says what that takes. The options are those of mallopt(3): nothing changes where libc is not glibc, or where the
    environment sets one of them.
    """
    if device.type == "cpu" and sys.platform == "linux" and not MALLOC_VARIABLES & os.environ.keys():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(M_TRIM_THRESHOLD, -1)
            mallopt(M_MMAP_MAX, 0)


def rng_states(device: torch.device) -> list[torch.Tensor]:
    """Return the state of an accelerator's random numbers; [] for the CPU, whose own is PyTorch's default one."""
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    return [module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)]


def set_rng_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Set what rng_states() has returned; that of another kind of device, which has another size, is passed over."""
    for state, own in zip(states, rng_states(device), strict=False):
        if state.shape == own.shape:
            module = torch.get_device_module(device)
            module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def resolve_precision(params: Params, device: torch.device) -> Params:
    """Return params with precision "auto" replaced: bf16 where the device has matrix units for it, otherwise fp32."""
    if params.precision != "auto":
        return params
    fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    fast |= device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return replace(params, precision="bf16" if fast else "fp32")


def input_options(model: nn.Module, params: Params) -> dict[str, Any]:
    """Return the keywords of model.transforms.to_input for a network."""
    return {"mean": model.mean, "std": model.std, "channels_last": params.channels_last}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which a network computes in one of PRECISIONS."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed PyTorch, and let it use only algorithms that give the same result every time if deterministic."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


class LoadingOptions(TypedDict):
    """The keywords of the loaders of model.data_loader that depend on the processes of a run."""

    num_workers: int
    rank: int
    world_size: int


def loading_options(params: Params) -> LoadingOptions:
    """Return the keywords of the loaders of this process."""
    workers = min(params.num_workers, max(1, cores() // ranks.local_world_size()))
    return LoadingOptions(num_workers=workers, rank=ranks.rank(), world_size=ranks.world_size())


def device_name(device: torch.device) -> str:
    """Return the model of a CUDA device, of others what kind of device it is."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_summary(device: torch.device) -> str:
    """Return the device, or how many there are, for people."""
    if ranks.world_size() == 1:
        return str(device)
    here = f", {ranks.local_world_size()} on each machine" if ranks.world_size() > ranks.local_world_size() else ""
    return f"{device.type} by {ranks.world_size()} processes{here}"
