"""Greedy answers of several models in one pass, compared with the references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedlora.adapters.lora import applied
from fedlora.learning.batches import cut
from fedlora.learning.examples import Examples
from fedlora.learning.lanes import Stack
from fedlora.learning.language import answer_of, exact_match, prompt_of, rouge_l

Array = np.ndarray[Any, Any]


@torch.no_grad()
def answers(stack: Stack, examples: Examples, work: Mapping[int, Array], new: int, tokens: int) -> dict[int, list[str]]:
    """Each lane's answers to the prompts of its units, in their order. ``new``: the most tokens of an answer."""
    backbone = stack.backbone
    tokenizer, module = backbone.processor, backbone.module
    assert examples.first is not None
    found = {lane: [""] * len(units) for lane, units in work.items()}
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, pad_token_id=examples.pad, eos_token_id=tokenizer.eos_token_id
    )
    for group in cut(work, examples.first + new, tokens):
        prompts = [prompt_of(examples, unit) for unit in group.units]
        width = max(map(len, prompts))
        ids = torch.tensor([[examples.pad] * (width - len(p)) + p for p in prompts], device=backbone.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=backbone.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        plan, overrides = stack.plan(inputs, group.segments, None)
        with backbone.replaced(overrides), applied(list(backbone.sites.values()), plan):
            out = module.generate(**inputs, generation_config=settings)  # type: ignore[operator]
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for lane, place, text in zip(group.lanes, group.places, texts):
            found[int(lane)][int(place)] = text.strip()
    return found


def answer_scores(given: list[str], examples: Examples, units: Array, tokenizer: Any) -> dict[str, tuple[float, float]]:
    """Sums of exact match and Rouge-L over a lane's units."""
    references = [answer_of(examples, unit, tokenizer) for unit in units]
    scores = {"exact_match": exact_match, "rougeL": rouge_l}
    return {
        name: (sum(score(a, r) for a, r in zip(given, references)), float(len(references)))
        for name, score in scores.items()
    }
