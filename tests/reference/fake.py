"""A made-up world for reference numbers: non-square sites, mixed ranks, and answers to orders that are seeded noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.federation.algorithm import Algorithm, Update
from fedlora.federation.orders import Features, Fit, Model, Score, Tuned
from fedlora.federation.spec import Client, Local, ModelSpec, Tree

SITES = {"down": (4, 9), "up": (7, 3)}  # (out, in), one wide, one tall
LABELS = ("red", "green", "blue")
WHOLE = {"head/weight": (3, 6), "head/bias": (3,), "norm/gain": (6,)}
SPEC = ModelSpec(SITES, {"down": 4, "up": 3}, WHOLE, LABELS, width=6, alpha=6.0, dtype=torch.float64)


def client(name: str, rank: int = 4, examples: int = 50, backbone: str = "base") -> Client:
    return Client(name, dict.fromkeys(SITES, rank), backbone, examples)


def local(who: Client, round: int = 1, rounds: int = 5, spec: ModelSpec = SPEC, counts: Any = None) -> Local:
    return Local(who, spec, round, rounds, 0, who.examples or 1, counts or {})


def means(selector: str, key: str) -> bool:
    if selector in "ABCW":
        return key.endswith(f"/{selector}") and not key.startswith("extra/")
    return key.startswith(f"{selector}/")


@dataclass
class Fake:
    """Training adds noise to what was selected (what was missing starts from ``own``); scores are ``loss(model)``."""

    seed: int = 0
    size: float = 0.5
    loss: Callable[[Model, str], tuple[float, float]] = lambda model, split: (1.0, 1.0)
    tokens: int = 1  # of an example: what a loss counts
    features: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))
    own: Mapping[str, Tree] = field(default_factory=lambda: {"base": SPEC.start(0)})
    log: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = torch.Generator().manual_seed(self.seed)

    def answer(self, order: Any) -> Any:
        self.log.append(order)
        if isinstance(order, Score):
            total, count = self.loss(order.model, order.split)
            share = 1.0 if order.limit is None or not count else min(1.0, order.limit * self.tokens / count)
            return {"loss": (total * share, count * share)}
        if isinstance(order, Features):
            return self.features
        assert isinstance(order, Fit)
        models = {"model": order.models} if isinstance(order.models, Model) else order.models
        trains = order.train if isinstance(order.train, Mapping) else {"model": order.train}
        return Tuned({n: self.tuned(m, trains[n]) for n, m in models.items()}, {"train_loss": (2.0, 4.0)}, 3)

    def tuned(self, model: Model, train: tuple[str, ...]) -> dict[str, Tensor]:
        params = {k: v for k, v in self.own[model.backbone].items() if any(means(s, k) for s in train)}
        params |= model.params
        for selector in train:
            assert any(means(selector, key) for key in params), f"{selector} selects nothing"
        noise = {k: torch.randn(v.shape, generator=self.stream, dtype=v.dtype) for k, v in params.items()}
        return {k: v + self.size * noise[k] if any(means(s, k) for s in train) else v for k, v in params.items()}

    def run(self, work: Any) -> Any:
        """Drives a client program to its end."""
        answer: Any = None
        while True:
            try:
                asked = work.send(answer)
            except StopIteration as end:
                return end.value
            answer = tuple(map(self.answer, asked)) if isinstance(asked, tuple) else self.answer(asked)


def train(
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    clients: list[Client],
    round: int = 1,
    memories: dict[str, Any] | None = None,
    spec: ModelSpec = SPEC,
) -> tuple[Any, dict[str, Update]]:
    """One round with every client given: the new state, and what each sent. ``memories`` is brought up to date."""
    kept = memories if memories is not None else {}
    updates: dict[str, Update] = {}
    total = algorithm.aggregator.zero()
    for who in clients:
        fake, mine = Fake(seed=hash_free(who.id) + 100 * round), replace(local(who, round, spec=spec))
        if who.id not in kept:
            kept[who.id] = fake.run(algorithm.client_init(mine))[1]
        payload = algorithm.broadcast(state, who, round)
        updates[who.id], kept[who.id] = fake.run(algorithm.client_update(payload, kept[who.id], mine))
        expected = algorithm.expects(state, who, round, "train")
        assert set(updates[who.id].arrays) == set(expected)
        for key, shape in expected.items():
            assert shape is None or tuple(updates[who.id].arrays[key].shape) == shape
        total = algorithm.aggregator.accumulate(total, who, updates[who.id])
    return algorithm.server_update(state, algorithm.aggregator.report(total), round), updates


def hash_free(name: str) -> int:
    return sum(map(ord, name))


def array(value: Tensor) -> Any:
    return value.detach().double().numpy()


def dense(tree: Tree, site: str) -> Any:
    """s B A by numpy, an element at a time."""
    a, b, s = array(tree[f"{site}/A"]), array(tree[f"{site}/B"]), float(tree[f"{site}/scale"])
    return s * np.einsum("or,ri->oi", b, a)


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(array(a) if isinstance(a, Tensor) else a, b, rtol=0, atol=tolerance)
