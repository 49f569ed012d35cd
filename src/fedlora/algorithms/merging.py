"""Ways to merge adapters on the server, as values that algorithms are given; and what algorithms demand of clients.

An average of factors is not the average of products: ``mean(B_i) mean(A_i) != mean(B_i A_i)``. ``Average`` and
``Bucket`` live with it, ``Svd`` (FlexLoRA) does not. Whole parameters are n_i-weighted means in all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.adapters.algebra import (
    FACTORS,
    adapter,
    add,
    cast,
    difference,
    part,
    ranks,
    shapes,
    sites,
    whole,
    zeros,
)
from fedlora.adapters.lowrank import truncate
from fedlora.errors import UserError
from fedlora.federation.aggregate import Mean, Products
from fedlora.federation.algorithm import Aggregator, Update
from fedlora.federation.orders import Model
from fedlora.federation.spec import Client, Extras, ModelSpec, Shape, Tree, derive

State = Mapping[str, Any]


class Unsuitable(UserError, ValueError):
    """An algorithm that cannot run on this model or with these clients."""


def equal_ranks(tree: Tree, client: Client, name: str, remedy: str = "use flexlora, flora or hetlora") -> None:
    """Refuses a client whose ranks (clamped to the sites' sizes) are not those of the server's adapter."""
    held = ranks(tree)
    if client.ranks == held:
        return
    sizes = {site: (tree[f"{site}/A"].shape[1], tree[f"{site}/B"].shape[0]) for site in held}
    own = {site: min(client.ranks[site], *sizes[site]) for site in held}
    if own != held:
        first = next(site for site in held if own[site] != held[site])
        raise Unsuitable(
            f"{name}: ranks must be equal, but client {client.id!r} has rank {own[first]} at {first!r}, "
            f"the server {held[first]}",
            f"give every client the same rank, or {remedy}",
        )


def needs_labels(spec: ModelSpec, name: str) -> None:
    """Refuses a task without classes."""
    if not spec.labels:
        raise Unsuitable(f"{name} needs a task with labels, and this one has none", "use a classification task")


def private_head(spec: ModelSpec, extras: Extras, name: str) -> None:
    """Refuses a task without a head, or a head that does not stay at home."""
    needs_labels(spec, name)
    if extras.head != "private":
        raise Unsuitable(
            f"{name} keeps every client's head at home, and [adapter.extras] head is {extras.head!r}",
            'set it to "private", or use fedit',
        )


def kept_base(extras: Extras, name: str, at_home: bool = False) -> None:
    """Refuses to train the base itself where a model is a change of it, which is not put on other weights; ``at_home``:
    clients' own models are none, so that theirs may train."""
    if extras.backbone == "share" or (extras.backbone == "private" and not at_home):
        raise Unsuitable(
            f"{name} changes the weights that all share, and [adapter.extras] backbone is {extras.backbone!r}",
            'leave it "frozen", or use fedit, which averages adapters and base',
        )


def adapted(spec: ModelSpec) -> None:
    """Refuses a model without a layer to adapt."""
    if not spec.sites:
        raise Unsuitable(
            "this algorithm trains adapters, and no layer is adapted: [adapter] targets is []",
            "leave targets out, or train heads alone with head-only",
        )


def start(spec: ModelSpec, seed: int, extras: Extras) -> dict[str, Tensor]:
    """What a server of averages starts from: the adapter at the largest ranks and the whole parameters that travel."""
    return spec.adapter(spec.ranks, seed) | extras.travelling(spec.start(seed))


def trained(spec: ModelSpec, extras: Extras, *factors: str) -> tuple[str, ...]:
    """Selectors of a fit: the factors and the whole parameters that train, where the model has any.

    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {"head/bias": (2,)}, ("no", "yes"), width=3)
    >>> trained(spec, Extras(head="private", norm="share"), "A", "B")
    ('A', 'B', 'head')
    """
    if set(factors) & set(FACTORS):
        adapted(spec)
    present = {name.split("/", 1)[0] for name in spec.whole}
    return (*factors, *(kind for kind in extras.trained if kind in present))


def scaling(spec: ModelSpec) -> dict[str, Any]:
    """The rule of scales as plain values, for states."""
    return {"alpha": float(spec.alpha), "rule": spec.scaling, "ranks": dict(spec.ranks)}


def sliced(tree: Tree, client: Client, rule: State) -> dict[str, Tensor]:
    """An adapter as a client of smaller ranks receives it: the first rows of A and columns of B, at the client's scale.

    ``s_r B A`` of what is served is ``s B[:, :r] A[:r]`` of what is held. Where scales agree nothing is copied: a
    thousand clients are served views.
    """
    wanted = {site: min(client.ranks[site], rank) for site, rank in ranks(tree).items()}
    largest = rule["ranks"] if rule["rule"] == "shared" else wanted
    served: dict[str, Tensor] = {}
    for site, rank in wanted.items():
        left, scale = tree[f"{site}/B"][:, :rank], tree[f"{site}/scale"]
        own = torch.tensor(rule["alpha"] / largest[site], dtype=scale.dtype)
        served[f"{site}/A"] = tree[f"{site}/A"][:rank]
        served[f"{site}/B"] = left if torch.equal(own, scale) else left * (scale / own)
        served[f"{site}/scale"] = own
    return served


def sent(merges: Mapping[str, Tree]) -> dict[str, Tensor]:
    """Changes of the base as they travel, by the round they were made in: a wire that remembers what a peer holds sends
    only the new ones, and a client that missed rounds gets all it missed."""
    return {f"{when}:{key}": value for when, merge in merges.items() for key, value in merge.items()}


def received(payload: Tree) -> tuple[dict[str, Tensor], tuple[Tree, ...]]:
    """The inverse at a client: everything else, and the merges, oldest first."""
    merges: dict[str, dict[str, Tensor]] = {}
    for key in sorted(key for key in payload if ":" in key):
        when, name = key.split(":", 1)
        merges.setdefault(when, {})[name] = payload[key]
    return {key: value for key, value in payload.items() if ":" not in key}, tuple(merges.values())


class Merging(Protocol):
    """How updates become the server's next adapter, and what each client receives of it."""

    @property
    def served(self) -> str:
        """The name of what a client receives, as a variant."""
        ...

    @property
    def aggregator(self) -> Aggregator[Any, Tree]: ...
    def init(self, spec: ModelSpec, seed: int, extras: Extras) -> State: ...
    def serve(self, state: State, client: Client) -> Tree: ...
    def send(self, tuned: Tree, payload: Tree) -> dict[str, Tensor]:
        """What a client sends after training what it received."""
        ...

    def expects(self, payload: Tree) -> dict[str, Shape | None]:
        """The names and shapes of that."""
        ...

    def update(self, state: State, value: Tree, round: int) -> State: ...
    def model(self, state: State) -> Model:
        """The server's model."""
        ...

    def measures(self, state: State) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Average:
    """A and B averaged separately: ``A <- A + sum p_i (A_i - A)``, B likewise. Equal ranks.

    State: the tree. Sent: differences from what was received.
    """

    @property
    def served(self) -> str:
        return "global"

    @property
    def aggregator(self) -> Mean:
        return Mean()

    def init(self, spec: ModelSpec, seed: int, extras: Extras) -> State:
        return start(spec, seed, extras)

    def serve(self, state: State, client: Client) -> Tree:
        equal_ranks(state, client, "averaging factors", "use merge = 'svd' or flexlora")
        return state

    def send(self, tuned: Tree, payload: Tree) -> dict[str, Tensor]:
        return difference(tuned, payload)

    def expects(self, payload: Tree) -> dict[str, Shape | None]:
        return shapes({key: value for key, value in payload.items() if not key.endswith("/scale")})

    def update(self, state: State, value: Tree, round: int) -> State:
        return add(state, value)

    def model(self, state: State) -> Model:
        return Model(state)

    def measures(self, state: State) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class Bucket(Average):
    """``Average`` with everyone at the smallest client's rank: what larger clients could hold is not used."""

    rank: int | None = None

    def init(self, spec: ModelSpec, seed: int, extras: Extras) -> State:
        if self.rank is None:
            raise Unsuitable("merge = 'bucket' needs the rank that every client can hold", "set bucket_rank to it")
        small = {site: min(self.rank, largest) for site, largest in spec.ranks.items()}
        for site, rank in small.items():
            if (given := len(spec.pretrained.get(f"{site}/A", ()))) > rank:
                raise Unsuitable(
                    f"the bucket has rank {rank} at {site!r}, and the adapter that the run starts from has {given}",
                    f"set bucket_rank to {given} or more, or start from none",
                )
        return spec.adapter(small, seed) | extras.travelling(spec.start(seed))

    def serve(self, state: State, client: Client) -> Tree:
        for site, rank in ranks(state).items():
            if client.ranks[site] < rank:
                raise Unsuitable(
                    f"client {client.id!r} has rank {client.ranks[site]} at {site!r}, below the bucket's {rank}",
                    f"set bucket_rank = {client.ranks[site]}",
                )
        return state


@dataclass(frozen=True)
class Svd:
    """FlexLoRA: ``dW = sum p_i s_i B_i A_i``, exact; a client of rank r is served its best rank-r approximation.

    ``A = V_r^T`` (orthonormal rows), ``B = U_r S_r / s_r``. One decomposition a round, at the largest rank: smaller
    clients get a slice of it. Rows without a singular value come from a seeded completion and signs are fixed, so that
    the order of replies decides nothing. "Global" is dW itself, undecomposed.

    State: ``served`` (A, B at the largest ranks), ``exact`` (dW, stacked factors or dense), ``whole``, ``error`` (share
    of |dW| that the largest rank cannot hold, per site). Sent: factors as values, whole parameters as differences.
    """

    @property
    def served(self) -> str:
        return "truncated"

    @property
    def aggregator(self) -> Products:
        return Products(wide=False)  # float32 sums leave 4e-7; what is served may be off by 1e-5

    def init(self, spec: ModelSpec, seed: int, extras: Extras) -> State:
        kept_base(extras, "merging by SVD", at_home=True)
        first = spec.adapter(spec.ranks, seed)
        return {
            "seed": seed,
            "scaling": scaling(spec),
            "served": first,
            "exact": first,
            "whole": extras.travelling(spec.start(seed)),
            "error": dict.fromkeys(spec.sites, 0.0),
        }

    def serve(self, state: State, client: Client) -> Tree:
        return sliced(state["served"], client, state["scaling"]) | state["whole"]

    def send(self, tuned: Tree, payload: Tree) -> dict[str, Tensor]:
        return {key: tuned[key] for key in adapter(payload)} | difference(tuned, whole(payload))

    def expects(self, payload: Tree) -> dict[str, Shape | None]:
        return shapes(payload)

    def update(self, state: State, value: Tree, round: int) -> State:
        served, errors = dict(state["served"]), dict(state["error"])
        for site in sites(value):
            held = served[f"{site}/A"]
            seed = derive(state["seed"], round, site)
            right, left, errors[site] = truncate(value, site, held.shape[0], seed, start=held)
            left = left / served[f"{site}/scale"].double()
            served |= cast({f"{site}/A": right, f"{site}/B": left}, held.dtype)
        dtype = next(iter(served.values())).dtype
        exact = cast(adapter(value), dtype)
        return {**state, "served": served, "exact": exact, "whole": add(state["whole"], whole(value)), "error": errors}

    def model(self, state: State) -> Model:
        return Model(state["whole"], shared=(state["exact"],))

    def measures(self, state: State) -> Mapping[str, float]:
        return {f"truncation/{site}": error for site, error in state["error"].items()}


@dataclass(frozen=True)
class Spread:
    """The means of what was sent, and the exact mean product of the factors: what averaging factors misses.

        sum p_i B_i A_i - mean(B) mean(A) = sum p_i dB_i dA_i - mean(dB) mean(dA)

    for A_i = A + dA_i and B_i = B + dB_i: a covariance, so that differences from a common start are enough. The report
    holds both terms, ``mean`` and ``products``; ``residual`` subtracts them.
    """

    streaming = True
    linear = True  # in the lifted update (dA, dB, dB dA)

    def zero(self) -> dict[str, Any]:
        return {"mean": Mean().zero(), "products": Products().zero()}

    def accumulate(self, acc: Mapping[str, Any], client: Client, update: Update) -> dict[str, Any]:
        pairs = part(update.arrays, ("A", "B"))
        one = {f"{site}/scale": torch.ones((), dtype=torch.float64) for site in sites(pairs)}
        products = Products().accumulate(acc["products"], client, Update(pairs | one, update.weight, {}))
        return {"mean": Mean().accumulate(acc["mean"], client, update), "products": products}

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        products = Products().merge(a["products"], b["products"])
        return {"mean": Mean().merge(a["mean"], b["mean"]), "products": products}

    def report(self, acc: Mapping[str, Any]) -> dict[str, Any]:
        return {"mean": Mean().report(acc["mean"]), "products": Products().report(acc["products"])}


def residual(value: Mapping[str, Tree], site: str) -> dict[str, Tensor]:
    """``sum p_i B_i A_i - mean(B) mean(A)`` of one site from a ``Spread``, stacked factors (scale 1) or dense."""
    products, right, left = value["products"], value["mean"][f"{site}/A"], value["mean"][f"{site}/B"]
    if f"{site}/W" in products:
        return {f"{site}/W": products[f"{site}/W"] - left @ right}
    return {
        f"{site}/A": torch.cat([products[f"{site}/A"], right]),
        f"{site}/B": torch.cat([products[f"{site}/B"], -left], 1),
        f"{site}/scale": torch.ones((), dtype=torch.float64),
    }


Second = Callable[[Tensor, Tensor, float], Tensor]


def adam(moment: Tensor, change: Tensor, beta: float) -> Tensor:
    """v <- beta v + (1 - beta) d^2."""
    return beta * moment + (1 - beta) * change.square()


def yogi(moment: Tensor, change: Tensor, beta: float) -> Tensor:
    """v <- v - (1 - beta) d^2 sign(v - d^2)."""
    return moment - (1 - beta) * change.square() * (moment - change.square()).sign()


@dataclass(frozen=True)
class Server:
    """How a server steps along a round's mean difference d (FedAvgM 1909.06335, FedOpt 2003.00295), in float64.

    ``m <- beta m + gain d``, then ``step = lr m``, or with a second moment ``step = lr m / (sqrt(v) + tau)``, where v
    starts at tau^2. No bias correction, as published.
    """

    lr: float = 1.0
    beta: float = 0.0
    gain: float = 1.0
    second: Second | None = None
    beta2: float = 0.0
    tau: float = 0.0

    def init(self, tree: Tree) -> dict[str, Any]:
        """The moments before the first round; nothing where nothing is remembered."""
        nothing = cast(zeros(tree), torch.float64)
        return {
            "m": nothing if self.beta else {},
            "v": {key: value + self.tau**2 for key, value in nothing.items()} if self.second else {},
        }

    def step(self, moments: Mapping[str, Any], change: Tree) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The step, and the new moments."""
        change = cast(change, torch.float64)
        first = {key: self.gain * value for key, value in change.items()}
        if self.beta:
            first = {key: self.beta * moments["m"][key] + value for key, value in first.items()}
        kept = first if self.beta else {}
        if self.second is None:
            return {key: self.lr * value for key, value in first.items()}, {"m": kept, "v": {}}
        second = {key: self.second(moments["v"][key], value, self.beta2) for key, value in change.items()}
        step = {key: self.lr * value / (second[key].sqrt() + self.tau) for key, value in first.items()}
        return step, {"m": kept, "v": second}
