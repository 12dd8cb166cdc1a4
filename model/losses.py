"""The training loss: a weighted sum of terms over the pixels that are not void.

In validation every photo is a batch: some terms would depend on which photos share one.

A new term is a class here, with sums over the pixels of a batch and the term's value from those of all processes, and
its name in TERMS. A number that it takes is an annotated attribute of the class with a default, and a field of Params
under the name of the term and its own: focal_gamma.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import UserError
from model.parallel import all_reduce_sum, differentiable_sum, exact_dtype
from model.voc import VOID

SMOOTH = 1.0


class Batch:
    """Logits x (B, C, H, W) and labels (B, H, W), and what several terms need of them.

    over_processes: the batch is shared by all processes, and this is one shard.
    """

    def __init__(self, logits: Tensor, labels: Tensor, *, over_processes: bool):
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.labels, self.over_processes = labels.long(), over_processes
        self.num_classes = logits.shape[1]
        self.valid = self.labels != VOID  # (B, H, W)
        self.pixels = self.valid.sum()
        index = self.labels.where(self.valid, 0).unsqueeze(1)
        self.at_label = self.logits.gather(1, index).squeeze(1)  # (B, H, W), x where t = 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum values (B, H, W) over the pixels that are not void."""
        return values.where(self.valid, 0).sum()

    @cached_property
    def cross_entropy(self) -> Tensor:
        """-log softmax(x) at the label, (B, H, W); not F.cross_entropy, which on CUDA has no deterministic form."""
        return self.logits.logsumexp(1) - self.at_label

    @cached_property
    def overlap(self) -> dict[str, Tensor]:
        """Sums of p = sigmoid(x) over pixels and classes: of p, and of p t."""
        return {"p": self.sum(self.logits.sigmoid().sum(1)), "p t": self.sum(self.at_label.sigmoid())}


@dataclass
class Term:
    """A term of the loss: its sums are summed over all processes, "pixels", how many are not void, is added to them.

    Each is a dataclass: what it annotates are its constants.
    """

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def value(self, sums: Mapping[str, Tensor], num_classes: int) -> Tensor:
        """Return the mean over the pixels of what "total" sums; other terms have their own formula."""
        return sums["total"] / sums["pixels"].clamp(min=1)


