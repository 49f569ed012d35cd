"""LoRA-FAIR: the corrected B is the optimum of the stated problem, found by another route (stacked least squares)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.algorithms.fedit import FedIT
from fedlora.algorithms.lora_fair import LoRAFAIR
from fedlora.errors import UserError
from reference.fake import SITES, SPEC, array, client, close, dense, train

CLIENTS = [client("a", examples=10), client("b", examples=30), client("c", examples=60)]
SHARES = (0.1, 0.3, 0.6)


def round_of(ridge: float, site: str) -> tuple[Any, Any, Any, Any, float]:
    """(exact average of B A, average A, average B, B as served, scale) by numpy."""
    fair = LoRAFAIR(ridge=ridge)
    begun = fair.server_init(SPEC, 0)
    state, updates = train(fair, begun, CLIENTS)
    trained = [{f: array(begun[f"{site}/{f}"] + updates[c.id].arrays[f"{site}/{f}"]) for f in "AB"} for c in CLIENTS]
    exact = sum(p * t["B"] @ t["A"] for p, t in zip(SHARES, trained))
    a, b = (sum(p * t[f] for p, t in zip(SHARES, trained)) for f in "AB")
    close(state[f"{site}/A"], a)
    return exact, a, b, array(state[f"{site}/B"]), float(state[f"{site}/scale"])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
def test_b_solves_the_ridge_problem(site: str, ridge: float) -> None:
    """argmin |R - D A|^2 + ridge |D|^2 is ordinary least squares on [A^T; sqrt(ridge) I] D^T = [R^T; 0]."""
    exact, a, b, served, _ = round_of(ridge, site)
    stacked = np.vstack([a.T, np.sqrt(ridge) * np.eye(len(a))])
    target = np.vstack([(exact - b @ a).T, np.zeros((len(a), len(b)))])
    by_lstsq = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    np.testing.assert_allclose(served, b + by_lstsq, atol=1e-10)


def test_the_optimum_cannot_be_improved() -> None:
    """The objective's gradient by autograd is zero at D, and the objective grows along any step from there."""
    exact, a, b, served, _ = round_of(0.3, "down")
    d = torch.tensor(served - b, requires_grad=True)
    missed, right = torch.tensor(exact - b @ a), torch.tensor(a)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return (missed - x @ right).square().sum() + 0.3 * x.square().sum()

    objective(d).backward()
    assert d.grad is not None
    assert float(d.grad.abs().max()) < 1e-10
    for seed in range(5):
        away = d.detach() + 0.01 * torch.randn(d.shape, generator=torch.Generator().manual_seed(seed), dtype=d.dtype)
        assert objective(away) > objective(d)


def test_between_the_average_and_the_best_b() -> None:
    """ridge = 0 is as near to the exact average as this A allows; a large ridge is FedIT."""
    for site in SITES:
        errors = []
        for ridge in (0.0, 0.01, 1.0, 1e9):
            exact, a, _, served, _ = round_of(ridge, site)
            errors.append(np.linalg.norm(exact - served @ a))
        assert errors == sorted(errors)
        best = exact @ np.linalg.pinv(a) @ a  # the projection of the rows on those of A
        assert errors[0] == pytest.approx(np.linalg.norm(exact - best), abs=1e-9)
    fair, fedit = LoRAFAIR(ridge=1e15), FedIT()
    corrected, _ = train(fair, fair.server_init(SPEC, 0), CLIENTS)
    averaged, _ = train(fedit, fedit.server_init(SPEC, 0), CLIENTS)
    for key, value in averaged["merged"].items():
        close(corrected[key], array(value))


def test_the_correction_is_of_b_whatever_the_scale() -> None:
    """dW = s B A: the same B solves the problem in dW's units with the ridge in those of s D."""
    exact, a, b, served, s = round_of(0.01, "up")
    assert s == 2.0
    stacked = np.vstack([s * a.T, s * np.sqrt(0.01) * np.eye(len(a))])
    target = np.vstack([(s * exact - s * b @ a).T, np.zeros((len(a), len(b)))])
    np.testing.assert_allclose(served - b, np.linalg.lstsq(stacked, target, rcond=None)[0].T, atol=1e-10)


def test_what_travels_and_what_is_refused() -> None:
    fair = LoRAFAIR()
    state, updates = train(fair, fair.server_init(SPEC, 0), CLIENTS)
    assert set(updates["a"].arrays) == {f"{s}/{f}" for s in SITES for f in "AB"} | {"head/weight", "head/bias"}
    model = fair.server_model(state)
    assert model is not None
    assert model.shared == ()
    assert dense(model.params, "up").shape == (7, 3)
    with pytest.raises(UserError, match=r"lora-fair: ranks must be equal[\s\S]*flexlora"):
        fair.broadcast(state, client("d", 2), 2)
