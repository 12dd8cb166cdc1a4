"""The training loss: a weighted sum of terms over the pixels that are not void."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LOSS_TERMS, UserError
from model.voc import VOID

SMOOTH = 1.0


class SegmentationLoss(nn.Module):
    """Weighted sum of loss terms on logits x (B, C, H, W) and class indices (B, H, W), 255 = void.

    With t the one-hot labels, p = sigmoid(x), s = 1, and sums over all non-void pixels and classes of the batch:

        bce           mean(softplus(x) - x t)
        dice          1 - (2 sum(p t) + s) / (sum p + sum t + s)    (Milletari et al., arXiv 1606.04797, unsquared)
        inverse_dice  the same with 1 - p and 1 - t
        cross_entropy mean over pixels of -log softmax(x) at the label

    t is never built: sum(x t) and sum(p t) are the values at the labels, sum t is the number of pixels. Half-precision
    logits are summed in float32. A batch that is all void gives 0 with zero gradients.

    Args:
        weights: term -> weight; terms that are left out or have weight 0 are not computed.

    Raises:
        UserError: an unknown term.
    """

    def __init__(self, weights: Mapping[str, float]):
        super().__init__()
        if unknown := set(weights) - set(LOSS_TERMS):
            raise UserError(f"unknown loss terms {sorted(unknown)}; allowed: {', '.join(LOSS_TERMS)}")
        self.weights = {term: weight for term, weight in weights.items() if weight}

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar. labels may have any integer dtype."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        labels = labels.long()
        valid = labels != VOID  # (B, H, W)
        at_label = logits.gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)  # (B, H, W), x where t = 1
        pixels = valid.sum()
        entries = pixels * logits.shape[1]

        total = logits.new_zeros(())
        if "bce" in self.weights:
            bce = _masked_sum(F.softplus(logits).sum(1) - at_label, valid) / entries.clamp(min=1)
            total = total + self.weights["bce"] * bce
        if "dice" in self.weights or "inverse_dice" in self.weights:
            p = _masked_sum(logits.sigmoid().sum(1), valid)
            p_t = _masked_sum(at_label.sigmoid(), valid)
            if "dice" in self.weights:
                total = total + self.weights["dice"] * _dice(p_t, p + pixels)
            if "inverse_dice" in self.weights:
                both = entries - p - pixels + p_t  # sum (1 - p)(1 - t)
                total = total + self.weights["inverse_dice"] * _dice(both, 2 * entries - p - pixels)
        if "cross_entropy" in self.weights:
            # Not F.cross_entropy: on CUDA it has no deterministic form.
            entropy = _masked_sum(logits.logsumexp(1) - at_label, valid) / pixels.clamp(min=1)
            total = total + self.weights["cross_entropy"] * entropy
        return total


def _masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    return values.where(valid, 0).sum()


def _dice(intersection: Tensor, total: Tensor) -> Tensor:
    return 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)
