"""An encoder, a pooling and a linear head as one ordinary transformers model: what a pooled run trains and exports."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

POOLINGS = ("mean", "cls", "last", "pooler")


class PooledConfig(PretrainedConfig):
    """``encoder``: the encoder's own configuration; ``pooling``: mean, cls, last or pooler (the encoder's own)."""

    model_type = "pooled_classifier"

    def __init__(
        self,
        encoder: Any = None,
        pooling: str = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(encoder, dict):
            settings = dict(encoder)
            encoder = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.encoder = encoder
        self.pooling = pooling

    def to_dict(self) -> dict[str, Any]:
        plain = super().to_dict()
        plain["encoder"] = None if self.encoder is None else self.encoder.to_dict()
        return plain


def hidden_size(config: Any) -> int:
    """The width of an encoder's representation."""
    for name in ("hidden_size", "dim", "d_model", "n_embd"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    sizes = getattr(config, "hidden_sizes", None)
    if sizes:
        return int(sizes[-1])
    raise ValueError(f"{type(config).__name__} does not say how wide its representation is")


class PooledClassifier(PreTrainedModel):
    """logits = head(pool(encoder(inputs))).

    With a tokenizer's inputs (``input_ids``, ``attention_mask``) or an image's (``pixel_values``). Saved and loaded
    like any transformers model once this module is imported.
    """

    config_class = PooledConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PooledConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        self.head = nn.Linear(hidden_size(config.encoder), cast(int, config.num_labels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.head:
            layer = cast(nn.Linear, module)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def get_input_embeddings(self) -> Any:
        return cast(Any, self.encoder).get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (examples, labels), and the mean cross-entropy where ``labels`` (examples,) are given."""
        kwargs.pop("return_dict", None)
        if pixel_values is not None:
            out = self.encoder(pixel_values=pixel_values)
        else:
            out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        pooled = pool(out, attention_mask, self.config.pooling)
        logits = self.head(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=cast(Any, loss), logits=logits)


def pool(out: Any, mask: Tensor | None, pooling: str) -> Tensor:
    """(examples, width) from an encoder's output.

    >>> hidden = torch.arange(6.0).view(1, 3, 2)
    >>> out = type("Out", (), {"last_hidden_state": hidden})
    >>> mask = torch.tensor([[1, 1, 0]])
    >>> [pool(out, mask, how).tolist() for how in ("mean", "cls", "last")]
    [[[1.0, 2.0]], [[0.0, 1.0]], [[2.0, 3.0]]]
    """
    if pooling == "pooler":
        return out.pooler_output.flatten(1)
    hidden: Tensor = out.last_hidden_state
    if hidden.dim() == 4:  # a convolutional map
        return hidden.mean((2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        return masked_mean(hidden, mask)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that the mask keeps, in float32 at least; returned in the input's type."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = mask.unsqueeze(-1).to(wide)
    return ((hidden.to(wide) * weight).sum(1) / weight.sum(1).clamp_min(1)).to(hidden.dtype)


AutoConfig.register(PooledConfig.model_type, PooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(PooledConfig, PooledClassifier, exist_ok=True)
AutoModelForImageClassification.register(PooledConfig, PooledClassifier, exist_ok=True)
