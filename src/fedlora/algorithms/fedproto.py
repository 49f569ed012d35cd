"""FedProto: class prototypes travel, models stay (arXiv 2105.00243)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.algorithms.merging import needs_labels
from fedlora.algorithms.prototypes import ByClass, malformed, packed, packed_shape
from fedlora.federation.algorithm import Algorithm, Kind, NotNegative, Update
from fedlora.federation.orders import FORBIDDEN, Batch, Features, Model, Outputs, Training, Work, allowed, label_loss
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FedProto(Algorithm[Tree, Tree, Mapping[str, Tensor]]):
    """Every client owns its model; its representations are pulled towards class prototypes that all share.

        L = CE + strength * mean_d (h - P_y)^2        only for classes whose prototype exists
        P_c = sum_i sum_{examples of c at i} h / sum_i count_i(c)     a class that nobody held keeps its prototype

    Deployed: "head"; variant "nearest" predicts the class of the nearest prototype.

    Travels: up, per class held, its number, the sum of representations and a count; down, all prototypes. Stays: the
    whole private model with its head (``extras`` do not apply). Paper: arXiv 2105.00243.

    >>> import torch
    >>> spec, proto = ModelSpec({}, {}, {}, ("no", "yes"), width=2), FedProto()
    >>> sums = {"0": torch.tensor([2.0, 4.0, 2.0])}   # of class 0, two examples
    >>> proto.server_update(proto.server_init(spec, seed=0), sums, round=1)
    {'extra/prototypes': tensor([[2., 1.],
            [0., 0.]]), 'extra/known': tensor([1., 0.])}
    """

    given_start = False
    private_backbones = True
    adapts = False

    training: Training = field(default_factory=Training)
    strength: NotNegative = 1.0

    @property
    def aggregator(self) -> ByClass:
        return ByClass()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "fedproto")
        return {
            "extra/prototypes": torch.zeros(len(spec.labels), spec.width, dtype=spec.dtype),
            "extra/known": torch.zeros(len(spec.labels), dtype=spec.dtype),
        }

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        whose = local.client.backbone
        model = Model({**memory, **payload}, backbone=whose)
        tuned = yield from self.training.fit(local, model, ("backbone", "head"), objective=Attracted(self.strength))
        features, labels = yield from Features(Model(tuned.params, backbone=whose), "train")
        private = {key: value for key, value in tuned.params.items() if key not in payload}
        return Update(packed(features, labels), local.examples, tuned.sums), private

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return packed_shape(state["extra/prototypes"].shape[1])

    def objection(self, state: Tree, client: Client, update: Update, kind: Kind) -> str | None:
        return malformed(update.arrays["rows"], len(state["extra/known"]), update.weight)

    def server_update(self, state: Tree, value: Mapping[str, Tensor], round: int) -> Tree:
        prototypes, known = state["extra/prototypes"].clone(), state["extra/known"].clone()
        for c in value:
            prototypes[int(c)] = (value[c][1:] / value[c][0]).to(prototypes.dtype)
            known[int(c)] = 1
        return {"extra/prototypes": prototypes, "extra/known": known}

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        params, whose = {**memory, **payload}, local.client.backbone
        return {"head": Model(params, backbone=whose), "nearest": Model(params, backbone=whose, predict=nearest)}
        yield


@dataclass(frozen=True)
class Attracted:
    """Cross-entropy, and nearness to the prototypes that exist."""

    strength: float

    def __call__(self, outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
        out, own = outputs["model"], params["model"]
        prototypes, known = own["extra/prototypes"][batch.labels], own["extra/known"][batch.labels]
        pull = (out.features - prototypes).square().mean(-1) * known
        return label_loss(out.logits, batch.labels) + self.strength * pull


def nearest(outputs: Outputs, params: Tree) -> Tensor:
    """Minus the squared distance to every known prototype: (examples, labels)."""
    distance = (outputs.features[:, None] - params["extra/prototypes"]).square().sum(-1)
    return allowed((-distance).masked_fill(params["extra/known"] == 0, FORBIDDEN), outputs)
