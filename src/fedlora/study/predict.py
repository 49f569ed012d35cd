"""What a deployed model says of new inputs: labels with probabilities, or generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from fedlora.errors import UserError
from fedlora.federation.orders import FORBIDDEN, Model
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import to_device
from fedlora.learning.examples import Examples
from fedlora.learning.generation import answers
from fedlora.learning.lanes import Held, Merges, Stack
from fedlora.learning.tasks import CausalLM, ImageClassification, TextClassification
from fedlora.study.config import RunConfig
from fedlora.study.export import About, config_of, deployed, opened, rebuilt
from fedlora.study.tasks import max_length

BATCH, TOKENS = 32, 2048


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
    models: Mapping[str, Any] | None = None,
    device: str = "cpu",
    max_new_tokens: int = 64,
) -> list[Prediction] | list[str]:
    """Predicts with a run's model of a client (None: the global one), or with an exported folder.

    ``texts``: texts to classify, image files to classify, or prompts, which are answered greedily in at most
    ``max_new_tokens``. ``models``: the modules of a run that was given any. Raises UserError where there is no such
    model, and for a text to classify or to continue that is empty.
    """
    if isinstance(texts, str):
        raise UserError(f"one text was given, {texts[:60]!r}, not several", "give a list: [text]")
    model, about, own = opened(deployed(folder, client), models)
    config, backbone = config_of(about), own.to(device=device) if own else rebuilt(about, device)
    stack = stacked(backbone, model)
    if backbone.kind != "image-classification":
        _require_text(texts)
    if backbone.kind == "causal-lm":
        examples, units = _prompts(config, backbone, texts)
        return answers(stack, examples, {0: units}, max_new_tokens, TOKENS)[0]
    found: list[Prediction] = []
    for start in range(0, len(texts), BATCH):
        inputs = _inputs(config, backbone, about, texts[start : start + BATCH])
        for row in _allowed(scores(stack, model, inputs), about).softmax(-1).tolist():
            found.append(Prediction(dict(zip(about.labels, row, strict=True))))
    return found


def _require_text(texts: Sequence[str]) -> None:
    """Refuses bytes that are no UTF-8 and halves of characters, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"--text {text[:60]!r}: {text[error.start : error.end]!r} is no character"
            raise UserError(problem, "give whole characters, in UTF-8") from None


def stacked(backbone: Backbone, model: Model) -> Stack:
    """A model on its base, ready for forward passes with one lane."""
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


def _allowed(logits: Tensor, about: About) -> Tensor:
    """Labels outside the client's own space are never predicted."""
    if not about.own_labels:
        return logits
    foreign = torch.tensor([label not in about.own_labels for label in about.labels], device=logits.device)
    return logits.masked_fill(foreign, FORBIDDEN)


def _inputs(config: RunConfig, backbone: Backbone, about: About, items: Sequence[str]) -> Mapping[str, Tensor]:
    """The batch that training would have made of these items: the task's own encoding, with a label nobody reads."""
    columns = {"label": [about.labels[0]] * len(items)}
    if backbone.kind == "image-classification":
        if missing := [item for item in items if not Path(item).is_file()]:
            raise UserError(f"no image file {missing[0]}", "name image files")
        task = ImageClassification(about.labels)
        table = datasets.Dataset.from_dict({"image": list(items), **columns}).cast_column("image", datasets.Image())
    else:
        if not all(item.strip() for item in items):
            raise UserError("a text to classify is empty", 'give some: --text "..."')
        task = TextClassification(about.labels, max_length=max_length(config, backbone))
        table = datasets.Dataset.from_dict({"text": list(items), **columns})
    examples = task.encode(table, backbone.processor)
    inputs, _ = task.collate(examples, examples.units(np.arange(len(items))))
    return to_device(inputs, backbone.device, backbone.dtype)


def _prompts(config: RunConfig, backbone: Backbone, texts: Sequence[str]) -> tuple[Examples, np.ndarray]:
    """Units whose beginnings are the prompts, formed as in training: chat template, prompt and line break, or text."""
    length = max_length(config, backbone)
    if config.data.text is None:
        table = datasets.Dataset.from_dict({"prompt": list(texts), "response": ["."] * len(texts)})
        return CausalLM(max_length=length).encode(table, backbone.processor), np.arange(len(texts))
    table = datasets.Dataset.from_dict({"text": list(texts)})
    examples = CausalLM("text", max_length=length).encode(table, backbone.processor)
    if (np.diff(examples.rows) == 0).any():
        raise UserError("a text to continue is empty", 'give some: --text "..."')
    last = examples.rows[1:] - 1  # a long text is continued from its last window
    return replace(examples, first=examples.lengths), last
