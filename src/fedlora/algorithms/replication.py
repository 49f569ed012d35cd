"""Replication padding: mixed ranks, missing rows copied from the largest clients (arXiv 2406.17477)."""

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
class Replication(Algorithm[State, Tree, Mapping[str, Any]]):
    """Every client's factors are padded to the round's largest rank by the largest clients' rows, then averaged.

        pad(A_i) = [A_i; H[r_i:]],   H = mean of A over the clients of the largest rank,   A <- sum_i p_i pad(A_i)

    and s B by columns likewise; p_i = n_i / sum n over the round; to rank r: A[:r], B[:, :r]. No zero is averaged in.
    With two ranks this is the mean over the owners of a row (``rbla``); with more, the rows between count for the
    largest clients. The paper has two ranks and calls the larger clients the better ones. Rows beyond the round's
    largest rank keep their value.

    Travels: up, A and B at the client's rank; down, its slice; shared extras both ways. Stays: private extras. Paper:
    arXiv 2406.17477.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 2}, {}, (), width=3, alpha=2.0)
    >>> one, two = torch.ones(1, 2), torch.tensor([[3.0, 3.0], [5.0, 5.0]])
    >>> padded([(1, 1.0, one, torch.zeros(3, 1)), (2, 1.0, two, torch.zeros(3, 2))])[0]
    tensor([[2., 2.],
            [5., 5.]])
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


def padded(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """The mean over all groups, each continued by the largest one's rows."""
    _, _, rows, columns = groups[-1]
    total = sum(weight for _, weight, _, _ in groups)
    right, left = torch.zeros_like(rows), torch.zeros_like(columns)
    for rank, weight, a, b in groups:
        right += weight / total * torch.cat([a, rows[rank:]])
        left += weight / total * torch.cat([b, columns[:, rank:]], 1)
    return right, left


ROWS = Rows(padded)
