"""Every algorithm times every property. What is special about an algorithm is its row in ``table.py``."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.table import TABLE, world
from conformance.toy import Fleet, compatible
from fedlora.adapters.algebra import product
from fedlora.algorithms import ALGORITHMS
from fedlora.errors import UserError
from fedlora.federation.admission import fault
from fedlora.federation.algorithm import Update
from fedlora.federation.exchange import merge_sums
from fedlora.federation.memory import DiskMemory
from fedlora.federation.orders import Fit, Model, Tuned
from fedlora.federation.rounds import Report, evaluate, rounds
from fedlora.federation.sampling import Cohorts, cohort
from fedlora.federation.spec import Client, Extras
from fedlora.federation.wire import decode, encode, same, tensors

ROUNDS = 5
FEW: dict[str, Any] = {"size": 4, "skew": 0.0}  # few examples and alike: where sharing should help
every = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def run(
    fleet: Fleet, total: int = ROUNDS, stop: int | None = None, save: tuple[int, ...] = (), **options: Any
) -> list[Report]:
    reports = []
    for report in rounds(fleet.algorithm, fleet.spec, fleet, total=total, seed=fleet.inner.run_seed, **options):
        reports.append(report)
        assert not report.rejected, report.rejected
        if report.round in save:
            report.saved()
        if report.round == stop:
            break
    return reports


def memories(fleet: Fleet, report: Report) -> dict[str, Any]:
    """What each client would start from next."""
    return {
        id: fleet.inner.store(id).read("run", v) if id not in fleet.stores else fleet.stores[id].read("run", v)
        for id, v in report.checkpoint["acked"].items()
    }


def score(fleet: Fleet, report: Report, measure: str = "accuracy") -> dict[str, float]:
    """The mean over everybody's examples by variant; "personal!" is what clients deploy."""
    merged: dict[str, Any] = {}
    for _, sums in evaluate(fleet.algorithm, report.checkpoint, fleet, fleet.clients.values(), total=ROUNDS):
        for index, (variant, value) in enumerate(sums.items()):
            for key in {variant} | ({"personal!"} if index == 0 else set()):
                merged[key] = merge_sums(merged.get(key, {}), value)
    return {variant: value[measure][0] / value[measure][1] for variant, value in merged.items()}


def untrained(fleet: Fleet) -> float:
    """Accuracy of every client's untouched backbone under the shared head."""
    right, count = 0.0, 0
    for id, client in fleet.clients.items():
        x, y = fleet.learner.examples(id, "test")
        guess = fleet.learner.forward(Model({}, backbone=client.backbone), {}, x).logits.argmax(1)
        right += float((guess == y).sum())
        count += len(y)
    return right / count


def without(client: str, *missed: int) -> Any:
    """A sampler that leaves a client out of some rounds."""
    return lambda clients, round, seed: [
        one for one in cohort(clients, round, seed) if not (one.id == client and round in missed)
    ]


def test_every_algorithm_has_a_row() -> None:
    assert set(TABLE) == set(ALGORITHMS)


# ---------------------------------------------------------------- it learns


@every
def test_beats_its_start(name: str) -> None:
    gains = []
    for seed in range(3):
        fleet = world(name, seed=seed)
        gains.append(score(fleet, run(fleet)[-1])["personal!"] - untrained(fleet))
    assert min(gains) > 0.05, gains
    assert sum(gains) / 3 > TABLE[name].learns, gains


def alone(name: str, seed: int) -> float:
    """Accuracy where every client is a federation of one."""
    merged: dict[str, tuple[float, float]] = {}
    for id in world(name, seed=seed, **FEW).clients:
        fleet = world(name, seed=seed, **FEW)
        fleet.inner.clients = {id: fleet.clients[id]}
        final = run(fleet)[-1]
        for _, sums in evaluate(fleet.algorithm, final.checkpoint, fleet, fleet.clients.values(), total=ROUNDS):
            merged = merge_sums(merged, next(iter(sums.values())))
    return merged["accuracy"][0] / merged["accuracy"][1]


@pytest.mark.parametrize("name", sorted(name for name, row in TABLE.items() if row.shares is not None))
def test_beats_training_alone(name: str) -> None:
    gains = []
    for seed in range(3):
        fleet = world(name, seed=seed, **FEW)
        gains.append(score(fleet, run(fleet)[-1])["personal!"] - alone(name, seed))
    assert sum(gains) / 3 > (TABLE[name].shares or 0.0), gains


# ---------------------------------------------------------------- failure is a normal input


