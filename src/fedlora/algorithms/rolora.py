"""RoLoRA: rounds alternate between the factors (arXiv 2409.02346)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, part, shapes, whole
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class RoLoRA(Algorithm[Tree, Tree, Tree]):
    """Odd rounds train and average B with A fixed, even rounds A with B fixed: each average is exact.

        round 1, 3, ...:  B <- B + sum_i p_i (B_i - B)        round 2, 4, ...:  A <- A + sum_i p_i (A_i - A)

    B comes first: at B = 0 a round of A has no gradient. p_i = n_i / sum n over the round. Equal ranks.

    Travels: up, the round's factor and shared extras; down, both factors, because a client may have missed rounds.
    Stays: private extras. Paper: arXiv 2409.02346.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> rolora, a = RoLoRA(), Client("a", {"q": 1})
    >>> state = rolora.server_init(spec, seed=0)
    >>> [list(rolora.expects(state, a, round, "train")) for round in (1, 2, 3)]
    [['q/B'], ['q/A'], ['q/B']]
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        return start(spec, seed, self.extras)

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "rolora")
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, factor(local.round)))
        arrays = difference(tuned.params, part(payload, (factor(local.round),)) | whole(payload))
        return Update(arrays, local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(part(state, (factor(round),)) | whole(state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        return {"personal" if self.extras.personal else "global": Model({**payload, **memory})}
        yield


def factor(round: int) -> str:
    """The factor that a round trains: B, A, B, ..."""
    return "B" if round % 2 else "A"
