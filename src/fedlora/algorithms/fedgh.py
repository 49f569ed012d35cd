"""FedGH: representations by class travel, the server trains one head on them (arXiv 2303.13137)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.algorithms.merging import needs_labels
from fedlora.algorithms.prototypes import malformed, packed, packed_shape, unpacked
from fedlora.federation.aggregate import Collect
from fedlora.federation.algorithm import Algorithm, Kind, Positive, Update, Whole
from fedlora.federation.orders import Features, Model, Training, Work
from fedlora.federation.spec import Client, Local, ModelSpec, Shape, Tree


@dataclass(frozen=True)
class FedGH(Algorithm[Tree, Tree, Any]):
    """Every client owns its model; a head for all is trained on the server, on what the clients' classes look like.

        client i:  theta_i, H_i <- local training of f_theta_i and the head, begun at the received H
                   h_ic = mean of f_theta_i(x) over its examples of class c
        server:    for every i and c:  H <- H - lr grad CE(H h_ic, c)           ``epochs`` times, in the order of ids

    Deployed: "global-head", the private representation under the head as received; variant "own-head", under the head
    as the client last trained it.

    Travels: up, per class held, its number, the sum of representations and a count; down, the head. Stays: the private
    model (``extras`` do not apply). Paper: arXiv 2303.13137.

    >>> head = {"head/weight": torch.zeros(2, 2), "head/bias": torch.zeros(2)}
    >>> rows = torch.tensor([[1.0, 4.0, 8.0, 4.0]])   # four examples of class 1, their mean is (2, 1)
    >>> FedGH(lr=1.0).server_update(head, {"a": {"arrays": {"rows": rows}, "weight": 1.0}}, round=1)
    {'head/weight': tensor([[-1.0000, -0.5000],
            [ 1.0000,  0.5000]]), 'head/bias': tensor([-0.5000,  0.5000])}
    """

    given_start = False
    private_backbones = True
    adapts = False

    training: Training = field(default_factory=Training)
    lr: Positive = 0.01
    epochs: Whole = 1

    @property
    def aggregator(self) -> Collect:
        return Collect()

    def server_init(self, spec: ModelSpec, seed: int) -> Tree:
        needs_labels(spec, "fedgh")
        return {name: value for name, value in spec.start(seed).items() if name.startswith("head/")}

    def broadcast(self, state: Tree, client: Client, round: int) -> Tree:
        return state

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        whose = local.client.backbone
        model = Model({**memory, **payload}, backbone=whose)
        tuned = yield from self.training.fit(local, model, ("backbone", "head"))
        features, labels = yield from Features(Model(tuned.params, backbone=whose), "train")
        return Update(packed(features, labels), local.examples, tuned.sums), tuned.params

    def expects(self, state: Tree, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return packed_shape(state["head/weight"].shape[1])

    def objection(self, state: Tree, client: Client, update: Update, kind: Kind) -> str | None:
        return malformed(update.arrays["rows"], len(state["head/weight"]), update.weight)

    def server_update(self, state: Tree, value: Any, round: int) -> Tree:
        seen = [
            (c, total / count)
            for _, sent in sorted(value.items())
            for c, (count, total) in unpacked(sent["arrays"]["rows"]).items()
        ]
        head = {name: tensor.double() for name, tensor in state.items()}
        for c, mean in seen * self.epochs:
            head = self.step(head, c, mean)
        return {name: tensor.to(state[name].dtype) for name, tensor in head.items()}

    def step(self, head: Mapping[str, Tensor], c: int, mean: Tensor) -> dict[str, Tensor]:
        """One step of gradient descent on CE(W h + b, c): its gradient by the logits is softmax - onehot."""
        bias = head.get("head/bias")
        scores = head["head/weight"] @ mean
        error = (scores if bias is None else scores + bias).softmax(0)
        error[c] -= 1
        moved = {"head/weight": head["head/weight"] - self.lr * torch.outer(error, mean)}
        return moved if bias is None else {**moved, "head/bias": bias - self.lr * error}

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        whose = local.client.backbone
        return {
            "global-head": Model({**memory, **payload}, backbone=whose),
            "own-head": Model({**payload, **memory}, backbone=whose),
        }
        yield
