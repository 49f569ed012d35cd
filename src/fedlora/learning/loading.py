"""Building a base: a model from wherever it comes, its head taken off, its adapted layers put in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedlora.adapters.inject import inject, select
from fedlora.errors import UserError
from fedlora.learning.backbone import Backbone
from fedlora.learning.pooled import POOLINGS
from fedlora.learning.sources import (
    Kind,
    classifier_of,
    folder_of,
    load_model,
    load_processor,
    move,
    quiet,
    require_adaptable,
    require_causal,
    settle_padding,
    stored,
    take_head,
    warn_of_padding,
)


def load_backbone(
    model: str | Path | nn.Module,
    kind: Kind,
    *,
    labels: Sequence[str] = (),
    pooling: str = "auto",
    targets: str | Sequence[str] = "auto",
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    device: torch.device | str = "cpu",
    processor: Any = None,
    width: int | None = None,
    adapt: bool = True,
    seed: int = 0,
) -> Backbone:
    """A model from a folder, a hub id, "minilm", "embedded-lm" or a module, ready for adapters.

    ``labels``: the label space of a classification. ``pooling``: "auto" (the model's own head where it was trained so,
    the mean over tokens for encoders, the last token for decoders, the class token for images), "mean", "cls", "last"
    or "pooler". ``targets``, ``layers``: see ``inject.select``. ``bits``: see ``sources.stored``. ``width``: that of
    the representation; a model of another width gets a linear map to it. ``adapt=False``: no sites (a private model).
    ``seed``: of what starts at random. A given module is copied, and stored as it is.
    """
    source = str(model) if isinstance(model, str | Path) else type(model).__name__
    if kind != "causal-lm" and not labels:
        raise UserError(f"{kind} needs labels", "name [data] labels or a label column")
    if pooling != "auto" and pooling not in POOLINGS:
        raise UserError(f"[model] pooling = {pooling!r}", f"choose auto, {', '.join(POOLINGS)}")
    with quiet(), torch.random.fork_rng(devices=[]):  # a random start must not move the global stream
        torch.default_generator.manual_seed(seed)
        if isinstance(model, nn.Module):
            module, fits = classifier_of(copy.deepcopy(model), kind, labels, pooling)
        else:
            folder = folder_of(str(model))
            module, fits = load_model(folder, source, kind, labels, pooling, stored(bits, device))
            processor = load_processor(folder, kind) if processor is None else processor
        if adapt:
            require_adaptable(module, source)
        warn_of_padding(module, source)
        head, path = None, ""
        if kind == "causal-lm":
            require_causal(module, source)
        else:
            path, head, own = take_head(module, labels, width)
            fits = fits and own
    settle_padding(module, processor)
    move(module, dtype, device)
    chosen = select(module, targets, layers, path or None) if adapt else {}
    sites, switching = inject(module, chosen), switches(module)
    return Backbone(module, kind, sites, head, path, fits, processor, source, tuple(labels), switching)


def switches(module: nn.Module) -> bool:
    """Whether a model computes the same by SDPA as by plain products, so that a pass may take what is faster."""
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    if not isinstance(module, PreTrainedModel) or module.config._attn_implementation not in ("eager", "sdpa"):
        return False
    twice = any(m.config.model_type == "falcon" and m.config.alibi for m in models)  # eager products add ALiBi twice
    return not twice and all(getattr(m, "_supports_sdpa", False) for m in models)
