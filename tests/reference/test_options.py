"""Options that change what travels or is kept, in a whole federation: neither a wire nor lanes change a number, a
resumed run ends as the straight one, and what is deployed beats the start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conformance.toy import TRAINING, Fleet, make
from fedlora.algorithms import ALGORITHMS
from fedlora.federation.orders import Optimizer
from fedlora.federation.rounds import evaluate, rounds
from fedlora.federation.spec import Extras
from fedlora.federation.wire import decode, encode, same

SGD = replace(TRAINING, optimizer=Optimizer("sgd", 0.05, 0.9))
SHARED = Extras(head="share", norm="private")
OPTIONS: list[tuple[str, dict[str, Any], bool]] = [
    ("fedit", {"server": "adam", "server_lr": 0.05, "prior": True, "proximal": 0.1}, False),
    ("fedit", {"server": "avgm", "extras": Extras(head="private", norm="share"), "finetune_epochs": 1}, False),
    ("fedit", {"merge": "svd", "prior": True, "finetune_epochs": 1}, True),
    ("fedit", {"merge": "bucket", "bucket_rank": 1, "server": "yogi", "server_lr": 0.05}, True),
    ("flexlora", {"finetune_epochs": 1, "extras": Extras(head="private")}, True),
    ("hetlora", {"prune": 0.6, "penalty": 0.05, "extras": SHARED}, True),
    ("flora", {"extras": SHARED}, True),
    ("fedex-lora", {"extras": SHARED}, False),
    ("lora-fair", {"ridge": 0.5, "extras": SHARED}, False),
    ("rbla", {"extras": SHARED}, True),
    ("replication", {"extras": SHARED}, True),
    ("slora", {"sparse_rounds": 2, "density": 0.2, "extras": SHARED}, False),
    ("slora", {"sparse_rounds": 1, "density": 0.2, "merge": "svd", "extras": Extras(head="private")}, True),
    ("slora", {"sparse_rounds": 3, "density": 0.2, "merge": "bucket", "bucket_rank": 1}, True),
    ("ffa-lora", {"extras": SHARED}, False),
    ("fedsa-lora", {"extras": SHARED}, False),
    ("rolora", {"extras": Extras(head="frozen", norm="share"), "training": SGD}, False),
    ("head-only", {"extras": Extras(head="private")}, False),
    ("local", {"select": False, "extras": Extras(head="private", norm="private")}, True),
    ("fdlora", {"fusion": "product", "sync_every": 2, "extras": SHARED}, False),
    ("ce-lora", {"similarity": "cosine", "extras": SHARED}, False),
    ("feddpa", {"extras": SHARED}, False),
    ("fml", {"extras": SHARED}, False),
]


def federation(name: str, options: dict[str, Any], mixed: bool, **world: Any) -> Fleet:
    algorithm = ALGORITHMS[name](**{"training": TRAINING, **options})
    return make(algorithm, mixed=mixed, private=name == "fml", **world)


def ended(fleet: Fleet, resume: Any = None, stop: int = 4) -> Any:
    last = None
    for report in rounds(fleet.algorithm, fleet.spec, fleet, total=4, seed=0, resume=resume):
        assert not report.rejected
        last = report
        if report.round == stop:
            report.saved()
            break
    return last.checkpoint  # type: ignore[union-attr]


def scored(fleet: Fleet, checkpoint: Any) -> dict[str, Any]:
    return dict(evaluate(fleet.algorithm, checkpoint, fleet, fleet.clients.values(), total=4))


@pytest.mark.parametrize(("name", "options", "mixed"), OPTIONS, ids=lambda x: x if isinstance(x, str) else None)
def test_options_hold_the_contract(name: str, options: dict[str, Any], mixed: bool) -> None:
    plain, wired = federation(name, options, mixed), federation(name, options, mixed, wire=True, lanes=3)
    straight, travelled = ended(plain), ended(wired)
    assert same(straight, travelled)
    scores = scored(plain, straight)
    assert scores == scored(wired, travelled)

    broken = federation(name, options, mixed)
    half = decode(encode(ended(broken, stop=2)))
    again = federation(name, options, mixed, stores=broken.stores)
    assert same(ended(again, resume=half), straight)

    first = [next(iter(sums.values()))["accuracy"] for sums in scores.values()]
    start = federation("local", {}, True)
    base = [next(iter(s.values()))["accuracy"] for s in scored(start, ended(start, stop=0)).values()]
    gain = (sum(right for right, _ in first) - sum(right for right, _ in base)) / sum(count for _, count in first)
    assert gain > (0.05 if name == "rolora" else 0.15), gain
