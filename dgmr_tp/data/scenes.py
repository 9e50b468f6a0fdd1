"""Generated scenes with captions: the images of the quickstart, of the tests and of the demo CLIP.

A scene is one object (shape, color, size, texture, position) on a background with clutter. Scene ``index`` of seed
``seed`` is the same image on every machine, so that nothing has to be downloaded or stored. This module does not know
models. It needs numpy, and pillow to write files.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

COLORS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.94, 0.88, 0.16),
    "green": (0.14, 0.66, 0.22),
    "cyan": (0.12, 0.76, 0.82),
    "blue": (0.14, 0.26, 0.86),
    "purple": (0.52, 0.16, 0.72),
    "pink": (0.96, 0.52, 0.74),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "crescent")
SIZES = {"small": 8.0, "medium": 11.0, "large": 15.5}
"""Radius, pixels of an image of 64 × 64."""
TEXTURES = ("solid", "striped", "dotted", "checked")
ROWS = {"top": 0.25, "middle": 0.5, "bottom": 0.75}
# The demo CLIP was trained on captions with this spelling of "centre".
COLUMNS = {"left": 0.25, "centre": 0.5, "right": 0.75}
BACKGROUNDS = ("plain", "grainy", "shaded")

CLASSNAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
TEMPLATES = ("a {c}", "a photo of a {c}", "a picture of a {c}")


@dataclass(frozen=True)
class Scene:
    """Attributes that a caption can name. Everything else in the image is drawn from ``seed`` and ``index``."""

    seed: int
    index: int
    color: str
    shape: str
    size: str
    texture: str
    row: str
    column: str
    background: str

    @classmethod
    def draw(cls, seed: int, index: int) -> Scene:
        """Draw scene ``index`` of the endless series ``seed``."""
        rng = np.random.default_rng((seed, index, 0))
        pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
        return cls(
            seed,
            index,
            pick(tuple(COLORS)),
            pick(SHAPES),
            pick(tuple(SIZES)),
            pick(TEXTURES),
            pick(tuple(ROWS)),
            pick(tuple(COLUMNS)),
            pick(BACKGROUNDS),
        )

    @property
    def label(self) -> int:
        """Class of the scene: an index into :data:`CLASSNAMES`."""
        return CLASSNAMES.index(f"{self.color} {self.shape}")

    @property
    def caption(self) -> str:
        """Caption that names all attributes."""
        place = {("middle", "centre"): "in the centre"}.get((self.row, self.column), f"at the {self.row} {self.column}")
        return f"a {self.size} {self.texture} {self.color} {self.shape} {place} on a {self.background} background"

    def image(self, pixels: int = 64) -> np.ndarray:
        """Render the scene, uint8 ``[pixels, pixels, 3]``."""
        rng = np.random.default_rng((self.seed, self.index, 1))
        scale = pixels / 64
        y, x = np.mgrid[0:pixels, 0:pixels].astype(np.float32) + 0.5
        canvas = _background(self.background, x / pixels, y / pixels, rng)
        for _ in range(rng.integers(5, 12)):
            _draw_clutter(canvas, x, y, scale, rng)

        radius = SIZES[self.size] * scale * rng.uniform(0.92, 1.08)
        center_x = pixels * COLUMNS[self.column] + scale * rng.uniform(-4, 4)
        center_y = pixels * ROWS[self.row] + scale * rng.uniform(-4, 4)
        turn = rng.uniform(-0.2, 0.2)
        u, v = (x - center_x) / radius, (y - center_y) / radius
        u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)

        inside = np.clip(0.5 - _distance(self.shape, u, v) * radius, 0, 1)[..., None]
        color = np.clip(np.array(COLORS[self.color]) * rng.uniform(0.75, 1.05) + rng.normal(0, 0.035, 3), 0, 1)
        ink = _texture(self.texture, u * radius / scale, v * radius / scale, rng)[..., None]
        body = color * (1 - 0.62 * ink)
        canvas = canvas * (1 - inside) + body * inside
        canvas += rng.normal(0, rng.uniform(0.02, 0.07), canvas.shape)
        return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)


def _background(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    base = rng.uniform(0.12, 0.62) + rng.normal(0, 0.05, 3)
    canvas = np.broadcast_to(base, (*x.shape, 3)).copy()
    if kind == "grainy":
        cells = rng.normal(0, 0.13, (x.shape[0] // 2 + 1, x.shape[1] // 2 + 1, 1))
        canvas += cells.repeat(2, 0).repeat(2, 1)[: x.shape[0], : x.shape[1]]
    elif kind == "shaded":
        angle = rng.uniform(0, 2 * np.pi)
        canvas += (0.55 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)))[..., None]
    return canvas


def _draw_clutter(canvas: np.ndarray, x: np.ndarray, y: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """Draw a short bar or blob in any color of the palette, so that color alone does not show where the object is."""
    angle, length, width = rng.uniform(0, np.pi), rng.uniform(0, 4.5) * scale, rng.uniform(0.8, 1.9) * scale
    dx, dy = x - rng.uniform(0, canvas.shape[1]), y - rng.uniform(0, canvas.shape[0])
    along = np.clip(dx * np.cos(angle) + dy * np.sin(angle), -length, length)
    distance = np.hypot(dx - along * np.cos(angle), dy - along * np.sin(angle)) - width
    mask = np.clip(0.5 - distance, 0, 1)[..., None]
    color = np.array(list(COLORS.values())[rng.integers(len(COLORS))]) * rng.uniform(0.6, 1.0)
    canvas += mask * (color - canvas)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the signed distance to a shape of radius about 1, negative inside. It is exact only near the outline."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.84
    if shape == "diamond":
        return (abs(u) * 1.25 + abs(v) * 0.85) / 1.5 - 0.64
    if shape == "triangle":
        return np.maximum(0.87 * abs(u) + 0.5 * v, -v) - 0.52 + 0.12 * (v > 1)
    if shape == "cross":
        return np.minimum(
            np.maximum(abs(u) - 0.32, abs(v) - 0.98),
            np.maximum(abs(v) - 0.32, abs(u) - 0.98),
        )
    if shape == "ring":
        return abs(np.hypot(u, v) - 0.72) - 0.24
    if shape == "crescent":
        return np.maximum(np.hypot(u, v) - 0.98, 0.78 - np.hypot(u - 0.45, v))
    if shape == "star":
        angle = np.arctan2(u, -v)
        wave = abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 1 on a tip, 0 in a notch
        return (np.hypot(u, v) - (0.42 + 0.66 * wave)) * 0.6
    raise ValueError(f"unknown shape {shape!r}. Use one of {', '.join(SHAPES)}.")


def _texture(kind: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how much darker the object is at each point, 0 to 1. ``u`` and ``v`` are in 64ths of the image."""
    if kind == "solid":
        return np.zeros_like(u)
    du, dv = rng.uniform(0, 6, 2)
    if kind == "striped":
        return _wave(u + v, 6.0, du)
    if kind == "checked":
        a, b = _wave(u, 7.5, du), _wave(v, 7.5, dv)
        return a * (1 - b) + b * (1 - a)
    a, b = (u + du) % 5.5 - 2.75, (v + dv) % 5.5 - 2.75
    return np.clip(2.1 - np.hypot(a, b), 0, 1)


