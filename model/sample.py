"""The built-in data set: small scenes in VOC's layout, drawn here, the same on every machine.

Six shapes stand for six VOC classes, each with a texture of its own, on a blurred background of any colour; void
outlines as in VOC. A network from scratch learns them in a minute or two, so that everything can be tried without a
download. The scores say nothing about real photos.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from model import UserError
from model.voc import CLASS_NAMES, VOID, colour_mask

SIZES = {"train": 64, "val": 16}
SEED = 230


def draw_sample(folder: Path) -> Path:
    """Write the data set to folder unless it is there; it appears whole or not at all. Returns folder.

    Raises UserError when something else stands in its place.
    """
    if (folder / "val.txt").exists():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is not the built-in sample; remove it, or choose another --data_dir")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the built-in sample cannot be drawn in {folder.parent}: {error.strerror}") from None
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for split, count in SIZES.items():
            ids = [f"{split}_{index:03}" for index in range(count)]
            for index, id_ in enumerate(ids):
                image, mask = draw_scene(np.random.default_rng([SEED, *split.encode(), index]))
                _save(image, unfinished / "JPEGImages" / f"{id_}.jpg", quality=90)
                _save(mask, unfinished / "SegmentationClass" / f"{id_}.png")
            (unfinished / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids))
        try:
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
    pixels = _background(rng, width, height)
    labels = np.zeros((height, width), dtype=np.uint8)
    for _ in range(rng.integers(1, 4)):
        name = list(OBJECTS)[rng.integers(len(OBJECTS))]
        shape, texture = OBJECTS[name]
        side = rng.uniform(0.35, 0.6) * height
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        stencil = Image.new("L", (width, height))
        shape(
            ImageDraw.Draw(stencil),
            lambda *unit, x=left, y=top, s=side: [v * s + (x, y)[i % 2] for i, v in enumerate(unit)],
        )
        inside = np.array(stencil) > 0
        y, x = np.mgrid[:height, :width]
        colours = texture((x - left) / side, (y - top) / side) * rng.uniform(0.8, 1.2)
        pixels[inside] = colours[inside]
        outline = np.array(stencil.filter(ImageFilter.MaxFilter(3))) != np.array(
            stencil.filter(ImageFilter.MinFilter(3))
        )
        labels[inside] = CLASS_NAMES.index(name)
        labels[outline] = VOID
    pixels += rng.normal(0, 8, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))
    return image, colour_mask(labels)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    coarse = rng.uniform(40, 200, (3, 4, 3)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def _save(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


# Shapes are drawn white into a stencil; at() places coordinates of the unit square x, y, x, y, ... in the scene.
def _aeroplane(draw, at):
    draw.polygon(
        at(0.5, 0.0, 0.58, 0.35, 1.0, 0.6, 0.58, 0.6, 0.7, 1.0, 0.3, 1.0, 0.42, 0.6, 0.0, 0.6, 0.42, 0.35), fill=255
    )


def _bottle(draw, at):
    draw.rectangle(at(0.42, 0.0, 0.58, 0.4), fill=255)
    draw.rounded_rectangle(at(0.3, 0.3, 0.7, 1.0), radius=4, fill=255)


def _bus(draw, at):
    draw.rounded_rectangle(at(0.0, 0.2, 1.0, 0.8), radius=3, fill=255)
    for x in (0.15, 0.65):
        draw.ellipse(at(x, 0.68, x + 0.2, 0.9), fill=255)


def _cat(draw, at):
    draw.ellipse(at(0.1, 0.25, 0.9, 1.0), fill=255)
    for x in (0.12, 0.58):
        draw.polygon(at(x, 0.5, x + 0.06, 0.0, x + 0.3, 0.35), fill=255)


def _sheep(draw, at):
    for x, y in ((0.0, 0.25), (0.25, 0.15), (0.5, 0.25), (0.15, 0.4), (0.4, 0.4)):
        draw.ellipse(at(x, y, x + 0.5, y + 0.45), fill=255)


def _tvmonitor(draw, at):
    draw.rectangle(at(0.0, 0.1, 1.0, 0.8), fill=255)
    draw.rectangle(at(0.35, 0.8, 0.65, 0.95), fill=255)


def _two_colours(first: tuple, second: tuple, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], np.array(first, dtype=float), np.array(second, dtype=float))


# Textures: unit coordinates of the object -> float (H, W, 3) in 0-255.
def _stripes(x, y):
    return _two_colours((225, 230, 240), (120, 130, 165), np.sin(25 * y) > -0.3)


def _gloss(x, y):
    return np.array([20, 110, 50.0]) + 120 * np.exp(-(((x - 0.42) / 0.06) ** 2))[..., None]


def _windows(x, y):
    return _two_colours((225, 235, 140), (190, 40, 30), (y > 0.3) & (y < 0.5) & (np.sin(32 * x) > -0.2))


def _fur(x, y):
    return _two_colours((225, 140, 50), (150, 80, 25), np.sin(30 * (x + 0.4 * y)) > 0)


def _wool(x, y):
    return _two_colours((250, 245, 230), (190, 180, 165), np.sin(28 * x) * np.sin(28 * y) > -0.4)


def _screen(x, y):
    rings = np.sin(40 * np.hypot(x - 0.5, y - 0.45)) > 0
    colours = _two_colours((70, 120, 250), (30, 40, 110), rings)
    frame = (abs(x - 0.5) > 0.43) | (abs(y - 0.45) > 0.28)
    return np.where(frame[..., None], 25.0, colours)


OBJECTS = {
    "aeroplane": (_aeroplane, _stripes),
    "bottle": (_bottle, _gloss),
    "bus": (_bus, _windows),
    "cat": (_cat, _fur),
    "sheep": (_sheep, _wool),
    "tvmonitor": (_tvmonitor, _screen),
}
