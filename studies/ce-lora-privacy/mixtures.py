"""What CE-LoRA's statistics say of who trained on which text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedlora.algorithms.similarity import blurred, statistics
from fedlora.federation.client import Job
from fedlora.federation.orders import Features, Model
from fedlora.federation.spec import Tree, derive, stream
from fedlora.study.experiment import Experiment

Row = dict[str, Any]


def mixtures(experiment: Experiment, seed: int) -> Iterator[Row]:
    """What means, variances and counts say of who trained on which text, against all clients' texts as candidates."""
    learner, clients = experiment.learner, experiment.population.seen
    features: dict[tuple[str, str], Tensor] = {}
    labels: dict[str, Tensor] = {}
    for client, split in itertools.product(clients, ("train", "test")):
        from_split: Any = split
        learner.submit(Job(Features(Model({}), from_split), 0, client))
        results: Any = learner.advance()
        ((_, (found, classes)),) = results
        features[client, split] = found.double()
        if split == "train":
            labels[client] = classes
    for project, noise in itertools.product((None, 32), (0.0, 0.1, 1.0)):
        draw = torch.randn(384, project or 1, generator=stream(seed, "projection"), dtype=torch.float64)
        seen = {key: x if project is None else x @ draw / math.sqrt(project) for key, x in features.items()}
        for client in clients:
            sent = statistics(features[client, "train"], labels[client], project, seed)
            sent = blurred(sent, noise, derive(seed, client, "noise")) if noise else sent
            about = {"case": "384 numbers" if project is None else f"{project} numbers", "noise": noise}
            yield {**about, "client": client, **leaks(sent, client, seen, labels)}


def leaks(sent: Tree, client: str, seen: Mapping[tuple[str, str], Tensor], labels: Mapping[str, Tensor]) -> Row:
    """One client's mixture: how near its means are to its own training texts, and what is sent in clear."""

    def far(x: Tensor) -> np.ndarray:
        return torch.cdist(x, sent["means"]).amin(1).numpy()

    own, kept = seen[client, "train"], seen[client, "test"]
    others = torch.cat([x for (name, split), x in seen.items() if name != client and split == "train"])
    both = torch.cdist(sent["means"], torch.cat([own, others])).argmin(1) < len(own)
    single = sent["shares"] * sent["counts"] < 1.5
    pairs = (sent["counts"] == 2) & ~single
    mine, everyone = labels[client], torch.cat(list(labels.values()))
    of_class = [(mine == c).sum() / (everyone == c).sum() for c in sent["class"].clamp_min(0)]
    told = {int(c): int(sent["counts"][sent["class"] == c][0]) for c in sent["class"].unique()}
    true = {int(c): int((mine == c).sum()) for c in mine.unique()}
    return {
        "auc_others": auc(far(own), far(others)),
        "auc_test": auc(far(own), far(kept)),
        "nearest_own": float(both.double().mean()),
        "chance": len(own) / (len(own) + len(others)),
        "chance_of_class": float(torch.stack(of_class).mean()),
        "components": len(both),
        "of_one": int(single.sum()),
        "of_two": int(pairs.sum()),
        "shares_off": sum(abs(told.get(c, 0) - n) for c, n in true.items()) / len(mine),
    }


def auc(members: np.ndarray, strangers: np.ndarray) -> float:
    """How often a member is nearer than a stranger."""
    truth = np.repeat([1, 0], [len(members), len(strangers)])
    return float(roc_auc_score(truth, -np.concatenate([members, strangers])))
