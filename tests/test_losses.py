import runpy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from model import UserError, losses
from model.losses import TERMS, SegmentationLoss, Term, constants
from params import Params

DEFAULT = {"bce": 0.4, "dice": 0.4, "inverse_dice": 0.2}


def naive(logits: torch.Tensor, labels: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    """The definitions, written out on a one-hot tensor, pixel after pixel."""
    x, t = [], []
    for b, h, w in (labels != 255).nonzero().tolist():
        x.append(logits[b, :, h, w])
        t.append(F.one_hot(labels[b, h, w].long(), logits.shape[1]).double())
    x, t = torch.stack(x), torch.stack(t)
    p = 1 / (1 + torch.exp(-x))

    def dice(a, b):
        return 1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1)

    cross_entropy = -(t * torch.log(torch.exp(x) / torch.exp(x).sum(1, keepdim=True))).sum(1)
    balance = torch.stack([1 / t[:, one.argmax()].sum().sqrt() for one in t])
    terms = {
        "bce": -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean(),
        "dice": dice(p, t),
        "inverse_dice": dice(1 - p, 1 - t),
        "cross_entropy": cross_entropy.mean(),
        "balanced_cross_entropy": (cross_entropy * balance).sum() / balance.sum(),
        "focal": ((1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy).mean(),
        "lovasz": naive_lovasz(torch.exp(x) / torch.exp(x).sum(1, keepdim=True), t),
    }
    return sum(weight * terms[name] for name, weight in weights.items())


def naive_lovasz(probabilities: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The Lovász extension of the Jaccard loss of each class that occurs, set by set (Berman et al., eq. 9)."""
    losses = []
    for c in t.sum(0).nonzero().flatten().tolist():
        errors = (t[:, c] - probabilities[:, c]).abs()
        true = set(t[:, c].nonzero().flatten().tolist())
        wrong: set[int] = set()
        loss, before = 0.0, 0.0
        for pixel in errors.argsort(descending=True).tolist():
            wrong.add(pixel)
            jaccard = len(wrong) / len(wrong | true)  # of the wrong pixels: 1 - IoU of the prediction that they make
            loss, before = loss + errors[pixel] * (jaccard - before), jaccard
        losses.append(loss)
    return torch.stack(losses).mean()


def example(seed: int, void: float, shape=(2, 5, 6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = 255
    labels[0, 0, 0] = 0  # the naive formula needs one pixel
    return logits, labels


@pytest.mark.parametrize("weights", [DEFAULT, *({term: 1.0} for term in TERMS), {**DEFAULT, "cross_entropy": 2}])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), void=st.sampled_from([0.0, 0.2, 0.9]))
def test_value_and_gradient_equal_the_naive_formula(weights, seed, void):
    logits, labels = example(seed, void)
    ours, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = SegmentationLoss(weights)(ours, labels.to(torch.uint8)), naive(reference, labels, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-12)


def test_void_pixels_change_nothing_and_get_no_gradient():
    logits, labels = example(1, void=0.3)
    other = logits.clone()
    other.permute(0, 2, 3, 1)[labels == 255] = 1e4
    other.requires_grad_()
    criterion = SegmentationLoss(dict.fromkeys(TERMS, 1.0))
    loss = criterion(other, labels)
    torch.testing.assert_close(loss, criterion(logits, labels))
    loss.backward()
    assert other.grad.permute(0, 2, 3, 1)[labels == 255].abs().max() == 0
    assert other.grad.permute(0, 2, 3, 1)[labels != 255].abs().min() > 0


def test_a_batch_of_void_gives_zero_and_finite_gradients():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = SegmentationLoss(dict.fromkeys(TERMS, 1.0))(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = example(2, void=0.1, shape=(2, 21, 96, 96))  # 65,000 pixels: sums far beyond float16's range
    logits = logits.to(dtype)
    loss = SegmentationLoss(DEFAULT)(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), SegmentationLoss(DEFAULT)(logits.double(), labels), rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite():
    logits = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).requires_grad_()
    loss = SegmentationLoss(dict.fromkeys(TERMS, 1.0))(logits, torch.zeros(1, 1, 1))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_a_right_answer_costs_less_than_a_wrong_one_for_every_term():
    right = torch.tensor([5.0, -5.0]).view(1, 2, 1, 1)
    for term in TERMS:
        criterion = SegmentationLoss({term: 1.0})
        assert criterion(right, torch.zeros(1, 1, 1)) < criterion(-right, torch.zeros(1, 1, 1))


def test_balanced_cross_entropy_gives_a_rare_class_the_square_root_of_its_odds():
    logits, labels = torch.zeros(1, 2, 10, 10, requires_grad=True), torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0, 0, :4] = 1  # 4 pixels against 96
    SegmentationLoss({"balanced_cross_entropy": 1.0})(logits, labels).backward()
    rare, common = (logits.grad[0, label][labels[0] == label].sum() for label in (1, 0))
    torch.testing.assert_close(rare / common, torch.tensor((4 / 96) ** 0.5))


def test_an_unknown_term_is_refused():
    with pytest.raises(UserError, match=r"no_such_term.*allowed: bce"):
        SegmentationLoss({"no_such_term": 1.0})


def test_every_constant_of_a_term_is_a_key_of_params_json_that_reaches_it():
    for key, (term, name) in constants().items():
        changed = SegmentationLoss(**Params(loss_weights={term: 1.0}, **{key: 3.5}).loss_options())
        assert getattr(changed.terms[term], name) == 3.5
        assert getattr(Params(), key) == getattr(TERMS[term], name) and Params.fault(key, "x")
    assert Params.fault("focal_gamma", 1e9)
    with pytest.raises(TypeError, match="focal_gama"):
        SegmentationLoss({"focal": 1.0}, focal_gama=3)


class Tversky(Term):
    """1 - sum(p t) / (sum(p t) + alpha sum(p (1 - t)) + beta sum((1 - p) t)); its sums are called as those of Focal."""

    alpha: float = 0.5  # of what is predicted and wrong
    gamma: float = 0.5  # of what is missed

    def sums(self, batch):
        return {"total": batch.overlap["p t"], "p": batch.overlap["p"]}

    def value(self, sums, num_classes):
        hits, wrong, missed = sums["total"], sums["p"] - sums["total"], sums["pixels"] - sums["total"]
        return 1 - (hits + 1) / (hits + self.alpha * wrong + self.gamma * missed + 1)


def test_a_term_may_begin_with_the_name_of_another_and_its_sums_and_constants_are_its_own(monkeypatch):
    logits, labels = example(4, void=0.1)
    alone = SegmentationLoss({"focal": 1.0}, focal_gamma=3)(logits, labels)
    assert (before := {*constants()}) >= {"focal_gamma"}
    monkeypatch.setitem(TERMS, "focal_tversky", Tversky)
    assert {*constants()} - before == {"focal_tversky_alpha", "focal_tversky_gamma"}
    chosen = {"focal_gamma": 3, "focal_tversky_alpha": 0.3, "focal_tversky_gamma": 0.7}
    both = SegmentationLoss({"focal": 1.0, "focal_tversky": 2.0}, **chosen)
    assert both.terms["focal_tversky"] == Tversky(0.3, 0.7)
    p, t = logits.sigmoid(), F.one_hot(labels.where(labels != 255, 0), 5).permute(0, 3, 1, 2)
    valid = (labels != 255).unsqueeze(1)
    hits, wrong, missed = ((part * valid).sum() for part in (p * t, p * (1 - t), (1 - p) * t))
    expected = 1 - (hits + 1) / (hits + 0.3 * wrong + 0.7 * missed + 1)
    torch.testing.assert_close(both(logits, labels), alone + 2 * expected)


def test_a_constant_that_params_lacks_is_an_error_at_import(monkeypatch):
    monkeypatch.setitem(losses.TERMS, "new", Tversky)
    with pytest.raises(TypeError, match=r"Params lacks \['new_alpha', 'new_gamma'\], .*add a line for each"):
        runpy.run_path(str(ROOT / "params.py"))


def test_focal_with_gamma_0_is_the_cross_entropy():
    logits, labels = example(3, void=0.1)
    focal = SegmentationLoss({"focal": 1.0}, focal_gamma=0)(logits, labels)
    torch.testing.assert_close(focal, SegmentationLoss({"cross_entropy": 1.0})(logits, labels))


def test_lovasz_of_a_hard_prediction_is_one_minus_the_mean_iou():
    labels = torch.tensor([[[0, 0, 0, 1], [1, 1, 2, 255]]])
    predictions = torch.tensor([[[0, 0, 1, 1], [1, 2, 2, 0]]])
    logits = 100 * F.one_hot(predictions, 4).permute(0, 3, 1, 2).double()
    loss = SegmentationLoss({"lovasz": 1.0})(logits, labels)
    assert loss.item() == pytest.approx(1 - (2 / 3 + 2 / 4 + 1 / 2) / 3)
