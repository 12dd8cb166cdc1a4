"""All that changes while a network is trained: weights, optimizer, schedule, average, and what a resume needs."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.checkpoints import check_normalization, load_weights, predicting_weights, weights_digest
from engine.devices import rank, rng_states, set_rng_states, world_size
from model import UserError
from model.metrics import BETTER
from model.net import FCN_GCN
from model.parallel import Dropout2d, copy_to_all, shard, synchronize_batch_norm
from optimization import build_optimizer, learning_rate_at
from params import Params
from utils import RunFailed, is_out_of_memory


class Training:
    """All that changes while a network is trained, and nothing else: state_dict() is what a resume needs.

    The network has four handles: model is itself, wrapped_model what a training step calls (compiled, or ddp), ddp its
    DistributedDataParallel where there are several processes, and eval_model what is scored and kept (the average of
    the weights, where there is one). Several processes each have a Training, and all are alike: the network begins as
    that of rank 0, and batch norm, dropout and the loss are those of the whole batch, of which each has its share.

    Args:
        model: the network, on its device.
        params: the experiment.
        batches: of an epoch.
        about: what else a checkpoint says of the run: digests of its lists, class names, the values of --set.
    """

    def __init__(self, model: FCN_GCN, params: Params, batches: int, about: Mapping[str, Any] | None = None):
        self.params = params
        self.steps_per_epoch = math.ceil(batches / params.accumulation_steps)
        self.device = next(model.parameters()).device
        self.model = model
        self.wrapped_model: Callable[[torch.Tensor], torch.Tensor] = model
        self.ddp: DistributedDataParallel | None = None
        if world_size() > 1:
            synchronize_batch_norm(model, self.device)
            copy_to_all(self.model)
            self.ddp = self.wrapped_model = distribute(self.model, self.device)
        if params.compile:
            self.wrapped_model = torch.compile(
                self.wrapped_model, mode=compile_mode(self.device, params), dynamic=False
            )
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if params.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=params.precision == "fp16")
        self.optimizer = build_optimizer(self.model, params)
        self.epoch = 0  # finished ones
        self._set_steps(0)
        self.history: list[dict] = []  # what history.jsonl holds
        self.metrics: dict[str, dict] = {}  # of validation, at the "last" and at the "best" epoch
        self.about = dict(about or {})

    @property
    def stop_reason(self) -> str | None:
        """Why there is nothing left to train, None if there is."""
        return why_finished(self.history, self.params)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate_at(self.steps, self.params, self.steps_per_epoch)

    @property
    def eval_model(self) -> nn.Module:
        """The network to evaluate: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema

    def accumulation(self, step: int, sizes: Sequence[int]) -> tuple[float, bool]:
        """Return the images that share a batch's optimizer step, over its own, and whether it is the last of them.

        sizes has the images of each batch of an epoch, in which step counts from 0. A smaller batch weighs by its
        images; fewer batches may share the last step.
        """
        first = step - step % self.params.accumulation_steps
        shared = sizes[first : first + self.params.accumulation_steps]
        return sum(shared) / sizes[step], step + 1 == first + len(shared)

    def share_dropout(self, batch_size: int) -> None:
        """Let dropout draw for the next batch as a whole, of which this process has its shard."""
        if self.ddp is not None and isinstance(self.model.dropout, Dropout2d):
            self.model.dropout.whole = shard(batch_size, rank(), world_size()).start, batch_size

    def no_sync(self, *, unless: bool) -> AbstractContextManager:
        """Return the context in which gradients are not averaged over the processes, unless they are to be."""
        return nullcontext() if self.ddp is None or unless else self.ddp.no_sync()

    def end_step(self) -> None:
        """Set the learning rate of the next step, and average the weights."""
        self._set_steps(self.steps + 1)
        if self.ema is not None and self.params.ema_decay is not None:
            self._update_average(self.ema, self.params.ema_decay)

    def _set_steps(self, steps: int) -> None:
        """Note how many optimizer steps are done, from which the learning rate of the next one follows."""
        self.steps = steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("factor", 1.0)

    @torch.no_grad()
    def _update_average(self, ema: nn.Module, decay: float) -> None:
        """Average the weights and batch norm's statistics; copy its counters, and everything at first.

        Not torch's AveragedModel, whose own counter makes the host wait for the GPU at every update.
        """
        if self.steps == 1:
            ema.load_state_dict(self.model.state_dict())
        else:
            averaged: list[torch.Tensor] = list(ema.parameters())
            current: list[torch.Tensor] = list(self.model.parameters())
            for average, now in zip(ema.buffers(), self.model.buffers(), strict=True):
                if average.is_floating_point():
                    averaged.append(average)
                    current.append(now)
                else:
                    average.copy_(now)
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def check_losses(self, losses: torch.Tensor, rates: Sequence[float]) -> None:
        """Raise RunFailed naming the first loss of the epoch that is infinite or not a number.

        rates has the learning rate of each step.
        """
        if not (bad := losses.isfinite().logical_not().nonzero()).numel():
            return
        step = int(bad[0])
        raise RunFailed(
            f"the loss became {losses[step].item()} at step {step + 1} of epoch {self.epoch + 1}, "
            f"at learning rate {rates[step]:g}; {self._way_back()}"
        )

    def check_epoch(self, train_metrics: dict, val_metrics: dict) -> None:
        """Raise RunFailed unless what an epoch has left can be saved: weights, optimizer and validation are finite."""
        if val_metrics["loss"] is None or not self.is_finite():
            raise RunFailed(
                f"epoch {self.epoch + 1} ended with weights, optimizer or validation loss not finite, "
                f"at learning rate {train_metrics['learning_rate']:g}; {self._way_back()}"
            )

    def _way_back(self) -> str:
        kept = f"last.pth.tar holds epoch {self.epoch}" if self.epoch else "no checkpoint was written yet"
        return f'{kept}. Lower "learning_rate", or set "clip_grad_norm"'

    def end_epoch(self, train_metrics: dict, val_metrics: dict, *, seconds: float, images_per_second: float) -> None:
        """Add an epoch to the history, and note its metrics, under "best" too if it is the best so far."""
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "train": scalars(train_metrics),
            "val": scalars(val_metrics),
            "learning_rate": train_metrics["learning_rate"],
            "seconds": round(seconds, 3),
            "images_per_second": round(images_per_second, 2),
        }
        self.history.append(record)
        weights = weights_digest(self.eval_model.state_dict())
        self.metrics["last"] = {"epoch": self.epoch, "weights": weights, **val_metrics}
        if best_epoch(self.history, self.params.best_metric) is record:
            self.metrics["best"] = self.metrics["last"]

    def is_finite(self) -> bool:
        """Return whether every weight, running statistic and number of the optimizer is finite."""
        states = self.optimizer.state.values()
        tensors = [*self.model.state_dict().values(), *(value for state in states for value in state.values())]
        return all(torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).tolist())

    def state_dict(self) -> dict:
        """Return all that a resume needs, as tensors and plain values; epoch, state_dict and optim_dict have the names
        that the original implementation gives them. The optimizer's state is by the parameters' order in the network,
        which its groups do not change.
        """
        numbers, optimizer = self._parameter_numbers(), self.optimizer.state_dict()
        return {
            "epoch": self.epoch,
            "state_dict": self.model.state_dict(),
            "optim_dict": optimizer | {"state": {numbers[place]: own for place, own in optimizer["state"].items()}},
            "ema_state_dict": None if self.ema is None else self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "metrics": self.metrics,
            **self.about,
            "normalization": [self.model.mean, self.model.std],
            "rng": torch.get_rng_state(),  # the same in every process
            "rng_cuda": rng_states(self.device),  # of any accelerator; the name is that of the first
            "params": asdict(self.params),
        }

    def _parameter_numbers(self) -> list[int]:
        """Return, for each parameter in the optimizer's order, its place among those of the network."""
        numbers = {parameter: number for number, parameter in enumerate(self.model.parameters())}
        return [numbers[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]

    def load_state_dict(self, state: dict, source: Path) -> None:
        """Continue from a checkpoint. Options of the optimizer and the schedule are those of params.json as it is now.

        Raises UserError when the checkpoint is damaged, or holds weights only, or those of another network.
        """
        check_normalization(self.model, state, source)
        load_weights(self.model, state["state_dict"], source)
        if self.ema is not None:  # begins with the weights themselves where there was no average before
            load_weights(self.ema, predicting_weights(state), source)
        try:
            self._load_rest(state)
            finite = self.is_finite()
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{source} holds no sound training state ({type(error).__name__}: {error}); start from its weights "
                "with --init_from, in another --model_dir"
            ) from None
        if not finite:
            raise UserError(
                f"{source}: weights, or what the optimizer knows of them, are not finite: the run has diverged; start "
                'anew with a lower "learning_rate" or with "clip_grad_norm"'
            )

    def _load_rest(self, state: dict) -> None:
        self.epoch, self.history = state["epoch"], [dict(record) for record in state["history"]]
        self.metrics = dict(state["metrics"])
        saved = state["optim_dict"]["state"]
        own = {place: saved[number] for place, number in enumerate(self._parameter_numbers()) if number in saved}
        begun = self.optimizer.state_dict()  # for fp16 SGD's has momentum of zero, which a resume may turn on
        self.optimizer.load_state_dict(begun | {"state": begun["state"] | own})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._set_steps(self.epoch * self.steps_per_epoch)
        torch.set_rng_state(state["rng"])
        set_rng_states(state["rng_cuda"], self.device)


