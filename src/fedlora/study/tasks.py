"""From ``[model] task`` and ``[data]`` to a task value."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fedlora.errors import UserError
from fedlora.learning.backbone import Backbone
from fedlora.learning.tasks import CausalLM, ImageClassification, Task, TextClassification
from fedlora.study.config import RunConfig

LONGEST = {"text-classification": 128, "causal-lm": 256}
"""Tokens of an example where the run file does not say; no more than the model can place."""


def task_of(config: RunConfig, labels: tuple[str, ...], fields: Collection[str], *backbones: Backbone) -> Task:
    """The task of a run, reading the columns that there are; no longer texts than every backbone can place."""
    kind = config.model.task
    if kind == "image-classification":
        return ImageClassification(labels)
    length = min(max_length(config, backbone) for backbone in backbones)
    if kind == "text-classification":
        return TextClassification(labels, max_length=length)
    text = "text" if "text" in fields else None
    training = config.training
    return CausalLM(text, max_length=length, whole=training.loss_on == "all", generate=training.generate)


def max_length(config: RunConfig, backbone: Backbone) -> int:
    """The run file's ``[data] max_length``, else a length that suits the task and fits the model."""
    room, stated = positions(backbone), config.data.max_length
    if stated is None:
        return min(LONGEST[config.model.task], room or LONGEST[config.model.task])
    if room is not None and stated > room and placed(backbone):  # positions that are computed as needed have no end
        raise UserError(
            f"[data] max_length = {stated}: {backbone.name} has places for {room} tokens",
            f"set it to at most {room}, or leave it out",
        )
    return stated


def positions(backbone: Backbone) -> int | None:
    """How many tokens a model was made for; None where it does not say (XLNet says -1).

    A table of positions that begins behind the padding token's row (RoBERTa's) has that many fewer.
    """
    settings = getattr(backbone.module, "config", None)
    encoder = getattr(settings, "encoder", settings)
    found = getattr(encoder, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    before = [table.padding_idx + 1 for table in tables(backbone) if table.padding_idx is not None]
    return found - max(before, default=0)


PLACES = ("position_embeddings", "embed_positions", "positions_embed", "pos_encoding", "wpe")


def tables(backbone: Backbone) -> list[nn.Embedding]:
    """The model's tables of learnt positions."""
    named = backbone.module.named_modules()
    return [layer for path, layer in named if path.endswith(PLACES) and isinstance(layer, nn.Embedding)]


def placed(backbone: Backbone) -> bool:
    """Whether a model has a table of positions, learnt or computed beforehand (GPT-J's, CTRL's)."""
    return bool(tables(backbone)) or any(path.endswith(PLACES) for path, _ in backbone.module.named_buffers())
