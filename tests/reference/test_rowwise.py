"""RBLA and replication padding by loops over rows: who is averaged, and that no zero ever is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.rbla import RBLA
from fedlora.algorithms.replication import Replication
from fedlora.federation.spec import Extras
from reference.fake import SITES, SPEC, array, client, close, dense, train

MIXED = [client("a", 1, 10), client("b", 2, 30), client("c", 4, 40), client("d", 4, 20)]
both = pytest.mark.parametrize("cls", [RBLA, Replication])


def trained(
    begun: Any, updates: Any, site: str, reference: float, clients: Any = MIXED
) -> list[tuple[float, Any, Any]]:
    """(examples, A, B at the reference scale) of every client, by numpy."""
    found = []
    for who in clients:
        sent = updates[who.id].arrays
        a, b, s = array(sent[f"{site}/A"]), array(sent[f"{site}/B"]), float(sent[f"{site}/scale"])
        rank = len(a)
        start = {f: array(begun["adapter"][f"{site}/{f}"]) for f in "AB"}
        found.append((who.examples, start["A"][:rank] + a, start["B"][:, :rank] + s / reference * b))
    return found


def check(state: Any, site: str, a: Any, b: Any) -> None:
    close(state["adapter"][f"{site}/A"], a)
    close(state["adapter"][f"{site}/B"], b)


@pytest.mark.parametrize("scaling", ["shared", "per-rank"])
def test_rbla_averages_a_row_over_its_owners(scaling: Any) -> None:
    spec, rbla = replace(SPEC, scaling=scaling), RBLA()
    begun = rbla.server_init(spec, 0)
    state, updates = train(rbla, begun, MIXED, spec=spec)
    for site in SITES:
        reference, largest = float(begun["adapter"][f"{site}/scale"]), spec.ranks[site]
        a, b = np.zeros((largest, SITES[site][1])), np.zeros((SITES[site][0], largest))
        found = trained(begun, updates, site, reference)
        for row in range(largest):
            owners = [(n, x[row], y[:, row]) for n, x, y in found if row < len(x)]
            a[row] = sum(n * x for n, x, _ in owners) / sum(n for n, _, _ in owners)
            b[:, row] = sum(n * y for n, _, y in owners) / sum(n for n, _, _ in owners)
        check(state, site, a, b)
        for who in MIXED:
            served, rank = rbla.broadcast(state, who, 2), min(who.ranks[site], largest)
            np.testing.assert_allclose(dense(served, site), reference * b[:, :rank] @ a[:rank], atol=1e-12)
            assert float(served[f"{site}/scale"]) == float(spec.scale(site, rank))


@pytest.mark.parametrize("scaling", ["shared", "per-rank"])
def test_replication_pads_with_the_largest_clients_mean(scaling: Any) -> None:
    spec, method = replace(SPEC, scaling=scaling), Replication()
    begun = method.server_init(spec, 0)
    state, updates = train(method, begun, MIXED, spec=spec)
    for site in SITES:
        found = trained(begun, updates, site, float(begun["adapter"][f"{site}/scale"]))
        largest = max(len(x) for _, x, _ in found)
        high = [(n, x, y) for n, x, y in found if len(x) == largest]
        a, b = 0.0, 0.0
        for n, x, y in found:
            full_a, full_b = np.zeros((largest, x.shape[1])), np.zeros((y.shape[0], largest))
            for row in range(largest):
                if row < len(x):
                    full_a[row], full_b[:, row] = x[row], y[:, row]
                else:
                    full_a[row] = sum(m * v[row] for m, v, _ in high) / sum(m for m, _, _ in high)
                    full_b[:, row] = sum(m * w[:, row] for m, _, w in high) / sum(m for m, _, _ in high)
            a, b = a + n / 100 * full_a, b + n / 100 * full_b
        check(state, site, a, b)


def test_with_two_ranks_they_agree_and_with_three_they_do_not() -> None:
    for clients, equal in (([MIXED[0], *MIXED[2:]], True), (MIXED, False)):
        states = [train(m, m.server_init(SPEC, 0), clients)[0]["adapter"] for m in (RBLA(), Replication())]
        apart = max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0])
        assert (apart < 1e-12) is equal
        for site in SITES:  # the rows that only the largest clients have are theirs alone, in both
            close(states[0][f"{site}/A"][2:], array(states[1][f"{site}/A"][2:]))


def test_equal_ranks_are_fedit() -> None:
    from fedlora.algorithms.fedit import FedIT

    clients, fedit = [client("a", 4, 10), client("b", 4, 30)], FedIT()
    plain, _ = train(fedit, fedit.server_init(SPEC, 0), clients)
    for method in (RBLA(), Replication()):
        state, _ = train(method, method.server_init(SPEC, 0), clients)
        for key, value in (state["adapter"] | state["whole"]).items():
            close(value, array(plain["merged"][key]))


@both
def test_rows_that_nobody_trained_keep_their_value(cls: Any) -> None:
    method = cls()
    begun = method.server_init(SPEC, 0)
    state, _ = train(method, begun, MIXED[:2])
    for site in SITES:
        assert not torch.equal(state["adapter"][f"{site}/A"][:2], begun["adapter"][f"{site}/A"][:2])
        assert torch.equal(state["adapter"][f"{site}/A"][2:], begun["adapter"][f"{site}/A"][2:])
        assert torch.equal(state["adapter"][f"{site}/B"][:, 2:], begun["adapter"][f"{site}/B"][:, 2:])
    _, updates = train(method, state, [client("c", 4)], round=2)
    assert np.linalg.matrix_rank(array(updates["c"].arrays["down/B"])) == 4


@both
def test_heads_are_means_over_everybody_or_stay(cls: Any) -> None:
    method = cls()
    begun = method.server_init(SPEC, 0)
    state, updates = train(method, begun, MIXED)
    by_hand = array(begun["whole"]["head/bias"]) + sum(
        c.examples / 100 * array(updates[c.id].arrays["head/bias"]) for c in MIXED if c.examples
    )
    close(state["whole"]["head/bias"], by_hand)
    private, memories = cls(extras=Extras(head="private")), {}
    state, updates = train(private, private.server_init(SPEC, 0), MIXED, memories=memories)
    assert set(memories["a"]) == {"head/weight", "head/bias"}
    assert not any(key.startswith("head/") for key in updates["a"].arrays)
    assert private.server_model(state) is None
