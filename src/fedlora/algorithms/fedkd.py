"""FedKD: a private teacher and a shared student, whose updates travel in few singular vectors (arXiv 2108.13323)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.algebra import add, cast, difference, linalg
from fedlora.algorithms.distillation import divergence
from fedlora.algorithms.merging import equal_ranks, needs_labels, received, sent, start, trained
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Kind, Share, Update
from fedlora.federation.orders import Batch, Model, Outputs, Training, Work, label_loss
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Tree

Memory = Mapping[str, Any]
State = Mapping[str, Any]
LEAST = 1e-2  # D of models that have nothing left to learn, or a single label: without a floor steps have no bound


@dataclass(frozen=True)
class FedKD(Algorithm[State, Memory, Tree]):
    """A private model (teacher t) and a shared one (student s) learn from the labels and from each other.

    They teach the more the better both are, and the student's updates travel compressed.

        D = max(CE_t + CE_s, 0.01), a constant                hidden = mean_d (h_t - W h_s)^2
        L_t = CE_t + (KL(s || t) + hidden) / D                L_s = CE_s + (KL(t || s) + hidden) / D
        client:  sends U_K S_K V_K^T of every matrix of theta_i - theta, with the smallest K whose singular values hold
                 the share T of the squared norm; T goes from ``energy`` to ``last_energy`` over the rounds
        server:  theta <- theta + the same of sum_i p_i (theta_i - theta), which is all that it sends of it,
                 p_i = n_i / sum n over the round

    CE in D is the mean over the batch, or over the part of it that is in one pass where ``[engine] tokens`` cuts it.
    Teachers are constants in each other's KL; W (width x width, begins as the identity) stays home. Attentions are not
    compared: models of different kinds have none in common. Deployed: "private"; variant "shared". Equal ranks.

    Travels: up and down, compressed changes of the student's A, B and shared extras; a client that missed rounds gets
    all it missed. Stays: the private model with its head, W, private extras of the student. With ``[adapter] targets =
    []`` and ``extras = {backbone = "share"}`` the student is a whole model, as in the paper. Paper: arXiv 2108.13323.

    >>> left, right = compressed(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.9)   # 9 of 10 lie in the first
    >>> (left.T @ right).abs().round()
    tensor([[3., 0.],
            [0., 0.]])
    """

    private_backbones = True

    training: Training = field(default_factory=Training)
    extras: Extras = field(default_factory=Extras)
    energy: Share = 0.95
    last_energy: Share = 0.98

    @property
    def aggregator(self) -> Expanded:
        return Expanded()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        needs_labels(spec, "fedkd")
        return {"student": start(spec, seed, self.extras), "changes": {}}

    def client_init(self, local: Local) -> Work[tuple[None, Memory]]:
        identity = torch.eye(local.spec.width, dtype=local.spec.dtype)
        return None, {"private": {}, "staying": {"extra/map": identity}}
        yield

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        equal_ranks(state["student"], client, "fedkd")
        return sent(state["changes"])

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        begun = self.student(payload, local)
        sites = ("A", "B") if local.spec.sites else ()
        tuned = yield from self.training.fit(
            local,
            self.models(begun, memory, local),
            {
                "private": trained(local.spec, Extras(head="private"), "backbone"),
                "shared": trained(local.spec, self.extras, *sites, "extra"),
            },
            objective=adaptive,
        )
        student, progress = tuned.models["shared"], local.round / max(local.rounds, 1)
        share = self.energy + (self.last_energy - self.energy) * progress
        arrays = {"energy": torch.tensor(share, dtype=local.spec.dtype)}
        for name, change in difference(student, begun).items():
            arrays |= packed(name, change, share)
        staying = {**self.extras.staying(student), "extra/map": student["extra/map"]}
        kept = {"private": tuned.models["private"], "staying": staying}
        return Update(arrays, local.examples, tuned.sums), kept

    def student(self, payload: Tree, local: Local) -> Tree:
        """The server's student: the start, which all share, and every change since."""
        tree: Tree = start(local.spec, local.run_seed, self.extras)
        for change in received(payload)[1]:
            tree = moved(tree, change)
        return tree

    def models(self, begun: Tree, memory: Memory, local: Local) -> dict[str, Model]:
        """Teacher and student."""
        own = Model(memory["private"], backbone=local.client.backbone)
        return {"private": own, "shared": Model({**begun, **memory["staying"]})}

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        expected: dict[str, Shape] = {"energy": ()}
        for name, value in difference(state["student"], state["student"]).items():
            if value.dim() < 2:
                expected[name] = tuple(value.shape)
            else:
                expected[f"{name}:left"] = (-1, value.shape[0])
                expected[f"{name}:right"] = (-1, value[0].numel())
        return expected

    def server_update(self, state: State, value: Tree, round: int) -> State:
        share, change = float(value["energy"]), dict[str, Tensor]()
        for name, mean in value.items():
            if name != "energy":
                change |= cast(packed(name, mean, share), state["student"][name].dtype)
        return {"student": moved(state["student"], change), "changes": {**state["changes"], f"{round:06d}": change}}

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else Model(state["student"])

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        return self.models(self.student(payload, local), memory, local)
        yield


