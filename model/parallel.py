"""What several processes that share a batch must do together: sums, batch norm and dropout over the whole of it.

With a single process everything here is what PyTorch has for it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def process_count() -> int:
    """How many processes share the work."""
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
    """The sum of x over all processes, differentiable.

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
        result = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result


class _BatchNorm(torch.autograd.Function):
    """Batch norm of x (B, C, H, W), B may be 0, with the statistics of all processes: y, mean (C), variance (C)
    and the number of values of a channel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        channels = len(weight)
        moments = weight.new_zeros(2 * channels + 1, dtype=torch.float64)  # sums of x and x^2, and of how many
        if len(x):
            _, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)  # 1 / of it
            mean, square = mean.double(), deviation.double().pow(-2) - eps + mean.double().square()
            moments = (x.numel() // channels) * torch.cat([mean, square, moments.new_ones(1)])
        mean, square, count = differentiable_sum(moments).split([channels, channels, 1])
        mean = mean / count
        variance = (square / count - mean.square()).clamp(min=0)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        count = count.to(weight.dtype)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        by_x, by_weight, by_bias = gradient, torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):
            # As if mean and variance were constants. What x does to them, here and elsewhere, is taken off below.
            by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        scale = weight * (variance + ctx.eps).rsqrt() / count
        slope, offset = (scale * differentiable_sum(torch.stack([by_weight, by_bias]))).unbind()
        return by_x - F.batch_norm(x, mean, variance, slope, offset, False, eps=ctx.eps), by_weight, by_bias, None


class HostSyncBatchNorm2d(nn.BatchNorm2d):
    """nn.SyncBatchNorm for the CPU, which that refuses: statistics of the whole batch, whatever part of it is here."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W), B may be 0
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _BatchNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased
        return y


class DeviceSyncBatchNorm2d(nn.SyncBatchNorm):
    """nn.SyncBatchNorm, also where a process has no image of a batch.

    In half precision it would send zeros in that precision, while the others send their statistics in float32.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W), B may be 0
        return super().forward(x) if len(x) else super().forward(x.float()).to(x.dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch norm over the batches of all processes; names and values of its tensors stay."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            module.__class__ = DeviceSyncBatchNorm2d if on_gpu else HostSyncBatchNorm2d  # the same attributes
    return model


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
