"""From ``[model] task`` and ``[data]`` to a task value."""

from __future__ import annotations

from collections.abc import Collection

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
    settings = getattr(backbone.module, "config", None)
    encoder = getattr(settings, "encoder", settings)
    room = getattr(encoder, "max_position_embeddings", None) or LONGEST[config.model.task]
    return config.data.max_length or min(LONGEST[config.model.task], room)