@every
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_crash_two_rounds_past_a_checkpoint_and_resume(name: str, share: float, tmp_path: Path) -> None:
    def lost(kind: str, round: int, client: str) -> str | None:
        return "after" if (kind, round, client) == ("train", 3, "c1") else None

    straight_fleet = world(name, lost=lost)
    straight = run(straight_fleet, 6, sampler=Cohorts(share))
    broken = world(name, lost=lost, store=lambda id: DiskMemory(tmp_path, id))
    first = run(broken, 6, stop=5, save=(1, 3), sampler=Cohorts(share))
    durable = encode(first[3].checkpoint)
    assert first[3].round == 3
    again = world(name, lost=lost, store=lambda id: DiskMemory(tmp_path, id))  # a new process: the disks survived
    resumed = run(again, 6, resume=decode(durable), sampler=Cohorts(share))
    assert same(resumed[-1].checkpoint, straight[-1].checkpoint)
    assert same(memories(again, resumed[-1]), memories(straight_fleet, straight[-1]))
    assert [r.sums for r in resumed] == [r.sums for r in straight[4:]]
    assert max(len(DiskMemory(tmp_path, id).versions("run")) for id in again.clients) <= 3


@every
def test_crash_before_any_checkpoint(name: str) -> None:
    fleet = world(name)
    run(fleet, 3, stop=2)
    again = run(world(name, stores=fleet.stores), 3)
    assert same(again[-1].checkpoint, run(world(name), 3)[-1].checkpoint)


@every
@pytest.mark.parametrize("when", [1, 2])
def test_lost_after_training_is_never_asked(name: str, when: int) -> None:
    one = world(name, lost=lambda *event: "after" if event == ("train", when, "c2") else None)
    other = world(name)
    a, b = run(one)[-1], run(other, sampler=without("c2", when))[-1]
    assert same(a.checkpoint, b.checkpoint)
    assert same(memories(one, a), memories(other, b))


@pytest.mark.parametrize("name", sorted(name for name in ALGORITHMS if ALGORITHMS[name]().introduction is not None))
def test_lost_introduction(name: str) -> None:
    fleets = [
        world(name, lost=lambda *event, how=how: how if event == ("introduce", 0, "c2") else None)
        for how in ("before", "after")
    ]
    a, b = (run(fleet) for fleet in fleets)
    assert same(a[-1].checkpoint, b[-1].checkpoint)
    assert a[0].lost == ("c2",)  # lost before round 1 and again on the next try
    assert "c2" not in a[0].checkpoint["acked"]
    assert "c2" not in a[1].folded  # not asked to train until it is known
    assert "c2" in a[2].folded


@every
def test_introductions_are_checkpointed(name: str) -> None:
    straight, broken = world(name), world(name)
    final = run(straight, 2)
    first = run(broken, 2, stop=0, save=(0,))
    resumed = run(world(name, stores=broken.stores), 2, resume=decode(encode(first[0].checkpoint)))
    assert same(resumed[-1].checkpoint, final[-1].checkpoint)
    assert all(report.bytes["setup_up"] == 0 for report in resumed)


@every
def test_empty_round_changes_nothing(name: str) -> None:
    fleet = world(name, lost=lambda kind, round, client: "after" if (kind, round) == ("train", 3) else None)
    reports = run(fleet)
    assert same(reports[3].checkpoint["state"], reports[2].checkpoint["state"])
    assert reports[3].folded == ()


@every
def test_late_joiner_skipped_rounds_and_strangers(name: str) -> None:
    fleet = world(name, joins={"c5": 3, "c6": 4})
    reports = run(fleet, sampler=without("c1", 2, 3))
    assert "c5" not in reports[2].folded
    assert "c5" in reports[3].folded
    assert "c6" in reports[4].folded
    assert reports[-1].checkpoint["acked"] == {f"c{k}": ROUNDS for k in range(7)}
    absent = world(name, joins={"c6": 99})  # never there: scored after a private introduction, kept nowhere
    final = run(absent)[-1]
    assert score(absent, final)["personal!"] > 0.3
    assert "c6" not in absent.stores or not absent.stores["c6"].versions  # type: ignore[attr-defined]


@every
def test_evaluation_writes_nothing(name: str) -> None:
    fleet = world(name)
    reports = run(fleet, 2)
    before = {id: dict(store.versions) for id, store in fleet.stores.items()}  # type: ignore[attr-defined]
    score(fleet, reports[-1])
    assert before == {id: dict(store.versions) for id, store in fleet.stores.items()}  # type: ignore[attr-defined]


