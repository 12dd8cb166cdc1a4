"""How weights are updated: schedules of the learning rate, optimizers, and the precisions that a step computes in."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.net import FCN_GCN

if TYPE_CHECKING:
    from params import Params  # which takes from here what is allowed

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast, None for none

# What the learning rate is multiplied by at a step, of 0 to steps - 1: those that warmup_epochs leaves.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "poly": lambda step, steps: (1 - step / steps) ** 0.9,
    "cosine": lambda step, steps: (1 + math.cos(math.pi * (step / steps))) / 2,
}


def learning_rate_at(step: int, params: "Params", steps_per_epoch: int) -> float:
    """Return the learning rate of an optimizer step, counted from 0: a linear rise, then the schedule.

    It depends on nothing else, which is why a resume is exact. After the last step it stays as it was in it.
    """
    warmup, steps = params.warmup_epochs * steps_per_epoch, params.num_epochs * steps_per_epoch
    if step < warmup:
        return params.learning_rate * (step + 1) / (warmup + 1)
    return params.learning_rate * SCHEDULES[params.schedule](min(step, steps - 1) - warmup, steps - warmup)


def sgd(groups: list[dict[str, Any]], params: "Params") -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, momentum=params.momentum, fused=True)
    if params.momentum and params.precision == "fp16":
        # PyTorch makes the buffers in the first step and fills them there, unless the scaler skips that step.
        for weight in (weight for group in groups for weight in group["params"]):
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def adamw(groups: list[dict[str, Any]], params: "Params") -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], "Params"], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def build_optimizer(model: FCN_GCN, params: "Params") -> torch.optim.Optimizer:
    """Return the optimizer of params.json over all parameters, in PyTorch's fused form."""
    return OPTIMIZERS[params.optimizer](parameter_groups(model, params), params)


def parameter_groups(model: FCN_GCN, params: "Params") -> list[dict]:
    """Return the parameters by what their learning rate is multiplied by and by their weight decay.

    What is neither norm nor bias is a tensor called "weight" of two axes or more, in whatever encoder: scales of layers
    and tables of positions have names of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = params.encoder_learning_rate_factor if model.encoder.owns(name) else 1.0
        decays = params.decay_norms_and_biases or (name.endswith("weight") and parameter.ndim > 1)
        groups.setdefault((factor, params.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "factor": factor, "lr": factor * params.learning_rate, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
