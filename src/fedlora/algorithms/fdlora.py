"""FDLoRA: a personalised and a global adapter, fused without gradients (arXiv 2406.07925)."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedlora.adapters.algebra import adapter, add, cast, difference, shapes, whole, zeros
from fedlora.algorithms.merging import equal_ranks, start, trained
from fedlora.errors import UserError
from fedlora.federation.aggregate import Mean
from fedlora.federation.algorithm import Algorithm, Count, Decay, Kind, NotNegative, Update
from fedlora.federation.orders import Model, Optimizer, Score, Split, Training, Work, scores
from fedlora.federation.spec import Client, Extras, Local, ModelSpec, Shape, Sums, Tree

State = Mapping[str, Any]
Memory = Mapping[str, Any]
Point = tuple[float, float]
FEW = 4  # held-out examples below which the fusion is fitted on the training data


@dataclass(frozen=True)
class FDLoRA(Algorithm[State, Memory, Tree]):
    """Dual LoRA: a personalised adapter that stays and a global one that travels, blended per client by search.

        stage 1   theta_p(i) <- local tuning from one shared start;    theta_s(0) <- mean_i theta_p(i)    [introduction]
        stage 2   theta_s(i) <- InnerOpt(theta_s);  every H of its own rounds theta_p(i) <- theta_s(i)
                  Delta = mean_i (theta_s - theta_s(i));  v <- mu v + Delta;  theta_s <- theta_s - eta (Delta + mu v)
        stage 3   theta(w1, w2) = w1 theta_p + w2 theta_s per factor, minimising loss(few-shot) + lambda (|w1| + |w2|)

    Means are unweighted. Stage 1 takes ``stage1_epochs``, InnerOpt is ``[training]``, mu ``outer_momentum``, eta
    ``outer_lr``, lambda ``penalty``. The few-shot set is all of "holdout", which no stage trains on: an eighth of the
    training data unless a run brings its own. Below 4 examples it is the training data. The search is CMA-ES within
    [-1.5, 1.5], ``generations`` of ``population`` candidates that are scored together (2 at least); (1, 0), (0, 1) and
    (1/2, 1/2) are always scored too, and the best scored point wins. There is a head per adapter, blended with |w1| /
    (|w1| + |w2|); the paper has none, so heads learn as fast as elsewhere here. ``sync_every`` is H, in rounds of the
    client's own (0 or None: never); the last round does not sync unless ``sync_last``. ``fusion = "product"`` puts both
    adapters side by side instead (rank 2r). Equal ranks. Deployed: "fused"; variants "personal", "global", "average".

    Travels: theta_p once as a difference from the seeded start, then theta_s and its shared extras, both ways. Stays:
    theta_p and its head, the weights, private extras. Paper: arXiv 2406.07925. Needs ``pip install 'fedlora[fdlora]'``.

    >>> import torch
    >>> spec = ModelSpec({"q": (3, 2)}, {"q": 1}, {}, (), width=3)
    >>> fdlora = FDLoRA(outer_momentum=0.5)
    >>> state, change = fdlora.server_init(spec, seed=0), {"q/A": torch.zeros(1, 2), "q/B": torch.ones(3, 1)}
    >>> state = fdlora.server_update(state, change, round=1)
    >>> state["theta"]["q/B"].T     # Nesterov: eta (1 + mu) Delta
    tensor([[1.5000, 1.5000, 1.5000]])
    """

    introduce_everyone: ClassVar[bool] = True

    training: Training = field(
        default_factory=lambda: Training(epochs=3, optimizer=Optimizer("adamw", 2e-4, lrs=(("head", 2e-2),)))
    )
    extras: Extras = field(default_factory=Extras)
    stage1_epochs: Count = 3
    outer_lr: NotNegative = 1.0
    outer_momentum: Decay = 0.5
    sync_every: Count | None = 10
    sync_last: bool = False
    fusion: Literal["factors", "product"] = "factors"
    penalty: NotNegative = 0.05
    generations: Count = 6
    population: Annotated[int, Field(ge=2)] = 6

    @property
    def aggregator(self) -> Mean:
        return Mean()

    @property
    def introduction(self) -> Mean:
        return Mean()

    def server_init(self, spec: ModelSpec, seed: int) -> State:
        theta = start(spec, seed, self.extras)
        return {"theta": theta, "velocity": cast(zeros(theta), torch.float64), "started": 0}

    def client_init(self, local: Local) -> Work[tuple[Update, Memory]]:
        begun = start(local.spec, local.run_seed, self.extras)
        equal_ranks(begun, local.client, "fdlora")
        library()  # needed at the end: better missed here
        train = trained(local.spec, self.extras, "A", "B")
        tuned = yield from self.training.fit(local, Model(begun), train, epochs=self.stage1_epochs, split="fit")
        memory = {"personal": tuned.params, "private": self.extras.staying(tuned.params), "rounds": 0}
        return Update(difference(tuned.params, begun), 1.0, tuned.sums), memory

    def server_introduce(self, state: State, value: Tree, round: int) -> State:
        if state["started"]:  # a late joiner's stage 1 stays its own
            return state
        return {**state, "theta": add(state["theta"], value), "started": 1}

    def broadcast(self, state: State, client: Client, round: int) -> Tree:
        equal_ranks(state["theta"], client, "fdlora")
        return state["theta"]

    def client_update(self, payload: Tree, memory: Memory, local: Local) -> Work[tuple[Update, Memory]]:
        model = Model({**payload, **memory["private"]})
        tuned = yield from self.training.fit(local, model, trained(local.spec, self.extras, "A", "B"), split="fit")
        count = memory["rounds"] + 1
        last = local.round >= local.rounds and not self.sync_last
        sync = bool(self.sync_every) and count % self.sync_every == 0 and not last
        personal = tuned.params if sync else memory["personal"]
        kept = {"personal": personal, "private": self.extras.staying(tuned.params), "rounds": count}
        return Update(difference(tuned.params, payload), 1.0, tuned.sums), kept

    def expects(self, state: State, client: Client, round: int, kind: Kind) -> Mapping[str, Shape | None]:
        return shapes(state["velocity"])

    def server_update(self, state: State, value: Tree, round: int) -> State:
        mu = self.outer_momentum
        velocity = {key: mu * v - value[key] for key, v in state["velocity"].items()}  # Delta is minus the difference
        step = {key: mu * v - value[key] for key, v in velocity.items()}
        return {"theta": add(state["theta"], step, -self.outer_lr), "velocity": velocity, "started": 1}

    def server_model(self, state: State) -> Model | None:
        return None if self.extras.personal else Model(state["theta"])

    def personalize(self, payload: Tree, memory: Memory, local: Local) -> Work[Mapping[str, Model]]:
        personal, shared = memory["personal"], {**payload, **memory["private"]}
        best = yield from self.search(personal, shared, local)
        return {
            "fused": self.blend(personal, shared, best),
            "personal": Model(personal),
            "global": Model(shared),
            "average": self.blend(personal, shared, (0.5, 0.5)),
        }

    def search(self, personal: Tree, shared: Tree, local: Local) -> Work[Point]:
        """AdaFusion: the best of all scored points."""
        asked = search_from(local.seed("fusion"), self.population)
        points: list[Point] = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
        split: Split = "holdout"
        *found, first = yield from scores(
            *(Score(self.blend(personal, shared, p), split) for p in points),
            Score(self.blend(personal, shared, points[0]), split, limit=FEW - 1),
        )
        if counted(found[0]) == counted(first):  # no more than those: a task may count tokens, not examples
            split = "train"
            logging.getLogger(__name__).info("client %s: fusion is fitted on its training data", local.client.id)
            found = yield from scores(*(Score(self.blend(personal, shared, p), split) for p in points))
            if not counted(found[0]):  # it only has test examples: nothing that is its own was ever trained
                return 0.0, 1.0
        costs = self.costs(points, found)
        for _ in range(self.generations):
            points = [(float(p[0]), float(p[1])) for p in asked.ask()]
            found = yield from scores(*(Score(self.blend(personal, shared, p), split) for p in points))
            latest = self.costs(points, found)
            asked.tell([np.array(p) for p in points], [latest[p] for p in points])
            costs |= latest
        return min(costs, key=lambda p: costs[p])

    def costs(self, points: Sequence[Point], found: Sequence[Sums]) -> dict[Point, float]:
        """loss + lambda (|w1| + |w2|) of every point; what is no number is worse than any."""
        losses = [total / count for total, count in (sums["loss"] for sums in found)]
        losses = [math.inf if math.isnan(loss) else loss for loss in losses]
        return {p: loss + self.penalty * (abs(p[0]) + abs(p[1])) for p, loss in zip(points, losses)}

    def blend(self, personal: Tree, shared: Tree, point: Point) -> Model:
        """The fused model: factors blended, or both adapters side by side; heads by |w1| / (|w1| + |w2|)."""
        w1, w2 = point
        share = abs(w1) / (abs(w1) + abs(w2)) if w1 or w2 else 0.5
        head = {key: share * value + (1 - share) * shared.get(key, value) for key, value in whole(personal).items()}
        if self.fusion == "product":
            return Model(adapter(personal) | head, (adapter(shared),), (w1, w2))
        blended = {
            key: value if key.endswith("/scale") else w1 * value + w2 * shared[key]
            for key, value in adapter(personal).items()
        }
        return Model(blended | head)


def counted(sums: Sums) -> float:
    """How much a loss is over."""
    return sums.get("loss", (0.0, 0.0))[1]


def search_from(seed: int, population: int) -> Any:
    """CMA-ES over two weights in [-1.5, 1.5], driven by ask and tell, with a random stream of its own.

    ``cma`` draws from NumPy's global stream unless told otherwise, and other clients' programs run between our yields.
    """
    own = np.random.RandomState(seed % 2**32)
    options = {"bounds": [-1.5, 1.5], "popsize": population, "verbose": -9, "seed": math.nan, "randn": own.randn}
    return library().CMAEvolutionStrategy([0.5, 0.5], 0.4, options)


def library() -> Any:
    """The module ``cma``."""
    try:
        return importlib.import_module("cma")
    except ImportError as error:
        raise UserError(
            "fdlora fuses adapters with cma, which is not installed", "pip install 'fedlora[fdlora]'"
        ) from error
