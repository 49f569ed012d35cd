"""Images that are none, named by their file or row, whoever reads them."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest

from fedlora.errors import UserError
from fedlora.learning.images import ImageClassification

PIL = pytest.importorskip("PIL.Image")


def _png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    PIL.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


# datasets leaves the file of a truncated image open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not an image", "it is no image"), (b"", "it is no image"), (_png()[:200], "image file is truncated")],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, reason: str, from_file: bool) -> None:
    (tmp_path / "z.png").write_bytes(content)
    bad = {"bytes": None if from_file else content, "path": str(tmp_path / "z.png") if from_file else None}
    rows = [{"bytes": _png(i), "path": None} for i in range(3)]
    table = datasets.Dataset.from_dict({"image": [*rows, bad], "label": ["x"] * 4})
    place = rf"image {tmp_path}/z\.png" if from_file else "the image of row 4"
    with pytest.raises(UserError, match=f"{place} cannot be read: {reason}.*\n  -> "):
        ImageClassification(("x",)).encode(table.cast_column("image", datasets.Image()), None)
