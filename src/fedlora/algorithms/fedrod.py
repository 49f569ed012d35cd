"""FedRoD: a generic model for balanced classes, and a private head beside its own (arXiv 2107.00778)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, difference, shapes
from fedlora.algorithms.merging import Unsuitable, equal_ranks, needs_labels, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Update
from fedlora.federation.orders import Batch, Model, Optimizer, Outputs, Training, Work, label_loss
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

WEIGHT, BIAS = "extra/personal/weight", "extra/personal/bias"
COUNTS = "extra/counts"  # log of the client's class counts: read by the objective, never trained
ABSENT = -1e9  # log of a count of zero, finite


@dataclass(frozen=True)
class FedRoD(Algorithm[Tree, Tree, Tree]):
    """One model for everybody's classes, and on its features a head for the client's own: their logits add up.

        z = f(x),   g = head(z)      the generic model: adapter and head, averaged
        loss = CE(g + log n_i(y), y)                                       balanced softmax, n_i(y) the class counts
             + CE(sg[g] + P_i sg[z] + b_i, y)                              sg: without gradient
        theta <- theta + sum_i p_i (theta_i - theta),   p_i = n_i / sum n over the round
        deployed:  g + P_i z + b_i

    One pass trains both terms, and neither feels the other. P_i and b_i start at zero, at the head's learning rate; a
    client that never trained deploys the generic model. A class that a client lacks is left out of its softmax.
    Deployed: "personal"; variant "generic". Tasks without a head are refused. Equal ranks.

    Travels: A, B, shared extras with the head, both ways. Stays: P_i, b_i, private extras. Paper: arXiv 2107.00778 (its
    linear head; not the hypernetwork).

    >>> personal = {"extra/personal/weight": torch.ones(2, 3), "extra/personal/bias": torch.zeros(2)}
    >>> both(Outputs(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0, 1.0]])), personal)
    tensor([[4., 5.]])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "fedrod")
        if self.extras.head == "frozen":
            raise Unsuitable("fedrod trains a generic head", 'set [adapter.extras] head to "share"')
        return start(spec, seed, self.extras)

    def client_init(self, local: Local) -> Work[tuple[None, Tree]]:
        zeros = torch.zeros(len(local.spec.labels), local.spec.width, dtype=local.spec.dtype)
        return None, {WEIGHT: zeros, BIAS: zeros[:, 0].clone()}
        yield

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        equal_ranks(state, client, "fedrod")
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        model = Model({**payload, **memory, COUNTS: log_counts(local)})
        train = (*trained(local.spec, self.extras, "A", "B"), "extra/personal")
        training = replace(self.training, optimizer=as_head(self.training.optimizer))
        tuned = yield from training.fit(local, model, train, objective=balanced_and_personal)
        kept = self.extras.staying(tuned.params) | {key: tuned.params[key] for key in (WEIGHT, BIAS)}
        return Update(difference(tuned.params, payload), local.examples, tuned.sums), kept

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(difference(state, state))

    def server_update(self, state: Tree, value: Tree, round: int) -> Tree:
        return add(state, value)

    def server_model(self, state: Tree) -> Model | None:
        return None if self.extras.personal else Model(state)

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        generic = {key: value for key, value in memory.items() if key not in (WEIGHT, BIAS)}
        return {
            "personal": Model({**payload, **memory}, predict=both),
            "generic": Model({**payload, **generic}),
        }
        yield


def log_counts(local: Local) -> Tensor:
    """log n(y) of the client's training data; (labels,)."""
    counts = torch.tensor([local.label_counts.get(label, 0) for label in local.spec.labels], dtype=local.spec.dtype)
    return counts.log().clamp_min(ABSENT)


def as_head(optimizer: Optimizer) -> Optimizer:
    """The personal head at the head's learning rate."""
    rates = dict(reversed(optimizer.lrs))
    return replace(optimizer, lrs=(*optimizer.lrs, ("extra/personal", rates.get("head", optimizer.lr))))


def both(outputs: Outputs, params: Tree) -> Tensor:
    """g + P z + b: (examples, labels)."""
    return outputs.logits + outputs.features @ params[WEIGHT].T + params[BIAS]


def balanced_and_personal(outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
    """Balanced softmax of the generic logits, plus cross-entropy of the sum that only trains the personal head."""
    generic, own = outputs["model"], params["model"]
    fixed = Outputs(generic.logits.detach(), generic.features.detach())
    return label_loss(generic.logits + own[COUNTS], batch.labels) + label_loss(both(fixed, own), batch.labels)
