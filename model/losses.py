"""The training loss: a weighted sum of terms over the pixels that are not void."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LOSS_TERMS, UserError
from model.parallel import all_reduce_sum, differentiable_sum
from model.voc import VOID

SMOOTH = 1.0


class SegmentationLoss(nn.Module):
    """Weighted sum of loss terms on logits x (B, C, H, W) and class indices (B, H, W), 255 = void.

    With t the one-hot labels, p = sigmoid(x), s = 1, and sums over all non-void pixels and classes of the batch:

        bce           mean(softplus(x) - x t)
        dice          1 - (2 sum(p t) + s) / (sum p + sum t + s)    (Milletari et al., arXiv 1606.04797, unsquared)
        inverse_dice  the same with 1 - p and 1 - t
        cross_entropy mean over pixels of -log softmax(x) at the label
        balanced_cross_entropy  its weighted mean; a pixel of a class with n pixels in the batch weighs 1 / sqrt(n)

    t is never built: sum(x t) and sum(p t) are the values at the labels, sum t is the number of pixels. Half-precision
    logits are summed in float32; the sums are combined in float64. An all void batch gives 0 with zero gradients. The
    batch is that of the call, also where several are accumulated for a step.

    Args:
        weights: term -> weight; terms that are left out or have weight 0 are not computed.
        over_processes: the batch is shared by all processes of torch.distributed, each of which gives its part (of any
            size, also none) and gets the loss of the whole; gradients are to be averaged over the processes, see
            parallel.total.

    Raises:
        UserError: an unknown term.
    """

    def __init__(self, weights: Mapping[str, float], *, over_processes: bool = False):
        super().__init__()
        if unknown := set(weights) - set(LOSS_TERMS):
            raise UserError(f"unknown loss terms {sorted(unknown)}; allowed: {', '.join(LOSS_TERMS)}")
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.over_processes = over_processes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar. labels may have any integer dtype."""
        sums = self._sums(logits, labels.long())
        values = torch.stack([value.double() for value in sums.values()])
        sums = dict(zip(sums, differentiable_sum(values) if self.over_processes else values, strict=True))
        loss = sum(self.weights[term] * value for term, value in self._terms(sums, logits.shape[1]).items())
        return loss.to(logits.dtype if logits.dtype == torch.float64 else torch.float32)

    def _sums(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the terms are made of: sums over pixels that are not void, and over classes."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        valid = labels != VOID  # (B, H, W)
        at_label = logits.gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)  # (B, H, W), x where t = 1
        sums = {"pixels": valid.sum()}
        if "bce" in self.weights:
            sums["bce"] = _masked_sum(F.softplus(logits).sum(1) - at_label, valid)
        if "dice" in self.weights or "inverse_dice" in self.weights:
            sums["p"] = _masked_sum(logits.sigmoid().sum(1), valid)
            sums["p t"] = _masked_sum(at_label.sigmoid(), valid)
        if self.weights.keys() & {"cross_entropy", "balanced_cross_entropy"}:
            cross_entropy = logits.logsumexp(1) - at_label  # not F.cross_entropy: on CUDA it has no deterministic form
        if "cross_entropy" in self.weights:
            sums["cross_entropy"] = _masked_sum(cross_entropy, valid)
        if "balanced_cross_entropy" in self.weights:
            balance = self._balance(labels, valid, logits.shape[1]).to(logits.dtype)
            sums["balance"] = balance.sum()
            sums["balanced_cross_entropy"] = _masked_sum(cross_entropy * balance, valid)
        return sums

    def _balance(self, labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
        """(B, H, W): 1 / sqrt(pixels of the same class in the batch), 0 where the label is void."""
        bins = labels.where(valid, num_classes).flatten()
        counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
        if self.over_processes:
            all_reduce_sum(counts)
        balance = counts.double().rsqrt()  # infinite where there is no pixel to weigh
        balance[num_classes] = 0
        return balance[bins].view(labels.shape)

    def _terms(self, sums: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
        pixels = sums["pixels"]
        entries = pixels * num_classes
        terms = {}
        if "bce" in self.weights:
            terms["bce"] = sums["bce"] / entries.clamp(min=1)
        if "dice" in self.weights:
            terms["dice"] = _dice(sums["p t"], sums["p"] + pixels)
        if "inverse_dice" in self.weights:
            both = entries - sums["p"] - pixels + sums["p t"]  # sum (1 - p)(1 - t)
            terms["inverse_dice"] = _dice(both, 2 * entries - sums["p"] - pixels)
        if "cross_entropy" in self.weights:
            terms["cross_entropy"] = sums["cross_entropy"] / pixels.clamp(min=1)
        if "balanced_cross_entropy" in self.weights:
            terms["balanced_cross_entropy"] = sums["balanced_cross_entropy"] / sums["balance"].clamp(min=1)
        return terms


def _masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    return values.where(valid, 0).sum()


def _dice(intersection: Tensor, total: Tensor) -> Tensor:
    return 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)