@every
def test_a_broken_update_is_dropped(name: str) -> None:
    fleet = world(name)
    report = run(fleet, 2)[-1]
    client = fleet.clients["c0"]
    expected = fleet.algorithm.expects(report.state, client, 2, "train")
    good = {key: torch.zeros([max(n, 0) + (n < 0) for n in shape or ()]).double() for key, shape in expected.items()}

    def problem(arrays: Mapping[str, torch.Tensor], weight: float = 1.0) -> str:
        return str(fault(Update(arrays, weight, {}), expected, client, dtype=fleet.spec.dtype))

    assert problem(good) == "None"
    assert "weight" in problem(good, 1e9)
    assert "names" in problem({**good, "head/more": torch.zeros(1)})
    for key in (key for key in good if good[key].dim()):
        assert "finite" in problem({**good, key: good[key] + float("nan")})
        assert "shape" in problem({**good, key: torch.zeros(1, 1, 1)})
        assert "type" in problem({**good, key: good[key].float()})
        assert "names" in problem({k: v for k, v in good.items() if k != key})


# ---------------------------------------------------------------- how it is run does not matter


def canonical(value: Any) -> Any:
    """Factors replaced by their products: stacking in another order is the same change of the base."""
    if not isinstance(value, Mapping):
        return value
    pairs = [
        key[:-2] for key in value if key.endswith("/A") and f"{key[:-2]}/B" in value and f"{key[:-2]}/scale" in value
    ]
    products = {f"{site}/W": product(value, site) for site in pairs}
    rest = {k: canonical(v) for k, v in value.items() if k.rpartition("/")[0] not in pairs}
    return {**rest, **products}


@every
def test_order_of_replies(name: str) -> None:
    forward, backward = world(name), world(name, backwards=True)
    a, b = run(forward)[-1], run(backward)[-1]
    assert same(a.checkpoint, b.checkpoint)
    assert same(memories(forward, a), memories(backward, b))
    c = run(world(name), 1, buffered=False)[-1]
    d = run(world(name, backwards=True), 1, buffered=False)[-1]
    assert same(c.checkpoint, d.checkpoint, 1e-12) or same(canonical(c.checkpoint), canonical(d.checkpoint), 1e-12)


@every
def test_merge_of_halves(name: str) -> None:
    fleet = world(name)
    captured: dict[bool, list[Any]] = {}
    ask = fleet.ask

    def recorded(requests: Any) -> Iterator[Any]:
        for id, reply in ask(requests):
            captured.setdefault(reply.kind == "introduce", []).append((fleet.clients[id], reply.update))
            yield id, reply

    fleet.ask = recorded  # type: ignore[method-assign]
    run(fleet, 1)
    for introduced, updates in captured.items():
        aggregator: Any = fleet.algorithm.introduction if introduced else fleet.algorithm.aggregator

        def fold(items: list[Any], aggregator: Any = aggregator) -> Any:
            acc = aggregator.zero()
            for client, update in items:
                acc = aggregator.accumulate(acc, client, update)
            return decode(encode(acc))  # accumulators travel too

        whole, halves = fold(updates), aggregator.merge(fold(updates[:3]), fold(updates[3:]))
        assert same(aggregator.report(whole), aggregator.report(halves), 1e-12)
        assert same(aggregator.report(aggregator.merge(aggregator.zero(), whole)), aggregator.report(whole))


