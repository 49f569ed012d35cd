"""Scores of a round: from each client's sums to means, spreads and the worst tenth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.federation.exchange import merge_sums
from fedlora.federation.spec import Sums

UNSEEN_PRIOR: Mapping[str, Any] = {
    "mean": None,
    "std": None,
    "worst_decile": None,
    "unknown": "the labels are at the sites; no server sees them",
}
"""What stands for ``class_prior`` where who writes the summary has no labels to count."""


@dataclass(frozen=True)
class Metric:
    """The task's main score and which way is better."""

    name: str
    higher_is_better: bool

    def of(self, sums: Sums) -> float | None:
        """total / count, of a model that has diverged perhaps no finite number; None without test data."""
        total, count = sums.get(self.name, (0.0, 0.0))
        return total / count if count else None


def worst_decile(values: Sequence[float], higher_is_better: bool) -> float:
    """The mean over the worst ceil(N/10) clients.

    >>> worst_decile([0.9, 0.2, 0.5], higher_is_better=True)
    0.2
    """
    worst = sorted(values, reverse=not higher_is_better)[: math.ceil(len(values) / 10)]
    return statistics.fmean(worst)


def spread(per_client: Mapping[str, float | None], metric: Metric) -> dict[str, Any]:
    """Mean, population standard deviation and worst tenth over the clients that have test data; none of these where one
    has no finite score: a mean over those that did not diverge would flatter.

    >>> accuracy = Metric("accuracy", higher_is_better=True)
    >>> spread({"a": 0.5, "b": None}, accuracy)["mean"], spread({"a": 0.5, "b": math.nan}, accuracy)["mean"]
    (0.5, None)
    """
    values = [value for value in per_client.values() if value is not None]
    if not values or not all(map(math.isfinite, values)):
        return {"mean": None, "std": None, "worst_decile": None}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "worst_decile": worst_decile(values, metric.higher_is_better),
    }


def summarise(by_client: Mapping[str, Mapping[str, Sums]], metric: Metric, single: bool) -> dict[str, Any]:
    """``personal`` (the deployed variant), ``global`` (the union of test data) and every named variant; "validation" of
    the deployed one where a run keeps validation rows apart.

    ``by_client`` maps a client to its variants' sums, the deployed one first and "global" (the server's model) by name.
    ``single``: whether there is a server's model; if not, a variant of that name is each client's own, with its head
    say, and there is nothing to score on the union.
    """
    deployed = {name: metric.of(next(iter(sums.values()))) for name, sums in by_client.items() if sums}
    variants: dict[str, dict[str, Sums]] = {}
    union: Sums = {}
    for name, results in by_client.items():
        for variant, sums in results.items():
            variants.setdefault(variant, {})[name] = sums
        if single and "global" in results:
            union = merge_sums(union, results["global"])
    score = metric.of(union)
    kept = Metric(f"validation/{metric.name}", metric.higher_is_better)
    validated = {name: kept.of(next(iter(sums.values()))) for name, sums in by_client.items() if sums}
    return {
        "personal": {
            **spread(deployed, metric),
            "per_client": {name: _finite(value) for name, value in deployed.items() if value is not None},
            "without_test_data": sum(value is None for value in deployed.values()),
            "variants": {
                variant: spread({name: metric.of(sums) for name, sums in clients.items()}, metric)
                for variant, clients in variants.items()
            },
        },
        "global": None if score is None else {"score": _finite(score), **_others(union, metric)},
        **({"validation": spread(validated, kept)} if any(v is not None for v in validated.values()) else {}),
    }


def class_prior(labels: np.ndarray, clients: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Accuracy of a model that reads nothing: each client answers with its most frequent training label.

    ``labels``: (rows,); ``clients``: row indices by split, "fit", "holdout" and "test".

    >>> clients = {"a": {"fit": np.array([0, 1]), "holdout": np.array([2]), "test": np.array([3, 4])}}
    >>> class_prior(np.array(["x", "y", "x", "x", "y"]), clients)["mean"]
    0.5
    """
    names, code = np.unique(labels, return_inverse=True)
    owned = [(np.concatenate([rows["fit"], rows["holdout"]]), rows["test"]) for rows in clients.values()]
    owner, label = _codes([train for train, _ in owned], code)
    pairs, counts = np.unique(owner * len(names) + label, return_counts=True)
    trained, known = np.divmod(pairs, len(names))
    order = np.lexsort((known, -counts, trained))  # of each client the most frequent label first, the first of equals
    first = order[np.unique(trained[order], return_index=True)[1]]
    answer = np.full(len(owned), -1)
    answer[trained[first]] = known[first]
    owner, label = _codes([test for _, test in owned], code)
    sizes = np.bincount(owner, minlength=len(owned))
    hits = np.bincount(owner, label == answer[owner], minlength=len(owned))
    scores = {
        name: float(hits[i] / sizes[i]) if sizes[i] and answer[i] >= 0 else None for i, name in enumerate(clients)
    }
    return spread(scores, Metric("accuracy", higher_is_better=True))


def _codes(rows: Sequence[np.ndarray], code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) whose row it is, by position, and its label's number."""
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    return owner, code[np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).astype(np.int64)]


def _finite(score: float) -> float | None:
    """What JSON can say of a score."""
    return score if math.isfinite(score) else None


def _others(sums: Sums, metric: Metric) -> dict[str, float | None]:
    """The task's further scores."""
    return {
        name: _finite(total / count)
        for name, (total, count) in sums.items()
        if count and name != metric.name and "/" not in name
    }
