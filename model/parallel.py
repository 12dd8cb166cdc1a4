"""What several processes that share a batch must do together: sums, batch norm and dropout over the whole of it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import UserError


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard(count: int, rank: int, world_size: int) -> range:
    """Which of count things are a process's own: contiguous, in the order of the ranks, sizes differing by one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def all_reduce_sum(*counts: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if process_count() > 1:
        for count in counts:
            dist.all_reduce(count)


def copy_to_all(model: nn.Module) -> None:
    """Let all processes have the weights and statistics of rank 0."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def differentiable_sum(x: Tensor) -> Tensor:
    """Return the sum of x over all processes, differentiable.

    Going backward, the gradients of all processes are summed too. Where each computes the same loss from totals, a
    parameter's gradient in one process is then world_size times what its share of the batch contributes, and the mean
    over the processes, which DistributedDataParallel takes, is the gradient of the loss over the whole batch.
    """
    return _Total.apply(x) if process_count() > 1 else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Total.forward(ctx, gradient)


WITHOUT_FLOAT64 = {"mps"}  # kinds of devices; of xpu some


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return what long sums are taken in: float64, or float32 on a device that has no float64."""
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


class HostSyncBatchNorm2d(nn.BatchNorm2d):
    """nn.SyncBatchNorm for the CPU, which that refuses: statistics of the whole batch, whatever part of it is here."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W), B may be 0
        return _activated(self, self._normalized(x) if self.training else super().forward(x))

    def _normalized(self, x: Tensor) -> Tensor:
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        own = full.new_tensor([full[:, 0].numel()], dtype=torch.float64)
        sums = differentiable_sum(torch.cat([full.sum((0, 2, 3), dtype=torch.float64), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = full - mean.to(full.dtype).view(1, -1, 1, 1)
        variance = differentiable_sum(centred.square().sum((0, 2, 3), dtype=torch.float64)) / count
        self._update_statistics(mean.detach(), variance.detach() * count / (count - 1))  # unbiased
        scale = self.weight * (variance + self.eps).rsqrt()
        offset = self.bias - mean * scale
        return (full * scale.to(full.dtype).view(1, -1, 1, 1) + offset.to(full.dtype).view(1, -1, 1, 1)).to(x.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for average, now in ((self.running_mean, mean), (self.running_var, variance)):
            average.lerp_(now.to(average.dtype), self.momentum or 0.0)


class DeviceSyncBatchNorm2d(nn.SyncBatchNorm):
    """nn.SyncBatchNorm, which in half precision would send zeros in that, not float32, where a process has no image."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W), B may be 0
        return _activated(self, super().forward(x) if len(x) else super().forward(x.float()).to(x.dtype))


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply the activation that timm's BatchNormAct2d has in itself."""
    return getattr(norm, "act", nn.Identity())(x)


def is_plain_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is nn.BatchNorm2d, or timm's form of it that an activation follows, `act`."""
    return type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d"


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let batch norm be over the batches of all processes. Raises UserError for a form of it that is not known."""
    for name, module in model.named_modules():
        if is_plain_batch_norm(module):
            # The same attributes, but for one: the group that SyncBatchNorm asks, by default all processes.
            module.process_group = None
            module.__class__ = DeviceSyncBatchNorm2d if device.type == "cuda" else HostSyncBatchNorm2d
        elif isinstance(module, _BatchNorm):
            raise UserError(f"several processes cannot share {name}, {type(module).__name__}; train with one process")


class Dropout2d(nn.Dropout2d):
    """nn.Dropout2d that drops the same channels of the same images however a batch is shared out.

    Every process draws for the whole batch, so their random numbers stay alike, and applies what falls to its share.
    """

    whole: tuple[int, int] | None = None  # the position of the first image here in the batch, and the batch's size

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        if self.whole is None or not self.training:
            return super().forward(x)
        first, count = self.whole
        kept = F.dropout2d(x.new_ones(count, x.shape[1], 1, 1), self.p)
        return x * kept[first : first + len(x)]