def compressed(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(K, rows) and (K, columns) whose left^T right is the matrix's best rank-K approximation: the smallest K from 1
    that holds the share of its squared norm."""
    u, s, vh = linalg.svd(matrix, full_matrices=False)
    held = s.square().cumsum(0)
    k = min(int((held < share * held[-1]).sum()) + 1, len(s))
    return (u[:, :k] * s[:k]).T.contiguous(), vh[:k].contiguous()


def packed(name: str, change: Tensor, share: float) -> dict[str, Tensor]:
    """A change as it travels: matrices (an array's first dimension against the others) compressed, vectors as they
    are."""
    if change.dim() < 2:
        return {name: change}
    left, right = compressed(change.flatten(1), share)
    return {f"{name}:left": left, f"{name}:right": right}


def expanded(arrays: Tree) -> dict[str, Tensor]:
    """The inverse of ``packed``, matrices in float64; foreign numbers of rows are cut to what both sides have."""
    found = {name: value for name, value in arrays.items() if ":" not in name}
    for name in (key.removesuffix(":left") for key in arrays if key.endswith(":left")):
        left, right = arrays[f"{name}:left"].double(), arrays[f"{name}:right"].double()
        rows = min(len(left), len(right))
        found[name] = left[:rows].T @ right[:rows]
    return found


def moved(student: Tree, change: Tree) -> dict[str, Tensor]:
    """The student after a change that travelled compressed."""
    return add(student, {name: value.reshape(student[name].shape) for name, value in expanded(change).items()})


@dataclass(frozen=True)
class Expanded:
    """The weighted mean of what the compressed updates stand for."""

    streaming = True
    linear = True  # in the expanded update

    def zero(self) -> dict[str, Any]:
        return Mean().zero()

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        return Mean().accumulate(acc, client, Update(expanded(update.arrays), update.weight, {}))

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        return Mean().merge(a, b)

    def report(self, acc: Mapping[str, Any]) -> dict[str, Tensor]:
        return Mean().report(acc)


def adaptive(outputs: Mapping[str, Outputs], params: Mapping[str, Tree], batch: Batch) -> Tensor:
    """L_t + L_s per example."""
    teacher, student = outputs["private"], outputs["shared"]
    own, other = label_loss(teacher.logits, batch.labels), label_loss(student.logits, batch.labels)
    doubt = (own.mean() + other.mean()).detach().clamp_min(LEAST)
    hidden = (teacher.features - student.features @ params["shared"]["extra/map"].T).square().mean(-1)
    mutual = divergence(teacher.logits, student.logits) + divergence(student.logits, teacher.logits)
    # each side's own hidden term: one sum has the gradients of both, for each reaches only its own model
    return own + other + (mutual + hidden) / doubt
