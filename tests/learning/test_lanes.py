"""Lanes: many clients in one pass give what each would alone."""

from __future__ import annotations

import torch

from fedlora.federation.orders import Fit, Model, Optimizer, Score
from learning.worlds import RANKS, adapter, backbone, distance, learner, run, spec_of

ADAMW = Optimizer("adamw", 3e-3, weight_decay=0.01, clip=0.5)


def fits(spec, names, optimizer=ADAMW, **options):
    orders = {}
    for k, client in enumerate(names):
        tree = adapter(spec, RANKS[k % 3], seed=k)
        orders[client] = Fit(Model(tree), ("A", "B", "head"), epochs=4, batch_size=4, optimizer=optimizer, **options)
    return orders


def test_lanes_equal_one_at_a_time():
    base = backbone()
    spec = spec_of(base)
    names = [f"c{k}" for k in range(6)]
    one = run(learner(base, 1), fits(spec, names))
    many = run(learner(base, 4), fits(spec, names))
    assert min(t.steps for t in one.values()) >= 12
    for name in names:
        assert distance(one[name].params, many[name].params) < 1e-10
        assert distance(one[name].params, fits(spec, names)[name].models.params) > 1e-3
        assert abs(one[name].sums["train_loss"][0] - many[name].sums["train_loss"][0]) < 1e-9
    scores = [run(learner(base, n), {k: Score(Model(one[k].params), "test") for k in names}) for n in (1, 4)]
    for name in names:
        for key in ("loss", "accuracy"):
            assert abs(scores[0][name][key][0] - scores[1][name][key][0]) < 1e-10
            assert scores[0][name][key][1] == 7
    torch.testing.assert_close(1.0, 1.0)
