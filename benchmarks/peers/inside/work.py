"""What both peers run inside their own environments: the model with PEFT's adapters, its settings and a client's data.

Nothing of fedlora is imported here. ``Work`` is read from a JSON file; every process keeps one.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification


class Work:
    """A federation's clients, in the words of the JSON file (see ``processes.Task``)."""

    def __init__(self, file):
        with open(file) as lines:
            given = json.load(lines)
        self.__dict__.update(given)
        store = np.load(self.data)
        self.tokens, self.offsets, self.labels = store["tokens"], store["offsets"], store["labels"]

    def cohort(self, round):
        """How many clients take part: the first round (0) only warms up."""
        return min(self.clients, self.warm) if round == 0 else self.clients

    def client(self, number):
        """Ids, mask and labels of a client's examples, padded to its longest."""
        own = self.steps * self.batch
        rows = range(number * own, (number + 1) * own)
        texts = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        ids = np.zeros((own, max(map(len, texts))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(self.labels[list(rows)].astype(np.int64))

    def model(self):
        """The base with fresh adapters and a head, set up as ``setting`` says."""
        how = self.setting
        if how["threads"]:
            torch.set_num_threads(how["threads"])
        if how["matmul"] != "none":
            torch.backends.mkldnn.matmul.fp32_precision = how["matmul"]
        torch.manual_seed(0)
        words = {"attn_implementation": how["attention"]} if how["attention"] else {}
        base = AutoModelForSequenceClassification.from_pretrained(
            self.folder, num_labels=self.classes, dtype=torch.float32, **words
        )
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=self.rank, lora_alpha=self.alpha, target_modules=["query", "value"]
        )
        model = get_peft_model(base, lora)
        model.train(how["dropout"])  # the adapters have none, the model has its own
        return model

    def autocast(self):
        """bfloat16 for the products, or nothing."""
        if self.setting["autocast"]:
            return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def optimizer(self, parameters):
        """AdamW over what is trained."""
        return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=self.lr, weight_decay=0.0)


def loss_of(model, ids, mask, labels):
    """The loss of a batch, its padding cut to its longest."""
    longest = int(mask.sum(1).max())
    return model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest], labels=labels).loss


@cache
def loaded(file):
    """The work and its model: once per process (Flower's examples load the model for every message)."""
    work = Work(file)
    return work, work.model()
