"""Head-only: a frozen base under a linear head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import Unsuitable, needs_labels
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Model, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class HeadOnly(Algorithm[Tree, Tree, Tree]):
    """A linear head on the frozen base, averaged or private; no adapter. Whoever adapts must beat it.

        head_i <- local training from head;   head <- head + sum_i p_i (head_i - head),   p_i = n_i / sum n

    ``extras.head = "private"`` keeps every head at home, and nothing travels. Norms and embeddings stay frozen.

    Travels: the head, if shared. Stays: the head, if private. Tasks without labels are refused.

    >>> import torch
    >>> spec = ModelSpec({}, {}, {"head/bias": (2,)}, ("no", "yes"), width=3)
    >>> probe = HeadOnly()
    >>> probe.server_update(probe.server_init(spec, seed=0), {"head/bias": torch.ones(2).double()}, round=1)
    {'head/bias': tensor([1., 1.])}
    """

    given_start = False

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "head-only")
        if self.extras.head == "frozen":
            raise Unsuitable(
                "head-only trains nothing but the head", 'set [adapter.extras] head to "share" or "private"'
            )
        return heads(self.extras.travelling(spec.start(seed)))

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        tuned = yield from self.training.fit(local, Model({**payload, **memory}), ("head",))
        kept = heads(self.extras.staying(tuned.params))
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), kept

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(state)

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.head == "private" else Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        name = "personal" if self.extras.head == "private" else "global"
        return {name: Model({**payload, **memory})}
        yield


def heads(tree: Tree) -> Tree:
    """The head's entries."""
    return {key: value for key, value in tree.items() if key.startswith("head/")}