class Guarded:
    """An algorithm that proves, call by call, that neither it nor its aggregators change any input."""

    def __init__(self, inner: Any, calls: list[str]) -> None:
        self.inner = inner
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name in ("aggregator", "introduction"):
            return None if value is None else Guarded(value, self.calls)
        return self.guard(name, value) if callable(value) else value

    def guard(self, name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            plain = [arg.arrays if isinstance(arg, Update) else arg for arg in args]
            plain = [arg for arg in plain if isinstance(arg, Mapping)]
            versions = [(tensor, tensor._version) for arg in plain for tensor in tensors(arg)]
            frames = [encode(arg) for arg in plain]

            def check() -> None:
                self.calls.append(name)
                assert all(tensor._version == version for tensor, version in versions), name
                assert [encode(arg) for arg in plain] == frames, name

            result = function(*args)
            if not hasattr(result, "send"):
                check()
                return result

            def steps() -> Any:
                end = yield from result
                check()
                return end

            return steps()

        return call


@every
def test_inputs_are_not_modified(name: str) -> None:
    fleet, calls = world(name), list[str]()
    fleet.inner.algorithm = Guarded(fleet.algorithm, calls)  # type: ignore[assignment]
    score(fleet, run(fleet, 3)[-1])
    assert calls.count("accumulate") >= 21
    assert {"client_update", "server_update", "broadcast", "report", "personalize"} <= set(calls)


@every
def test_memory_and_state_travel(name: str) -> None:
    fleet = world(name)
    report = run(fleet, 3)[-1]
    for value in (report.checkpoint, memories(fleet, report)):
        assert same(decode(encode(value)), value)
        assert same(pickle.loads(pickle.dumps(value)), value)


@every
def test_wire_and_lanes_change_nothing(name: str) -> None:
    plain, wired, laned = world(name), world(name, wire=True), world(name, lanes=3)
    a, b, c = (run(fleet)[-1] for fleet in (plain, wired, laned))
    assert same(a.checkpoint, b.checkpoint)
    assert same(a.checkpoint, c.checkpoint)
    assert same(memories(plain, a), memories(laned, c))
    assert score(plain, a, "loss") == score(wired, b, "loss") == score(laned, c, "loss")


@every
def test_clients_of_one_backbone_can_share_lanes(name: str) -> None:
    fleet = world(name, lanes=7)
    score(fleet, run(fleet, 2)[-1])
    backbones = len({client.backbone for client in fleet.clients.values()})
    together = [{compatible(job.order) for job in group} for group in fleet.learner.groups]
    fits = [keys for keys in together if any(key[0] is Fit for key in keys)]
    assert fits
    assert all(len(keys) <= backbones for keys in fits)


@every
def test_every_order_has_its_own_stream(name: str) -> None:
    fleet = world(name)
    score(fleet, run(fleet, 3)[-1])
    seeds = [job.seed for job in fleet.learner.log]
    assert len(set(seeds)) == len(seeds)


@every
def test_float32_stays_float32(name: str) -> None:
    """Sums are float64; what is served, sent or kept is in the spec's type."""
    fleet = world(name, dtype=torch.float32)
    report = run(fleet, 3)[-1]
    served = [fleet.algorithm.broadcast(report.state, client, 4) for client in fleet.clients.values()]
    kept = (*served, memories(fleet, report))
    assert all(tensor.dtype == torch.float32 for value in kept for tensor in tensors(value))
    assert score(fleet, report)["personal!"] > untrained(fleet)


# ---------------------------------------------------------------- ranks and whole parameters


@every
def test_two_ranks_or_a_clear_refusal(name: str) -> None:
    fleet, row = world(name), TABLE[name]
    if row.ranks == "refused":
        small = Client("c0", {"fc1": 2, "fc2": 2}, fleet.clients["c0"].backbone, 32)
        fleet.inner.clients = {**fleet.clients, "c0": small}
        with pytest.raises(UserError, match="rank"):
            run(fleet, 1)
    elif row.ranks == "unused":
        small = {id: dataclasses.replace(c, ranks={"fc1": 2, "fc2": 2}) for id, c in fleet.clients.items()}
        fleet.inner.clients = small
        assert same(run(fleet, 2)[-1].checkpoint, run(world(name), 2)[-1].checkpoint)
    else:
        assert {client.ranks["fc1"] for client in fleet.clients.values()} == {1, 2, 4}


@pytest.mark.parametrize("name", sorted(n for n, row in TABLE.items() if row.ranks == "mixed" and n in ALGORITHMS))
def test_rank_grows_back_after_a_round_of_small_clients(name: str) -> None:
    """Dead rows (zero in A and in B's column) would never train."""
    fleet = world(name)
    fit, seen = fleet.learner.fit, list[Tuned]()

    def recorded(order: Any, job: Any) -> Tuned:
        seen.append(fit(order, job))
        return seen[-1]

    fleet.learner.fit = recorded  # type: ignore[method-assign]
    run(
        fleet,
        2,
        sampler=lambda clients, round, seed: [c for c in clients if c.ranks["fc1"] == (1 if round == 1 else 4)],
    )
    for site in fleet.spec.sites:
        assert torch.linalg.matrix_rank(product(seen[-1].params, site), rtol=1e-6) == 4


@every
def test_private_heads_stay_home_and_shared_norms_train(name: str) -> None:
    """Whole parameters follow ``extras`` wherever an algorithm has them."""
    fields = {field.name for field in dataclasses.fields(ALGORITHMS[name])}
    if "extras" not in fields or not ALGORITHMS[name].federated:
        pytest.skip("its whole parameters are not for the run to choose, or it is one model for everybody")
    fleet = world(name, algorithm={"extras": Extras(head="private", norm="share")})
    report = run(fleet, 2)[-1]
    payload = fleet.algorithm.broadcast(report.state, fleet.clients["c0"], 3)
    assert not [key for key in payload if "head/" in key]
    assert fleet.algorithm.server_model(report.state) is None
    assert score(fleet, report)["personal!"] > untrained(fleet)
