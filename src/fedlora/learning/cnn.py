"""The five convolutional networks of pFedLoRA's image clients (arXiv 2310.13283), as ordinary transformers models.

All see 32 x 32 pixels and give representations of width 500: convolution 5 x 5 without padding, ReLU, 2 x 2 maximum,
twice; then FC1, ReLU, FC2, ReLU (the representation), and the head (FC3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from fedlora.learning.images import Pixels

WIDTHS = {
    "cnn-1": (16, 32, 2000, 500),
    "cnn-2": (16, 16, 2000, 500),
    "cnn-3": (16, 32, 1000, 500),
    "cnn-4": (16, 32, 800, 500),
    "cnn-5": (16, 32, 500, 500),
}
"""Name -> channels of both convolutions, outputs of FC1 and FC2."""
PIXELS = Pixels((32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="bilinear")
"""How they want their images: three channels of 32 x 32, from -1 to 1."""


class CNNConfig(PretrainedConfig):
    """``widths``: as in ``WIDTHS``."""

    model_type = "fedlora_cnn"

    def __init__(self, widths: Any = WIDTHS["cnn-1"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widths = list(widths)


class CNN(PreTrainedModel):
    """logits = head(FC2(FC1(convolutions(pixels)))). Saved and loaded like any transformers model once this module is
    imported.

    >>> model = CNN(CNNConfig(WIDTHS["cnn-5"], num_labels=10))
    >>> f"{4 * sum(p.numel() for p in model.parameters()) / 2**20:.2f} MiB"
    '2.56 MiB'
    """

    config_class = CNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config)
        first, second, hidden, width = config.widths
        self.conv1 = nn.Conv2d(3, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(25 * second, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.head = nn.Linear(width, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Layers keep torch's own initialisation."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        """Pixels (examples, 3, 32, 32) to logits (examples, labels)."""
        x = nn.functional.max_pool2d(self.conv1(pixel_values).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        x = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return ImageClassifierOutput(logits=self.head(x))


AutoConfig.register(CNNConfig.model_type, CNNConfig, exist_ok=True)
AutoModelForImageClassification.register(CNNConfig, CNN, exist_ok=True)
