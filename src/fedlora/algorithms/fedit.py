"""FedIT: federated averaging of LoRA (arXiv 2305.05644), with the usual ways to strengthen it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.algorithms.merging import (
    Average,
    Bucket,
    Merging,
    Server,
    Svd,
    Unsuitable,
    adam,
    needs_labels,
    trained,
    yogi,
)
from fedlora.federation.algorithm import (
    Aggregator,
    Algorithm,
    Count,
    Decay,
    Kind,
    NotNegative,
    Positive,
    Update,
    Whole,
)
from fedlora.federation.orders import Model, Outputs, Proximal, Training, Work
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

State = Mapping[str, Any]
SHARE = "extra/share"  # the mean class shares, where ``prior`` is on
PRIOR = "extra/prior"  # what is added to the logits


@dataclass(frozen=True)
class FedIT(Algorithm[State, Tree, Tree]):
    """FedAvg on LoRA: A, B and head averaged, weighted by examples; ``finetune_epochs`` adds local fine-tuning.

        client i:  theta_i <- local training from theta        (+ proximal / 2 |theta_i - theta|^2: FedProx, 1812.06127)
        server:    d = sum_i p_i (theta_i - theta),  theta <- theta + step(d)         p_i = n_i / sum n over the round

    The average of factors is not the average of products; ``merge = "svd"`` is exact instead (FlexLoRA),
    ``merge = "bucket"`` puts everyone at ``bucket_rank`` (None: a run's smallest client's). ``server``: ``"avg"`` steps
    by d; ``"avgm"`` has momentum ``server_momentum`` (1909.06335), ``"adam"`` and ``"yogi"`` adapt per number with
    ``server_betas`` and ``server_tau`` (FedOpt, 2003.00295), all in float64; ``server_lr = None`` is 1 for the first
    two and 0.01 for the others. ``finetune_epochs`` more at home, at a constant rate, are variant "finetuned".
    ``prior``: variant "prior" adds ``log(client class share) - log(mean share)`` to the global model's logits, with
    ``prior_counts`` added to every class count so that no share is zero.

    Travels: A, B, shared extras, both ways; with ``prior`` one number a class. Stays: private extras. Paper: arXiv
    2305.05644.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> fedit = FedIT()
    >>> state = fedit.server_init(spec, seed=0)
    >>> state = fedit.server_update(state, {"q/B": torch.ones(3, 1).double()}, round=1)
    >>> fedit.broadcast(state, Client("a", {"q": 1}), round=2)["q/B"].T
    tensor([[1., 1., 1.]])
    """

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    proximal: NotNegative = 0.0
    merge: Literal["average", "svd", "bucket"] = "average"
    bucket_rank: Whole | None = None
    server: Literal["avg", "avgm", "adam", "yogi"] = "avg"
    server_lr: Positive | None = None
    server_momentum: Decay = 0.9
    server_betas: tuple[Decay, Decay] = (0.9, 0.99)
    server_tau: Positive = 1e-3
    finetune_epochs: Count = 0
    prior: bool = False
    prior_counts: Positive = 0.5

    @property
    def merging(self) -> Merging:
        """The way of merging that ``merge`` names."""
        return {"average": Average(), "svd": Svd(), "bucket": Bucket(self.bucket_rank)}[self.merge]

    @property
    def stepping(self) -> Server:
        """The server optimiser that ``server`` names."""
        first, second = self.server_betas
        table = {
            "avg": Server(),
            "avgm": Server(beta=self.server_momentum),
            "adam": Server(0.01, first, 1 - first, adam, second, self.server_tau),
            "yogi": Server(0.01, first, 1 - first, yogi, second, self.server_tau),
        }
        chosen = table[self.server]
        return chosen if self.server_lr is None else replace(chosen, lr=self.server_lr)

    @property
    def aggregator(self) -> Aggregator[Any, Tree]:
        return self.merging.aggregator

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        if self.merge == "svd" and self.stepping != Server():
            raise Unsuitable(
                "server optimisers step along averaged factors, and merge = 'svd' has none",
                "leave out server and server_lr, or use merge = 'average'",
            )
        merged = self.merging.init(spec, seed, self.extras)
        moments = {} if self.merge == "svd" else self.stepping.init(merged)
        state: dict[str, Any] = {"merged": merged, "moments": moments, "rounds": 0}
        if self.prior:
            needs_labels(spec, "prior = true")
            state["share"] = torch.full((len(spec.labels),), 1 / len(spec.labels), dtype=spec.dtype)
        return state

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        served = self.merging.serve(state["merged"], client)
        return {**served, SHARE: state["share"]} if self.prior else served

    def client_update(self, payload: Tree, memory: Tree, local: Local) -> Work[tuple[Update, Tree]]:
        received = {key: value for key, value in payload.items() if key != SHARE}
        near = Proximal(self.proximal, anchored(received)) if self.proximal else None
        model = Model({**received, **memory})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"), proximal=near)
        arrays = self.merging.send(tuned.params, received)
        if self.prior:
            arrays[SHARE] = self.shares(local) - payload[SHARE]
        return Update(arrays, local.examples, tuned.sums), self.extras.staying(tuned.params)

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        received = self.merging.serve(state["merged"], client)
        expected = self.merging.expects(received)
        return {**expected, SHARE: tuple(state["share"].shape)} if self.prior else expected

    def server_update(self, state: State, value: Tree, round: int) -> State:
        change: Tree = {key: entry for key, entry in value.items() if key != SHARE}
        moments, folded = state["moments"], state["rounds"] + 1
        if self.merge != "svd":
            change, moments = self.stepping.step(moments, change)
        merged = self.merging.update(state["merged"], change, round)
        state = {**state, "merged": merged, "moments": moments, "rounds": folded}
        if self.prior:  # the mean over rounds: with full participation exactly the clients' mean
            share: Tensor = state["share"]
            state["share"] = (share + value[SHARE] / folded).to(share.dtype)
        return state

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else self.merging.model(state["merged"])

    def personalize(self, payload: Tree, memory: Tree, local: Local) -> Work[Mapping[str, Model]]:
        params = {key: value for key, value in payload.items() if key != SHARE} | dict(memory)
        variants = {"personal" if self.extras.personal else self.merging.served: Model(params)}
        if self.finetune_epochs:  # the schedule ends near zero: what follows the last round has its own, full rate
            constant = replace(self.training, schedule="constant")
            train = trained(local.spec, self.extras, "A", "B")
            tuned = yield from constant.fit(local, Model(params), train, epochs=self.finetune_epochs)
            variants = {"finetuned": Model(tuned.params), **variants}
        if self.prior:
            shift = (self.shares(local).double().log() - payload[SHARE].double().log()).to(payload[SHARE].dtype)
            variants = {"prior": Model({**params, PRIOR: shift}, predict=with_prior), **variants}
        return variants

    def measures(self, state: State) -> Mapping[str, float]:
        return self.merging.measures(state["merged"])

    def shares(self, local: Local) -> Tensor:
        """The client's class shares, ``(count + prior_counts) / total``: (labels,)."""
        counts = [local.label_counts.get(label, 0) + self.prior_counts for label in local.spec.labels]
        return (torch.tensor(counts, dtype=torch.float64) / sum(counts)).to(local.spec.dtype)


def with_prior(outputs: Outputs, params: Tree) -> Tensor:
    """logits + extra/prior."""
    return outputs.logits + params[PRIOR]


def anchored(tree: Tree) -> dict[str, Tensor]:
    """What a proximal term pulls to: all but the scales."""
    return {key: value for key, value in tree.items() if not key.endswith("/scale")}