def why_finished(history: list[dict], params: Params) -> str | None:
    """Return why a run with the epochs of history.jsonl has nothing left to train, None if it has."""
    epoch, patience = len(history), params.early_stopping_patience
    if epoch >= params.num_epochs:
        return f"trained {epoch} of {params.num_epochs} epochs"
    if patience is not None and history and epoch - best_epoch(history, params.best_metric)["epoch"] >= patience:
        return f"stopped early after epoch {epoch}: no better {params.best_metric} in {patience} epochs"
    return None


def best_epoch(history: list[dict], metric: str) -> dict:
    """Return the first of the epochs with the best value of a validation metric."""
    return better_of(metric)(history, key=lambda epoch: score(epoch, metric))


def score(epoch: dict, metric: str) -> float:
    """Return a validation metric of an epoch of history.jsonl; where it is undefined, what is worse than any value."""
    value = epoch["val"].get(metric)
    worst = -math.inf if better_of(metric) is max else math.inf
    return worst if value is None else value


def better_of(metric: str) -> Callable:
    """Return max or min, which chooses the better of two values; max for one that is unknown, of an older run say."""
    return BETTER.get(metric, max)


def scalars(metrics: dict) -> dict[str, float | None]:
    """Return the metrics that are one number for all classes, which history.jsonl and TensorBoard show."""
    others = ("epoch", "weights", "images", "learning_rate")
    return {key: value for key, value in metrics.items() if key not in others and not isinstance(value, dict | list)}


def distribute(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return the network in a form that averages the gradients of all processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers`")  # has another name from PyTorch 2.15 on
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,
            broadcast_buffers=False,  # batch norm's are alike already
            gradient_as_bucket_view=True,
        )


def compile_mode(device: torch.device, params: Params) -> str:
    """On a GPU with CUDA graphs, for launching hundreds of kernels takes its time.

    Not where gradients are accumulated: they would lie in memory that the next batch's graph writes to. Nor where
    processes exchange them, which would have to be in the graph.
    """
    alone = params.accumulation_steps == 1 and world_size() == 1
    return "reduce-overhead" if device.type == "cuda" and alone else "default"
