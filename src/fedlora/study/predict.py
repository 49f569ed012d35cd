"""What a deployed model says of new inputs: labels with probabilities, or generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fedlora.adapters.lora import applied
from fedlora.errors import UserError
from fedlora.federation.orders import Model
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import to_device
from fedlora.learning.lanes import Held, Merges, Stack
from fedlora.learning.tasks import TextClassification
from fedlora.study.export import About, deployed, load, rebuilt

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """A label and the probability of every label.

    >>> print(Prediction({"spam": 0.25, "ham": 0.75}))
    ham  (ham 0.750, spam 0.250)
    """

    probabilities: Mapping[str, float]

    @property
    def label(self) -> str:
        """The most probable label."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def __str__(self) -> str:
        best = sorted(self.probabilities.items(), key=lambda item: -item[1])[:5]
        return f"{self.label}  ({', '.join(f'{label} {p:.3f}' for label, p in best)})"


def predict(
    folder: str | Path,
    texts: Sequence[str],
    client: str | None = None,
    *,
    device: str = "cpu",
    max_new_tokens: int = 64,
) -> list[Prediction] | list[str]:
    """Predicts with a run's model of a client (None: the global one), or with an exported folder.

    ``texts``: texts to classify, image files to classify, or prompts to go on with (greedily). Raises UserError where
    there is no such model.
    """
    model, about = load(deployed(folder, client))
    backbone = rebuilt(about, device)
    stack = stacked(backbone, model)
    if backbone.kind == "causal-lm":
        return [_continued(stack, text, max_new_tokens) for text in texts]
    answers: list[Prediction] = []
    for start in range(0, len(texts), BATCH):
        inputs = _inputs(backbone, about, texts[start : start + BATCH])
        for row in scores(stack, model, inputs).softmax(-1).tolist():
            answers.append(Prediction(dict(zip(about.labels, row, strict=True))))
    return answers


def stacked(backbone: Backbone, model: Model) -> Stack:
    """A model on its base, ready for forward passes with one lane."""
    if model.backbone != "base":
        raise UserError(f"the model sits on a private backbone {model.backbone!r}", "load it with fedlora.study.export")
    head = {name: value for name, value in model.params.items() if name.startswith("head/")}
    held = Held(model, model.params)
    stack = Stack(backbone, backbone.spec(1), head, Merges(), held, 1, {})
    stack.load(0, held)
    return stack


@torch.no_grad()
def scores(stack: Stack, model: Model, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's prediction for a batch, its own rule applied: (examples, labels)."""
    rows = len(next(iter(inputs.values())))
    outputs = stack.outputs(inputs, ((0, 0, rows),), (None,))
    return model.predict(outputs, stack.params(0))


def _inputs(backbone: Backbone, about: About, items: Sequence[str]) -> Mapping[str, Tensor]:
    """The batch that training would have made of these items: the task's own encoding, with a label nobody reads."""
    length = about.settings["data"].get("max_length")
    task = TextClassification(about.labels, **({} if length is None else {"max_length": length}))
    table = Dataset.from_dict({task.text: list(items), task.label: [about.labels[0]] * len(items)})
    inputs, _ = task.collate(task.encode(table, backbone.processor), np.arange(len(items)))
    return to_device(inputs, backbone.device, backbone.dtype)


@torch.no_grad()
def _continued(stack: Stack, text: str, max_new_tokens: int) -> str:
    backbone = stack.backbone
    tokenizer: Any = backbone.processor
    encoded = tokenizer(text, return_tensors="pt")
    inputs = {name: encoded[name].to(backbone.device) for name in ("input_ids", "attention_mask")}
    plan, overrides = stack.plan(inputs, ((0, 0, 1),), None)
    for path, value in overrides.items():  # the base was loaded for this prediction
        backbone.parameter(path).copy_(value)
    module: Any = backbone.module
    with applied(list(backbone.sites.values()), plan):
        out = module.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
