"""The tasks: what the data means. Each encodes a table once for everybody, makes batches, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.learning.examples import (
    MANY,
    Examples,
    Inputs,
    Task,
    Totals,
    class_indices,
    class_scores,
    flattened,
    later,
    require,
    slices,
    text_store,
)
from fedlora.learning.images import ImageClassification
from fedlora.learning.language import CausalLM

__all__ = ["CausalLM", "Examples", "ImageClassification", "Task", "TextClassification"]


@dataclass(frozen=True)
class TextClassification:
    """One label for one text, or for a pair of texts (``text`` names two columns)."""

    labels: tuple[str, ...]
    text: str | tuple[str, str] = "text"
    label: str = "label"
    max_length: int = 128

    @property
    def metric(self) -> tuple[str, bool]:
        return "accuracy", True

    def encode(self, table: Any, processor: Any) -> Examples:
        columns = (self.text,) if isinstance(self.text, str) else self.text
        require(table, (*columns, self.label))
        labels = class_indices(table, self.label, self.labels)
        if len(columns) == 1 and len(table) >= MANY:

            def read(rows: np.ndarray) -> Any:
                return self._tokenised(table[rows], columns, processor)["input_ids"]

            return later(read, labels, self.max_length, processor.pad_token_id)
        parts, types, lengths = [], [], []
        for part in slices(table):
            out = self._tokenised(part, columns, processor)
            lengths += [len(ids) for ids in out["input_ids"]]
            parts.append(flattened(out["input_ids"]))
            if len(columns) == 2 and "token_type_ids" in out:
                types.append(flattened(out["token_type_ids"]))
        return text_store(
            parts,
            lengths,
            labels,
            types=np.concatenate(types).astype(np.int8) if types else None,
            pad=processor.pad_token_id,
        )

    def _tokenised(self, part: Any, columns: Sequence[str], processor: Any) -> Any:
        """Some rows of the columns as the tokenizer gives them; padding for a text without any token."""
        found = processor(
            *([str(value) for value in part[column]] for column in columns),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,  # a third of the time, for what follows from the lengths
            return_token_type_ids=len(columns) == 2 or None,
        )
        pad = {"input_ids": processor.pad_token_id}
        return {name: [row or [pad.get(name, 0)] for row in rows] for name, rows in found.items()}

    def collate(self, examples: Examples, units: np.ndarray) -> tuple[Inputs, Tensor]:
        inputs = {"input_ids": examples.padded(units), "attention_mask": examples.mask(units)}
        if examples.types is not None:
            inputs["token_type_ids"] = examples.padded(units, examples.types, 0)
        return inputs, torch.from_numpy(examples.labels[units])

    def score(self, logits: Tensor, labels: Tensor, examples: Examples, units: np.ndarray) -> Totals:
        return class_scores(logits, labels)
