"""Causal language modelling: instruction data (loss on the answer) or plain text, scored in bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.errors import UserError
from fedlora.learning.examples import Examples, Inputs, Totals, flattened, require, slices, text_store

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Unit:
    """One unit: its tokens, the position of the first predicted one, and how many bytes of text these stand for."""

    ids: list[int]
    first: int
    bytes: int


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction.

    With ``text`` naming a column: plain texts, cut into windows of ``max_length`` tokens that begin with the
    tokenizer's beginning-of-text token, so that every token is predicted exactly once. Else ``prompt`` and ``response``
    columns: the tokenizer's chat template, or ``prompt``, a line break and ``response``; only the response (and the end
    of text after it) is predicted, unless ``whole``. ``generate``: new tokens per answer when scoring; above 0 adds
    exact match and Rouge-L of greedy answers, and Rouge-L decides.
    """

    text: str | None = None
    prompt: str = "prompt"
    response: str = "response"
    max_length: int = 512
    whole: bool = False
    generate: int = 0

    @property
    def metric(self) -> tuple[str, bool]:
        return ("rougeL", True) if self.generate else ("bits_per_byte", False)

    def encode(self, table: Any, processor: Any) -> Examples:
        if self.max_length < 2:
            raise UserError(f"[data] max_length = {self.max_length}", "at least 2 tokens are needed to predict one")
        require(table, (self.text,) if self.text is not None else (self.prompt, self.response))
        units: list[tuple[int, int, int]] = []
        parts: list[Array] = []
        counts: list[int] = []
        for part in slices(table):
            if self.text is not None:
                found = self._windows(part[self.text], processor)
            else:
                found = self._dialogues(part[self.prompt], part[self.response], processor)
            for row in found:
                counts.append(len(row))
                units += [(len(unit.ids), unit.first, unit.bytes) for unit in row]
                parts.append(flattened(unit.ids for unit in row))
        lengths, first, sizes = np.array(units, dtype=np.int64).reshape(-1, 3).T
        rows = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
        labels = np.zeros(len(units), dtype=np.int64)
        return text_store(
            parts, lengths.tolist(), labels, first=first, bytes=sizes, rows=rows, pad=processor.pad_token_id
        )

    def collate(self, examples: Examples, units: Array) -> tuple[Inputs, Tensor]:
        assert examples.first is not None
        ids, mask = examples.padded(units), examples.mask(units)
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        target = torch.arange(1, ids.shape[1] + 1)
        first = torch.from_numpy(examples.first[units].astype(np.int64))
        length = torch.from_numpy(examples.lengths[units].astype(np.int64))
        labels[(target < first[:, None]) | (target >= length[:, None])] = -100
        return {"input_ids": ids, "attention_mask": mask}, labels

    def score(self, logits: Tensor, labels: Tensor, examples: Examples, units: Array) -> Totals:
        assert examples.bytes is not None
        nats = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
        ).view_as(labels)
        total = nats.double().sum(1).cpu()
        tokens = (labels != -100).sum(1).double().cpu()
        sizes = torch.from_numpy(examples.bytes[units].astype(np.float64))
        return {"loss": (total, tokens), "bits_per_byte": (total / math.log(2), sizes)}

    # -- encoding

    def _windows(self, texts: Sequence[Any], tokenizer: Any) -> list[list[Unit]]:
        start, step = _beginning(tokenizer), self.max_length - 1
        rows: list[list[Unit]] = []
        for text, (ids, ends) in zip(texts, _tokens(tokenizer, texts)):
            row: list[Unit] = []
            for i in range(0, len(ids), step):
                last = i + step >= len(ids)
                begin, end = (ends[i - 1] if i else 0), (len(str(text)) if last else ends[i + step - 1])
                row.append(Unit([start, *ids[i : i + step]], 1, len(str(text)[begin:end].encode())))
            rows.append(row)
        return rows

    def _dialogues(self, prompts: Sequence[Any], responses: Sequence[Any], tokenizer: Any) -> list[list[Unit]]:
        pairs = [rendered(tokenizer, str(p), str(r)) for p, r in zip(prompts, responses)]
        before = _tokens(tokenizer, [p for p, _, _ in pairs])
        answers = _tokens(tokenizer, [r for _, r, _ in pairs])
        closing = [tokenizer(end, add_special_tokens=False)["input_ids"] if end else [] for _, _, end in pairs]
        template = getattr(tokenizer, "chat_template", None)
        opening = [] if template else [_beginning(tokenizer)]
        rows: list[list[Unit]] = []
        for (prompt, response, _), (head, heads), (answer, ends), close in zip(pairs, before, answers, closing):
            room = self.max_length - len(opening)
            tail = [*answer, *close][: max(room - min(len(head), self.max_length // 4), 1)]
            lost = max(len(head) - (room - len(tail)), 0)  # a long prompt loses its beginning
            ids = [*opening, *head[lost:], *tail]
            seen = len(tail) >= len(answer)
            size = len(response.encode()) if seen else len(response[: ends[len(tail) - 1]].encode())
            first = len(ids) - len(tail)
            if self.whole:
                unseen = heads[: lost + 1 - len(opening)]  # nothing predicts the first token of all
                size, first = size + len(prompt[unseen[-1] if unseen else 0 :].encode()), 1
            rows.append([Unit(ids, max(first, 1), size)])
        return rows


def rendered(tokenizer: Any, prompt: str, response: str) -> tuple[str, str, str]:
    """(what stands before the answer, the answer, what closes it), by the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        ask = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": response}], tokenize=False)
        if full.startswith(before) and response in full[len(before) :]:
            lead, _, close = full[len(before) :].partition(response)
            return before + lead, response, close
        return before, response, tokenizer.eos_token or ""
    return f"{prompt}\n", response, tokenizer.eos_token or ""


def _beginning(tokenizer: Any) -> int:
    """The token that texts begin with."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has no token to begin a text with", "give it a bos_token or an eos_token")


def _tokens(tokenizer: Any, texts: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """(token ids, the character that each token ends at), without special tokens."""
    values = [str(text) for text in texts]
    if tokenizer.is_fast:
        out = tokenizer(values, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(ids, [end for _, end in spans]) for ids, spans in zip(out["input_ids"], out["offset_mapping"])]
    found: list[tuple[list[int], list[int]]] = []
    for value in values:
        ids = tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]
        ends = [min(len(tokenizer.decode(ids[: i + 1])), len(value)) for i in range(len(ids))]
        found.append((ids, ends))
    return found


# -- generation scores


def answer_of(examples: Examples, unit: int, tokenizer: Any) -> str:
    """The reference answer of a unit."""
    assert examples.tokens is not None
    assert examples.offsets is not None
    assert examples.first is not None
    start, stop = examples.offsets[unit], examples.offsets[unit + 1]
    return tokenizer.decode(examples.tokens[start + examples.first[unit] : stop], skip_special_tokens=True).strip()


def prompt_of(examples: Examples, unit: int) -> list[int]:
    """The tokens before the answer."""
    assert examples.tokens is not None
    assert examples.offsets is not None
    assert examples.first is not None
    start = examples.offsets[unit]
    return examples.tokens[start : start + examples.first[unit]].tolist()


def exact_match(answer: str, reference: str) -> float:
    """1 where the texts agree but for case and white space."""
    return float(" ".join(answer.lower().split()) == " ".join(reference.lower().split()))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    >>> round(rouge_l("the cat sat", "The cat has sat down."), 3)
    0.75
    """
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    best = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, 1):
            kept = best[j]
            best[j] = previous + 1 if word == other else max(best[j], best[j - 1])
            previous = kept
    common = best[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0
