"""A site does no more than it allows, and says what leaves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federation.doubles import SPEC, Slow, Toy, simulator
from fedlora.algorithms import ALGORITHMS
from fedlora.federation.algorithm import Reply, Update
from fedlora.federation.client import Job
from fedlora.federation.orders import Fit, Model, Score
from fedlora.federation.rounds import rounds
from fedlora.federation.wire import encode
from fedlora.sites.guard import Budget, Guarded, Refused, kind_of, leaving, outgoing, permitted, steps_of
from fedlora.sites.settings import Allowed
from fedlora.study.algorithm import build
from fedlora.study.config import parse


def allowed(**keys: Any) -> Allowed:
    return Allowed.model_validate(keys)


def verdict(allow: Allowed, name: str = "fedit", **sections: Any) -> str | None:
    value = {
        "model": {"name": "minilm", "task": "text-classification"},
        "data": {"train": "x.csv"},
        "algorithm": {"name": name},
    }
    config = parse({**value, **sections}, "run.toml")
    return permitted(allow, config, build(config))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_built_in_federated_algorithm_is_allowed_by_default(name: str) -> None:
    found = verdict(allowed(upload=["adapter", "head", "norm", "embedding", "backbone", "statistics"]), name)
    assert (found is None) == ALGORITHMS[name].federated


def test_what_is_not_allowed_is_said_before_any_work() -> None:
    assert verdict(allowed(algorithms=["fedit"])) is None
    assert "'fdlora' is not allowed here ([allow] algorithms: fedit)" in str(
        verdict(allowed(algorithms=["fedit"]), "fdlora")
    )
    assert "11 rounds" in str(verdict(allowed(rounds=10), training={"rounds": 11}))
    assert "would send head" in str(verdict(allowed(upload=["adapter"])))
    assert verdict(allowed(upload=["adapter"]), adapter={"extras": {"head": "private"}}) is None
    assert "would send backbone" in str(verdict(allowed(), adapter={"extras": {"backbone": "share"}}))


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 7))
def test_steps_are_batches(examples: int, batch: int, epochs: int) -> None:
    batches = len(range(0, examples, batch))
    assert steps_of(Fit(Model({}), (), epochs=epochs, batch_size=batch), examples) == epochs * batches
    assert steps_of(Fit(Model({}), (), steps=13, batch_size=batch), examples) == 13
    assert steps_of(Score(Model({}), "train"), examples) == 0


def test_a_budget_counts_all_orders_of_a_request() -> None:
    now = [0.0]
    budget = Budget(allowed(steps=20, seconds=5), lambda: now[0])
    order = Fit(Model({}), (), epochs=1, batch_size=10)
    budget.charge(order, 95)
    with pytest.raises(Refused, match=r"asks for 21 steps; \[allow\] steps = 20"):
        budget.charge(Fit(Model({}), (), steps=11), 95)
    budget.charge(order, 100)
    now[0] = 4.9
    budget.check()
    now[0] = 5.1
    with pytest.raises(Refused, match=r"has taken 5 s; \[allow\] seconds = 5"):
        budget.check()


@dataclass
class Endless:
    """An executor whose jobs of one client never end."""

    client: str
    open: dict[int, Job] = field(default_factory=dict)
    count: int = 0

    @property
    def idle(self) -> bool:
        return not self.open

    def submit(self, job: Job) -> int:
        self.count += 1
        self.open[self.count] = job
        return self.count

    def advance(self) -> list[tuple[int, Any]]:
        done = [ticket for ticket, job in self.open.items() if job.client != self.client]
        for ticket in done:
            del self.open[ticket]
        return [(ticket, {"loss": (0.0, 1.0)}) for ticket in done]


def test_a_request_that_takes_too_long_is_lost_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    inner = Endless("c0001")
    fleet = simulator(Slow(), 3, 3, Toy())
    guarded = Guarded(inner, allowed(seconds=30), lambda _: 4, inner.open.clear, clock)
    fleet.executor = guarded
    with caplog.at_level(logging.WARNING):
        report = list(rounds(fleet.algorithm, SPEC, fleet, total=1, seed=0))[-1]
    assert report.folded == ("c0000", "c0002")
    assert report.lost == ("c0001",)
    assert "[allow] seconds = 30" in caplog.text
    assert inner.idle
    assert guarded.idle


class Greedy(Toy):
    """Asks for more steps than anybody allows."""

    def client_update(self, payload: Any, memory: Any, local: Any) -> Any:
        yield from Fit(Model(payload), ("head",), steps=10 if local.client.id == "c0000" else 11)
        return Update({"head/bias": torch.ones(3)}, 1.0, {}), memory


def test_an_order_beyond_the_cap_is_never_carried_out() -> None:
    inner = Slow()
    fleet = simulator(inner, 2, 1, Greedy())
    guarded = Guarded(inner, allowed(steps=10), lambda _: 4)
    fleet.executor = guarded
    for round in (1, 2):  # a new request has a new budget
        for client in fleet.clients:
            guarded.begin(client)
        report = list(rounds(fleet.algorithm, SPEC, fleet, total=1, seed=0))[-1]
        assert (report.folded, report.lost) == (("c0000",), ("c0001",))
        assert inner.count == round


def reply(**arrays: Any) -> Reply:
    return Reply(
        "run", "train", 2, Update({k.replace("__", "/"): v for k, v in arrays.items()}, 17.0, {"l": (1.0, 2.0)})
    )


def test_what_may_leave() -> None:
    good = reply(q__A=torch.zeros(2, 9), head__bias=torch.zeros(3))
    assert outgoing(allowed(), good) is None
    assert "holds head" in str(outgoing(allowed(upload=["adapter"]), good))
    assert "holds backbone" in str(outgoing(allowed(), reply(backbone__w=torch.zeros(1))))
    assert "holds statistics" in str(outgoing(allowed(upload=["adapter"]), reply(extra__share=torch.zeros(1))))
    assert "holds adapter" in str(outgoing(allowed(upload=["statistics"]), reply(extra__A=torch.zeros(1))))
    exact = len(encode(dict(good.update.arrays)))  # type: ignore[union-attr]
    assert outgoing(allowed(bytes=exact), good) is None
    assert f"has {exact:,} bytes" in str(outgoing(allowed(bytes=exact - 1), good))
    assert outgoing(allowed(bytes=1), Reply("run", "evaluate", 2, sums={"x": {"loss": (1.0, 2.0)}})) is None


def test_the_line_says_kinds_and_counts_but_no_names_of_labels() -> None:
    line = leaving("north", Reply("run", "evaluate", 2, sums={"x": {"secret label": (1.0, 2.0)}}))
    assert line == "north, round 2, evaluate: 1 sums"
    assert "weight 17, 1 sums" in leaving("north", reply(q__A=torch.zeros(2, 9)))


@given(st.text(max_size=12))
def test_every_name_has_a_kind(name: str) -> None:
    assert kind_of(name) in ("adapter", "head", "norm", "embedding", "backbone", "statistics")
