"""A batch more makes the host wait for the GPU no more often, but where save_summary_steps says so.

Seen here without a GPU, on the meta device, whose tensors have a shape and no values: whoever reads one waits. The
tests marked gpu ask CUDA itself.
"""

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.evaluation import evaluate
from engine.training import Training
from model import parallel
from model.inference import Segmenter
from model.losses import TERMS
from model.net import FCN_GCN
from model.transforms import IMAGENET_MEAN, IMAGENET_STD, PADDING, _colour, _times_255
from model.voc import CLASS_NAMES
from params import Params
from train import train_epoch

META = torch.device("meta")
READS = {"item": 1, "is_nonzero": True, "_local_scalar_dense": 1, "nonzero": torch.empty(0, 1, dtype=torch.long)}


class Waits(TorchDispatchMode):
    """Lists the operations that wait for the device, and gives some value to those that read one from it."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        if name in READS and on_device:
            self.seen.append(name)
            return READS[name]
        to_host = name in ("to", "_to_copy") and on_device and torch.device(given.get("device") or META) != META
        result = torch.zeros(tensors[0].shape, dtype=tensors[0].dtype) if to_host else function(*args, **kwargs)
        if name in ("to", "_to_copy", "copy_") and not given.get("non_blocking"):
            self.seen += [name] * (len({tensor.is_meta for tensor in [*tensors, result]}) > 1)
        return result


class Batches(list):
    """Images, labels and seeds, such as a loader gives."""

    class_names = CLASS_NAMES

    def __init__(self, count: int):
        images, labels = (torch.zeros(2, *shape, 32, 32, dtype=torch.uint8) for shape in ((3,), ()))
        batch = images, labels, torch.arange(2)
        super().__init__([batch] * count)

    @property
    def dataset(self):
        return self

    @property
    def batch_sampler(self):
        return self

    @property
    def sizes(self):
        return [len(images) for images, *_ in self]


def on_device(training: Training) -> None:
    """Let a training be on the device, without a number."""
    training.device = META
    training.model.to(META)
    training.eval_model.to(META)
    for group in training.optimizer.param_groups:  # the fused kernel is unknown to this device
        group |= {"params": list(training.model.parameters()), "fused": False, "foreach": True}
    _times_255(IMAGENET_MEAN, META), _times_255(IMAGENET_STD, META), _colour(PADDING, META)  # which stay there


@pytest.mark.parametrize(
    "options",
    [
        {"clip_grad_norm": 1.0, "ema_decay": 0.9, "dropout_rate": 0.1, "loss_weights": dict.fromkeys(TERMS, 1.0)},
        {"accumulation_steps": 2, "schedule": "poly", "optimizer": "adamw", "augment": True, "cutmix": 0.5},
    ],
    ids=str,
)
def test_waits_do_not_grow_with_the_number_of_batches(options):
    training = Training(FCN_GCN(encoder="resnet18", pretrained=False), Params(**TINY | options), 10)
    on_device(training)
    seen = {}
    for count in (1, 3):
        with Waits() as waits:
            train_epoch(training, Batches(count))
            evaluate(training.eval_model, Batches(count), training.params, META)
        seen[count] = waits.seen
    assert training.optimizer.state
    assert seen[3] == seen[1]
    assert seen[1]  # losses and metrics are read at the end


class WithoutFloat64(TorchDispatchMode):
    """Fails on any float64 on the device, as devices do that have none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((result, args, kwargs)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64), function
        return result


def test_no_float64_comes_to_a_device_that_has_none(monkeypatch):
    monkeypatch.setattr(parallel, "WITHOUT_FLOAT64", {"meta"})
    terms = dict.fromkeys(TERMS, 1.0)
    training = Training(
        FCN_GCN(encoder="resnet18", pretrained=False),
        Params(**TINY, augment=True, cutmix=0.5, ema_decay=0.9, loss_weights=terms),
        10,
    )
    on_device(training)
    with WithoutFloat64(), Waits():
        train_epoch(training, Batches(1))
        evaluate(training.eval_model, Batches(1), training.params, META)
        segmenter = Segmenter(
            training.eval_model, META, image_size=32, resize="letterbox", scales=(1.0, 1.5), flip=True
        )
        for tile in (None, 32):
            assert segmenter.segment(Image.new("RGB", (50, 40)), tile=tile).shape == (40, 50)
