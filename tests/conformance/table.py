"""One row an algorithm: what is special about it. A new algorithm adds its name here and passes every property."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from conformance.toy import TRAINING, Fleet, make
from fedlora.algorithms import ALGORITHMS
from fedlora.federation.orders import Optimizer

SGD = replace(TRAINING, optimizer=Optimizer("sgd", 0.05, 0.9, 1e-3))


@dataclass(frozen=True)
class Row:
    """``ranks``: what clients of different ranks get. ``private``: backbones may differ. ``learns``: the least mean
    gain in accuracy over the untrained start. ``shares``: the least mean gain over federations of one, where examples
    are few and alike (None: nothing is shared, or what is shared does not show in what this world's clients deploy)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: Literal["mixed", "refused", "unused"] = "refused"
    private: bool = False
    learns: float = 0.25
    shares: float | None = None


TABLE: Mapping[str, Row] = {
    "local": Row(ranks="mixed"),
    "head-only": Row(ranks="unused", shares=0.04),
    "pooled": Row(ranks="unused"),
    "fedit": Row(shares=0.05),
    "ffa-lora": Row(shares=0.04),
    "fedsa-lora": Row(shares=0.02),
    "rolora": Row(shares=0.05),
    "hetlora": Row(ranks="mixed", shares=0.03),
    "flora": Row(ranks="mixed", shares=0.05),
    "flexlora": Row(ranks="mixed", shares=0.03),
    "fedex-lora": Row(shares=0.05),
    "lora-fair": Row(shares=0.05),
    "rbla": Row(ranks="mixed", shares=0.03),
    "replication": Row(ranks="mixed", shares=0.03),
    "slora": Row({"sparse_rounds": 2, "density": 0.2}, shares=0.04),
    "ditto": Row(shares=0.01),
    "fedper": Row(shares=0.05),
    "fedrep": Row(shares=0.02),
    "fedrod": Row(shares=0.04),
    "fedamp": Row(shares=0.02),
    "fdlora": Row(shares=0.05),
    "standalone": Row(ranks="unused", private=True),
    "pfedlora": Row({"training": SGD}, ranks="unused", private=True),
    "ce-lora": Row(),
    "feddpa": Row(shares=0.03),
    "fml": Row(private=True, shares=0.01),
    "fedkd": Row(private=True),
    "lg-fedavg": Row(ranks="unused", private=True),
    "fedgh": Row(ranks="unused", private=True),
    "fedproto": Row(ranks="unused", private=True),
}


def world(name: str, **options: Any) -> Fleet:
    """A fresh fleet for one algorithm; ``algorithm={...}`` changes its fields, the rest is the world's."""
    row = TABLE[name]
    chosen = {"training": TRAINING, **row.options, **options.pop("algorithm", {})}
    return make(ALGORITHMS[name](**chosen), mixed=row.ranks == "mixed", private=row.private, **options)
