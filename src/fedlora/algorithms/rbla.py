"""RBLA: mixed ranks, each row averaged over the clients that have it (arXiv 2408.08699)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.algebra import shapes
from fedlora.algorithms.merging import trained
from fedlora.algorithms.rowwise import ByRank, Group, Rows
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]


@dataclass(frozen=True)
class RBLA(Algorithm[State, Tree, Mapping[str, Any]]):
    """Row k of A (and column k of s B) is averaged over the clients whose rank is at least k, and over no others.

        A[k] <- sum_{i: r_i >= k} n_i A_i[k] / sum_{i: r_i >= k} n_i,   s B[:, k] likewise;   to rank r: A[:r], B[:, :r]

    Rows that nobody trained in a round keep their value.

    Travels: up, A and B at the client's rank; down, its slice; shared extras both ways. Stays: private extras. Paper:
    arXiv 2408.08699.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 2}, {}, (), width=3, alpha=2.0)
    >>> rbla = RBLA()
    >>> state, acc = rbla.server_init(spec, seed=0), rbla.aggregator.zero()
    >>> for rank, step in ((1, 1.0), (2, 3.0)):
    ...     arrays = {"q/A": torch.zeros(rank, 2), "q/B": step * torch.ones(3, rank), "q/scale": torch.tensor(1.0)}
    ...     acc = rbla.aggregator.accumulate(acc, Client(str(rank), {"q": rank}), Update(arrays, 1.0, {}))
    >>> state = rbla.server_update(state, rbla.aggregator.report(acc), round=1)
    >>> state["adapter"]["q/B"]      # the second column has one owner: its 3 is not halved
    tensor([[2., 3.],
            [2., 3.],
            [2., 3.]])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> ByRank:
        return ByRank()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        return ROWS.init(spec, seed, self.extras)

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        return ROWS.serve(state, client)

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        return Update(ROWS.send(tuned.params, payload), local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(ROWS.serve(state, client))

    def server_update(self, state: State, value: Mapping[str, Any], round: int) -> State:
        return ROWS.update(state, value)

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else ROWS.model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"personal" if self.extras.personal else "truncated": Model({**payload, **memory})}
        yield


def owners(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Every row's mean over the groups that have it."""
    top, _, right, left = groups[-1]
    right, left, weights = torch.zeros_like(right), torch.zeros_like(left), right.new_zeros(top)
    for rank, weight, a, b in groups:
        right[:rank] += weight * a
        left[:, :rank] += weight * b
        weights[:rank] += weight
    return right / weights[:, None], left / weights


ROWS = Rows(owners)
