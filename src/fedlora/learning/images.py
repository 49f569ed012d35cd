"""Image classification without an image library in the loop: pixels stay uint8, batches are resized and normalised."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.errors import UserError
from fedlora.learning.examples import SLICE, Examples, Inputs, Totals, class_indices, class_scores, require

Array = np.ndarray[Any, Any]
PATCH = 256
"""Pixels that count as one token where passes are filled by tokens."""


@dataclass(frozen=True)
class Pixels:
    """How a model wants its images: of ``size`` (height, width; None: as they are), (x * scale - mean) / std."""

    size: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    mode: str = "bicubic"

    def __call__(self, pixels: Tensor) -> Tensor:
        """(images, height, width, channels) uint8 to (images, channels, height, width) float32."""
        x = pixels.permute(0, 3, 1, 2).float()
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = functional.interpolate(x, self.size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 255)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x * self.scale - mean) / std

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``preprocessor_config.json``."""
        settings: dict[str, Any] = {
            "do_resize": self.size is not None,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": 3 if self.mode == "bicubic" else 2,
        }
        if self.size is not None:
            settings["size"] = {"height": self.size[0], "width": self.size[1]}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_processor(folder: str) -> Pixels:
    """From a model's ``preprocessor_config.json``."""
    try:
        path = Path(folder) / "preprocessor_config.json"
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(folder, "preprocessor_config.json"))
        settings: Mapping[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no preprocessor_config.json beside the model ({error})", "save it there") from error
    size: Any = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size") or {}
    edges = (size, size) if isinstance(size, int) else (size.get("height"), size.get("width"))
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    height, width = (edges[0] or edge, edges[1] or edge)
    normal = settings.get("do_normalize", True)
    return Pixels(
        (int(height), int(width)) if height and width else None,
        float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
        tuple(settings.get("image_mean", (0.5, 0.5, 0.5))) if normal else (0.0,),
        tuple(settings.get("image_std", (0.5, 0.5, 0.5))) if normal else (1.0,),
        "bicubic" if settings.get("resample", 3) == 3 else "bilinear",
    )


@dataclass(frozen=True)
class ImageClassification:
    """One label for one image (a ``datasets`` image column, or arrays of height x width [x channels], 0 to 255)."""

    labels: tuple[str, ...]
    image: str = "image"
    label: str = "label"
    pixels: Pixels = Pixels()

    @property
    def metric(self) -> tuple[str, bool]:
        return "accuracy", True

    def encode(self, table: Any, processor: Any) -> Examples:
        require(table, (self.image, self.label))
        stored = _one_size(map(_array, _decoded(table, self.image)), self._pixels(processor))
        height, width = self._pixels(processor).size or stored.shape[1:3]
        return Examples(
            lengths=np.full(len(stored), max(1, height * width // PATCH), dtype=np.int64),
            labels=class_indices(table, self.label, self.labels),
            rows=np.arange(len(stored) + 1),
            pixels=stored,
            prepare=self._pixels(processor),
        )

    def collate(self, examples: Examples, units: Array) -> tuple[Inputs, Tensor]:
        assert examples.pixels is not None
        assert examples.prepare is not None
        pixels = examples.prepare(torch.from_numpy(examples.pixels[units]))
        return {"pixel_values": pixels}, torch.from_numpy(examples.labels[units])

    def score(self, logits: Tensor, labels: Tensor, examples: Examples, units: Array) -> Totals:
        return class_scores(logits, labels)

    def _pixels(self, processor: Any) -> Pixels:
        return processor if isinstance(processor, Pixels) else self.pixels


def _decoded(table: Any, column: str) -> Iterator[Any]:
    """Every row's image. Raises `UserError` that names the first that cannot be decoded."""
    for start in range(0, len(table), SLICE):
        try:
            images = table[start : start + SLICE][column]
        except Exception:  # image libraries raise a dozen types
            _require_images(table, column, range(start, min(start + SLICE, len(table))))
            raise
        yield from images


def _require_images(table: Any, column: str, rows: Iterable[int]) -> None:
    from datasets import Image  # only a table of theirs decodes

    for row in rows:
        try:
            table[row][column]
        except Exception as error:
            path = table.cast_column(column, Image(decode=False))[row][column]["path"]
            unknown = type(error).__name__ == "UnidentifiedImageError"  # its own words tell of an object in memory
            reason = "it is no image" if unknown else (str(error).splitlines() or [type(error).__name__])[0]
            place = f"image {path}" if path else f"the image of row {row + 1}"
            raise UserError(f"{place} cannot be read: {reason}", "put it right, or leave it out") from error


def _array(value: Any) -> Array:
    """(height, width, channels) uint8."""
    if hasattr(value, "convert") and value.mode.startswith("I;16"):
        value = np.repeat((np.asarray(value) >> 8)[..., None], 3, axis=2)  # convert would make all above 255 white
    elif hasattr(value, "convert"):
        value = value.convert("RGB")
    array = np.asarray(value)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise UserError(f"an image of shape {array.shape}", "images are height x width or height x width x channels")
    with np.errstate(invalid="ignore"):
        pixels = array.astype(np.uint8)
    if pixels.dtype != array.dtype and not np.array_equal(pixels, array):
        raise UserError(
            f"an image has values from {array.min():g} to {array.max():g}", "images are whole numbers from 0 to 255"
        )
    return pixels


def _one_size(images: Iterable[Array], wanted: Pixels) -> Array:
    """All images in one array; where their sizes differ, resized to what the model wants."""
    images = list(images)
    if len({image.shape for image in images}) > 1:
        if wanted.size is None:
            raise UserError("the images have different sizes", "resize them, or use a model that names its input size")
        images = [_resized(image, wanted) for image in images]
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), dtype=np.uint8)


def _resized(image: Array, wanted: Pixels) -> Array:
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    x = functional.interpolate(x, wanted.size, mode=wanted.mode, antialias=True, align_corners=False)
    return x.clamp(0, 255).round().byte()[0].permute(1, 2, 0).expand(-1, -1, 3).numpy()
