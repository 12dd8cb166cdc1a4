"""The original recipe, to measure against: fp32, NCHW, one-hot targets filled pixel by pixel.

Written from its description, as plainly as such code usually is; nothing here is slowed down on purpose.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from model.net import FCN_GCN

CLASSES = 21
VOID = 255


def load(photo: Path, mask: Path, size: int) -> tuple[Tensor, Tensor]:
    """A photo as float (3, S, S) in [0, 1] and its mask as one-hot float (21, S, S), void counted as background."""
    image = TF.to_tensor(Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    indices = Image.open(mask).resize((size, size), Image.Resampling.NEAREST).load()
    target = np.zeros((CLASSES, size, size), dtype=np.float32)
    for y in range(size):
        for x in range(size):
            index = indices[x, y]
            target[0 if index == VOID else index, y, x] = 1
    return image, torch.from_numpy(target)


def network() -> nn.Module:
    """The same network, of PyTorch's own convolutions alone."""
    model = FCN_GCN(pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return model


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """0.4 BCE + 0.4 dice + 0.2 inverse dice, each on its own."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    p = torch.sigmoid(logits)
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    q, inverse = 1 - torch.sigmoid(logits), 1 - target
    inverse_dice = 1 - (2 * (q * inverse).sum() + 1) / (q.sum() + inverse.sum() + 1)
    return 0.4 * bce + 0.4 * dice + 0.2 * inverse_dice


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.99, weight_decay=0.0005, foreach=False, fused=False)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor) -> float:
    value = loss(model(images), target)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()
