"""LoRA-FAIR: factors averaged, then B corrected for what the average misses (arXiv 2411.14961)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, linalg, product, ranks, shapes
from fedlora.algorithms.merging import Spread, equal_ranks, residual, start, trained
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class LoRAFAIR(Algorithm[Tree, Tree, Mapping[str, Tree]]):
    """Averages A and B, then moves B towards the exact average of products, not far from where it was.

        A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   R = sum_i p_i B_i A_i - B A                  p_i = n_i / sum n
        B <- B + D,   D = argmin |R - D A|^2 + ridge |D|^2 = R A^T (A A^T + ridge I)^{-1}

    (the gradient -2 (R - D A) A^T + 2 ridge D is zero there). The paper minimises a cosine distance plus
    lambda |D| by SGD, lambda = 0.01; this is its least-squares form, solved at once. ``ridge = 0`` is the best B for
    this A, which the paper finds worse: clients then start far from the average. Equal ranks.

    Travels: A, B, shared extras, both ways. Stays: private extras. Paper: arXiv 2411.14961.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> fair, a = LoRAFAIR(ridge=1.0), torch.tensor([[1.0, 0.0]])
    >>> missed = {"q/W": torch.tensor([[4.0, 9.0], [0.0, 0.0], [2.0, 9.0]])}
    >>> fair.correction(missed, "q", a)                        # halved by the ridge; no B reaches the second column
    tensor([[2.],
            [0.],
            [1.]])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    ridge: NotNegative = 0.01

    @property
    def aggregator(self) -> Spread:
        return Spread()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "lora-fair")
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"))
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Mapping[str, Tree], round: int) -> Tree:
        change = dict(value["mean"])
        for site in ranks(state):
            averaged = state[f"{site}/A"].double() + change[f"{site}/A"]
            change[f"{site}/B"] = change[f"{site}/B"] + self.correction(residual(value, site), site, averaged)
        return add(state, change)

    def correction(self, missed: Tree, site: str, right: Tensor) -> Tensor:
        """D (out, r) for the residual of a site and A (r, in)."""
        gram = right @ right.T + self.ridge * torch.eye(len(right), dtype=right.dtype)
        return product(missed, site) @ right.T @ linalg.pinv(gram, hermitian=True)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"personal" if self.extras.personal else "global": Model({**payload, **memory})}
        yield
