"""The built-in data set: small scenes in VOC's layout, drawn here, the same on every machine.

Six shapes stand for six VOC classes, each with a texture of its own, on a blurred background of any colour; void
outlines as in VOC. A network from scratch learns them in a minute or two, so that everything can be tried without a
download. The scores say nothing about real photos.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from model import UserError
from model.voc import CLASS_NAMES, VOID, colour_mask

SIZES = {"train": 64, "val": 16}
SEED = 230


def draw_sample(folder: Path) -> Path:
    """Write the data set to folder unless it is there; it appears whole or not at all. Returns folder."""
    if (folder / "val.txt").exists():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is not the built-in sample; remove it, or choose another --data_dir")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    images, masks = unfinished / "JPEGImages", unfinished / "SegmentationClass"
    try:
        for part in (images, masks):
            part.mkdir(parents=True)
        for split, count in SIZES.items():
            ids = [f"{split}_{index:03}" for index in range(count)]
            for index, id_ in enumerate(ids):
                image, mask = draw_scene(np.random.default_rng([SEED, *split.encode(), index]))
                image.save(images / f"{id_}.jpg", quality=90)
                mask.save(masks / f"{id_}.png")
            (unfinished / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw a photo (RGB, about 128 x 112 pixels) of one to three objects, and its mask (palette image of indices)."""
    width, height = (int(side) for side in rng.integers((112, 96), (144, 128)))
    coarse = Image.fromarray(rng.uniform(40, 200, (3, 4, 3)).astype(np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    labels = np.zeros((height, width), dtype=np.uint8)
    for _ in range(rng.integers(1, 4)):
        name = list(OBJECTS)[rng.integers(len(OBJECTS))]
        parts, texture = OBJECTS[name]
        side = rng.uniform(0.35, 0.6) * height
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        stencil = Image.new("L", (width, height))
        for kind, unit, options in parts:
            points = [value * side + (left, top)[index % 2] for index, value in enumerate(unit)]
            getattr(ImageDraw.Draw(stencil), kind)(points, fill=255, **options)
        inside = np.array(stencil) > 0
        y, x = np.mgrid[:height, :width]
        colours = texture((x - left) / side, (y - top) / side) * rng.uniform(0.8, 1.2)
        pixels[inside] = colours[inside]
        larger, smaller = (np.array(stencil.filter(kind(3))) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        labels[inside] = CLASS_NAMES.index(name)
        labels[larger != smaller] = VOID
    pixels += rng.normal(0, 8, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))
    return image, colour_mask(labels)


def _two_colours(first: tuple, second: tuple, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], np.array(first, dtype=float), np.array(second, dtype=float))


def _gloss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([20, 110, 50.0]) + 120 * np.exp(-(((x - 0.42) / 0.06) ** 2))[..., None]


def _screen(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rings = np.sin(40 * np.hypot(x - 0.5, y - 0.45)) > 0
    frame = (abs(x - 0.5) > 0.43) | (abs(y - 0.45) > 0.28)
    return np.where(frame[..., None], 25.0, _two_colours((70, 120, 250), (30, 40, 110), rings))


WINGS = (0.5, 0.0, 0.58, 0.35, 1.0, 0.6, 0.58, 0.6, 0.7, 1.0, 0.3, 1.0, 0.42, 0.6, 0.0, 0.6, 0.42, 0.35)
WOOL = ((0.0, 0.25), (0.25, 0.15), (0.5, 0.25), (0.15, 0.4), (0.4, 0.4))

# Each class: its parts, methods of ImageDraw with x, y, x, y, ... in the unit square and options; and its texture, from
# unit coordinates to float (H, W, 3) in 0-255.
OBJECTS: dict[str, tuple[list[tuple[str, tuple, dict]], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "aeroplane": (
        [("polygon", WINGS, {})],
        lambda x, y: _two_colours((225, 230, 240), (120, 130, 165), np.sin(25 * y) > -0.3),
    ),
    "bottle": (
        [("rectangle", (0.42, 0.0, 0.58, 0.4), {}), ("rounded_rectangle", (0.3, 0.3, 0.7, 1.0), {"radius": 4})],
        _gloss,
    ),
    "bus": (
        [("rounded_rectangle", (0.0, 0.2, 1.0, 0.8), {"radius": 3})]
        + [("ellipse", (x, 0.68, x + 0.2, 0.9), {}) for x in (0.15, 0.65)],
        lambda x, y: _two_colours((225, 235, 140), (190, 40, 30), (y > 0.3) & (y < 0.5) & (np.sin(32 * x) > -0.2)),
    ),
    "cat": (
        [("ellipse", (0.1, 0.25, 0.9, 1.0), {})]
        + [("polygon", (x, 0.5, x + 0.06, 0.0, x + 0.3, 0.35), {}) for x in (0.12, 0.58)],
        lambda x, y: _two_colours((225, 140, 50), (150, 80, 25), np.sin(30 * (x + 0.4 * y)) > 0),
    ),
    "sheep": (
        [("ellipse", (x, y, x + 0.5, y + 0.45), {}) for x, y in WOOL],
        lambda x, y: _two_colours((250, 245, 230), (190, 180, 165), np.sin(28 * x) * np.sin(28 * y) > -0.4),
    ),
    "tvmonitor": ([("rectangle", (0.0, 0.1, 1.0, 0.8), {}), ("rectangle", (0.35, 0.8, 0.65, 0.95), {})], _screen),
}
