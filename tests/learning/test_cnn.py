"""The five networks of pFedLoRA's image clients: their sizes, their layers by hand, and their folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification

from fedlora.errors import UserError
from fedlora.learning.cnn import CNN, PIXELS, WIDTHS, CNNConfig
from fedlora.learning.images import load_processor
from fedlora.learning.loading import load_backbone

TEN = tuple("abcdefghij")
MIB = {"cnn-1": "10.00", "cnn-2": "6.92", "cnn-3": "5.04", "cnn-4": "4.04", "cnn-5": "2.56"}


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_float32_sizes_are_the_papers(name: str) -> None:
    model = CNN(CNNConfig(WIDTHS[name], num_labels=10))
    assert f"{sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20:.2f}" == MIB[name]


def test_layers_by_hand() -> None:
    base = load_backbone("cnn-2", "image-classification", labels=TEN, adapt=False)
    own = {key.removeprefix("backbone/"): value for key, value in base.own(("backbone",)).items()}
    assert base.width == 500
    x = torch.randn(2, 3, 32, 32)
    h = x
    for layer in ("conv1", "conv2"):
        h = functional.unfold(h, 5).transpose(1, 2) @ own[f"{layer}.weight"].flatten(1).T + own[f"{layer}.bias"]
        edge = int(h.shape[1] ** 0.5)
        h = h.transpose(1, 2).reshape(2, 16, edge // 2, 2, edge // 2, 2).amax((3, 5)).clamp_min(0)
    assert h.shape == (2, 16, 5, 5)
    h = h.reshape(2, 400)
    for layer in ("fc1", "fc2"):
        h = (h @ own[f"{layer}.weight"].T + own[f"{layer}.bias"]).clamp_min(0)
    torch.testing.assert_close(base.forward({"pixel_values": x})[0], h, atol=1e-5, rtol=1e-5)


def test_a_start_is_the_seeds_and_a_folder_is_transformers(tmp_path) -> None:
    one, same, other = (load_backbone("cnn-5", "image-classification", labels=TEN, seed=s) for s in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    model = one.plain()
    model.save_pretrained(tmp_path)
    one.processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = PIXELS(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)))
    assert x.shape == (2, 3, 32, 32)
    torch.testing.assert_close(again(x).logits, model(x).logits)
    assert load_processor(str(tmp_path)) == PIXELS
    loaded = load_backbone(tmp_path, "image-classification", labels=TEN)
    assert loaded.fingerprint == one.fingerprint
    with pytest.raises(UserError, match="network for images"):
        load_backbone("cnn-1", "text-classification", labels=TEN)
