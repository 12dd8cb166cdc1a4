"""From a decoded photo to what the network reads, and the joint augmentation of photo and mask."""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from model.voc import VOID

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def squash(image: Image.Image, mask: Image.Image | None, image_size: int) -> tuple[Image.Image, Image.Image | None]:
    """Resize to a square, aspect ratio given up: the photo bilinear (area-averaged when shrunk), the mask NEAREST."""
    size = (image_size, image_size)
    image = image.resize(size, Image.Resampling.BILINEAR)
    return image, None if mask is None else mask.resize(size, Image.Resampling.NEAREST)


@cache
def resize_tag(image_size: int) -> str:
    """Return a digest of what squash() makes of noise, so that a cache of photos resized in another way has another."""
    rng = np.random.default_rng(0)
    photo, mask = (Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((37, 53, 3), (37, 53)))
    parts = [np.array(part).tobytes() for part in squash(photo, mask, image_size)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def squashed(photos: Sequence[Image.Image], sizes: Sequence[int]) -> list[Tensor]:
    """For every size S the photos as one uint8 (B, 3, S, S)."""
    return [torch.stack([pil_to_tensor(squash(photo, None, size)[0]) for photo in photos]) for size in sizes]


def to_input(
    images: Tensor, device: torch.device | str, *, normalize: bool = True, channels_last: bool = True
) -> Tensor:
    """Turn uint8 (B, 3, H, W) into float32 on device, in [0, 1]; normalize: with ImageNet's mean and deviation."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
    mean, std = _mean_and_deviation(x.device, normalize)
    return x.sub_(mean).div_(std)


def mean_and_deviation(normalize: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what values in [0, 1] are normalized with, per channel; zeros and ones where they stay as they are."""
    return (IMAGENET_MEAN, IMAGENET_STD) if normalize else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@cache  # on a GPU: to send them anew would make the host wait at every step
def _mean_and_deviation(device: torch.device, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return float32 (3, 1, 1) of values in [0, 255]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_deviation(normalize))
    return (255 * mean).to(device), (255 * std).to(device)


class Augmentation:
    """Random resized crop of 0.5-2x, flip and colour jitter, the same for photo and mask.

    The photo is scaled, then a window of the original size is cut out of it; where it has become smaller than the
    window it is padded with the mean colour, and the mask with void. Masks are resampled NEAREST.
    """

    def __init__(self, image_size: int):
        mean_colour = [round(255 * value) for value in IMAGENET_MEAN]
        fill = {tv_tensors.Image: mean_colour, tv_tensors.Mask: VOID}
        self._transform = v2.Compose(
            [
                v2.ScaleJitter((image_size, image_size), scale_range=(0.5, 2.0)),
                v2.RandomCrop((image_size, image_size), pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
            ]
        )

    def __call__(self, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Transform uint8 (3, S, S) and (S, S); equal seeds give equal results, and the global RNG stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU's too, for good
            image, mask = self._transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)