class BinaryCrossEntropy(Term):
    """mean(softplus(x) - x t) over pixels and classes."""

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        return {"bce": batch.sum(F.softplus(batch.logits).sum(1) - batch.at_label)}

    def value(self, sums: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return sums["bce"] / (sums["pixels"] * num_classes).clamp(min=1)


class Dice(Term):
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) (Milletari et al., arXiv 1606.04797, unsquared)."""

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        return batch.overlap

    def value(self, sums: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return _dice(sums["p t"], sums["p"] + sums["pixels"])


class InverseDice(Dice):
    """The same with 1 - p and 1 - t."""

    def value(self, sums: Mapping[str, Tensor], num_classes: int) -> Tensor:
        pixels, entries = sums["pixels"], sums["pixels"] * num_classes
        both = entries - sums["p"] - pixels + sums["p t"]  # sum (1 - p)(1 - t)
        return _dice(both, 2 * entries - sums["p"] - pixels)


class CrossEntropy(Term):
    """Mean over pixels of -log softmax(x) at the label."""

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        return {"total": batch.sum(batch.cross_entropy)}


class BalancedCrossEntropy(Term):
    """Weighted mean of the cross-entropy; a pixel of a class with n pixels in the batch weighs 1 / sqrt(n)."""

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        bins = batch.labels.where(batch.valid, batch.num_classes).flatten()
        counts = torch.zeros(batch.num_classes + 1, dtype=torch.int64, device=bins.device)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
        if batch.over_processes:
            all_reduce_sum(counts)
        balance = counts.to(exact_dtype(counts.device)).rsqrt()  # infinite where there is no pixel to weigh
        balance[batch.num_classes] = 0
        balance = balance[bins].view(batch.labels.shape).to(batch.logits.dtype)
        return {"balance": balance.sum(), "balanced": batch.sum(batch.cross_entropy * balance)}

    def value(self, sums: Mapping[str, Tensor], num_classes: int) -> Tensor:
        return sums["balanced"] / sums["balance"].clamp(min=1)


class Focal(Term):
    """Mean over pixels of (1 - q)^gamma (-log q), q = softmax(x) at the label (Lin et al., arXiv 1708.02002, eq. 4)."""

    gamma: float = 2.0  # the larger, the less well-classified pixels count

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        # 1 - q without the loss of digits, and at least where every power has a finite slope.
        wrong = (-torch.expm1(-batch.cross_entropy)).clamp(min=1e-12)
        return {"total": batch.sum(wrong.pow(self.gamma) * batch.cross_entropy)}


class Lovasz(Term):
    """A convex surrogate of 1 - IoU, mean over the classes in the labels (Berman et al., arXiv 1705.08790).

    It is no sum over pixels: each process has that of its own shard, and the loss is their mean by pixels, so the
    number of processes makes a difference. Sorts all pixels once per class, the most expensive term by far.
    """

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        valid, labels = batch.valid.flatten(), batch.labels.flatten()
        probabilities = batch.logits.softmax(1).transpose(0, 1).flatten(1)  # (C, pixels)
        losses, occurs = [], []
        for index, predicted in enumerate(probabilities):
            true = labels == index
            errors = ((true.to(predicted.dtype) - predicted).abs()).where(valid, 0)  # void: last, and without weight
            errors, order = errors.sort(descending=True)
            losses.append(errors @ _jaccard_steps(true[order]).to(errors.dtype))
            occurs.append(true.any())
        present = torch.stack(occurs)
        mean = torch.stack(losses).where(present, 0).sum() / present.sum().clamp(min=1)
        return {"total": mean * valid.sum()}


TERMS: dict[str, type[Term]] = {
    "bce": BinaryCrossEntropy,
    "dice": Dice,
    "inverse_dice": InverseDice,
    "cross_entropy": CrossEntropy,
    "balanced_cross_entropy": BalancedCrossEntropy,
    "focal": Focal,
    "lovasz": Lovasz,
}


def constants() -> dict[str, tuple[str, str]]:
    """Return the term and the field of every constant by its key, as focal_gamma."""
    return {f"{term}_{each.name}": (term, each.name) for term, kind in TERMS.items() for each in fields(kind)}


class SegmentationLoss(nn.Module):
    """Weighted sum of loss terms on logits x (B, C, H, W) and class indices (B, H, W), 255 = void.

    Terms are functions of sums over all pixels of the batch that are not void, with t the one-hot labels, p =
    sigmoid(x). t is never built: sum(x t) and sum(p t) are the values at the labels, sum t is the number of pixels. The
    sums are combined in float64, where the device has it. An all void batch gives 0 with zero gradients.

    Args:
        weights: term -> weight; terms that are left out or have weight 0 are not computed.
        over_processes: the batch is shared by all processes, each of which gives its part (of any size, also none) and
            gets the loss of the whole; gradients are to be averaged over them, see parallel.differentiable_sum.
        chosen: constants by key, as focal_gamma.
    """

    def __init__(self, weights: Mapping[str, float], *, over_processes: bool = False, **chosen: float):
        super().__init__()
        if unknown := set(weights) - set(TERMS):
            raise UserError(f"unknown loss terms {sorted(unknown)}; allowed: {', '.join(TERMS)}")
        known = constants()
        if surplus := set(chosen) - set(known):
            raise TypeError(f"no term of the loss takes {surplus}")
        self.weights = {term: float(weights[term]) for term in TERMS if weights.get(term)}
        self.terms: dict[str, Term] = {}
        for term in self.weights:
            own = {known[key][1]: float(value) for key, value in chosen.items() if known[key][0] == term}
            self.terms[term] = TERMS[term](**own)
        self.over_processes = over_processes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar. labels may have any integer dtype."""
        batch = Batch(logits, labels, over_processes=self.over_processes)
        sums = {name: {"pixels": batch.pixels} | term.sums(batch) for name, term in self.terms.items()}
        # A tensor that several terms share is one entry, with one gradient.
        distinct = {id(value): value for own in sums.values() for value in own.values()}
        values = torch.cat([value.to(exact_dtype(value.device)).flatten() for value in distinct.values()])
        values = differentiable_sum(values) if self.over_processes else values
        parts = zip(distinct.items(), values.split([value.numel() for value in distinct.values()]), strict=True)
        totals = {key: part.view(value.shape) for (key, value), part in parts}
        own = {name: {key: totals[id(value)] for key, value in of.items()} for name, of in sums.items()}
        terms = [self.weights[name] * term.value(own[name], batch.num_classes) for name, term in self.terms.items()]
        loss = sum(terms, start=values.new_zeros(()))
        return loss.to(logits.dtype if logits.dtype == torch.float64 else torch.float32)


def _dice(intersection: Tensor, total: Tensor) -> Tensor:
    return 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)


def _jaccard_steps(true: Tensor) -> Tensor:
    """By how much 1 - IoU grows when one more pixel is wrong: (pixels), float64 where the device has it.

    true says which pixels are of the class, the most wrong one first (algorithm 1 of the paper).
    """
    count = true.sum()
    hits = count - true.cumsum(0)  # in integers, for which CUDA has a deterministic sum
    union = count + (~true).cumsum(0)
    jaccard = 1 - hits.to(exact_dtype(hits.device)) / union
    return jaccard.diff(prepend=jaccard.new_zeros(1))