def _wave(t: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.clip(0.5 + 1.6 * np.sin(2 * np.pi * (t + phase) / period), 0, 1)


def distinct(scenes: Iterable[Scene]) -> Iterator[Scene]:
    """Yield the scenes whose caption did not occur before."""
    captions: set[str] = set()
    for scene in scenes:
        if scene.caption not in captions:
            captions.add(scene.caption)
            yield scene


def write_classification(directory: Path, count: int, seed: int) -> None:
    """Write ``count`` labeled scenes in clip_benchmark's webdataset layout. Not every class has to occur."""
    directory.mkdir(parents=True)
    (directory / "classnames.txt").write_text("\n".join(CLASSNAMES) + "\n", "utf-8")
    (directory / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n", "utf-8")
    scenes = (Scene.draw(seed, i) for i in range(count))
    _write_shard(directory, ((scene, "cls", str(scene.label)) for scene in scenes))


def write_retrieval(directory: Path, count: int, seed: int) -> None:
    """Write ``count`` scenes with different captions in clip_benchmark's webdataset layout for retrieval."""
    directory.mkdir(parents=True)
    (directory / "dataset_type.txt").write_text("retrieval\n", "utf-8")
    scenes = distinct(Scene.draw(seed, i) for i in range(10 * count))
    _write_shard(directory, ((scene, "txt", scene.caption) for scene in islice(scenes, count)))


def _write_shard(directory: Path, samples: Iterable[tuple[Scene, str, str]]) -> None:
    (directory / "test").mkdir()
    (directory / "test" / "nshards.txt").write_text("1\n", "utf-8")
    with tarfile.open(directory / "test" / "0.tar", "w") as tar:
        for scene, ending, target in samples:
            for extension, payload in (("png", _png(scene)), (ending, target.encode())):
                member = tarfile.TarInfo(f"{scene.index:06d}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))


def _png(scene: Scene) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(scene.image()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
