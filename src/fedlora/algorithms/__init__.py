"""The table of names: ``[algorithm] name`` -> class, imported when asked for.

Adding an algorithm is one file here, one row below and one reference test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

TABLE: Mapping[str, str] = {
    "local": "local:LocalOnly",
    "head-only": "head_only:HeadOnly",
    "pooled": "pooled:Pooled",
    "fedit": "fedit:FedIT",
    "ffa-lora": "ffa_lora:FFALoRA",
    "fedsa-lora": "fedsa_lora:FedSALoRA",
    "rolora": "rolora:RoLoRA",
    "hetlora": "hetlora:HetLoRA",
    "flora": "flora:FLoRA",
    "flexlora": "flexlora:FlexLoRA",
    "fedex-lora": "fedex_lora:FedExLoRA",
    "lora-fair": "lora_fair:LoRAFAIR",
    "rbla": "rbla:RBLA",
    "replication": "replication:Replication",
    "slora": "slora:SLoRA",
    "ditto": "ditto:Ditto",
    "fedper": "fedper:FedPer",
    "fedrep": "fedrep:FedRep",
    "fedrod": "fedrod:FedRoD",
    "fedamp": "fedamp:FedAMP",
    "fdlora": "fdlora:FDLoRA",
    "standalone": "standalone:Standalone",
    "pfedlora": "pfedlora:PFedLoRA",
    "ce-lora": "ce_lora:CELoRA",
    "feddpa": "feddpa:FedDPA",
    "fml": "fml:FML",
    "fedkd": "fedkd:FedKD",
    "lg-fedavg": "lg_fedavg:LGFedAvg",
    "fedgh": "fedgh:FedGH",
    "fedproto": "fedproto:FedProto",
}
"""name -> module:class."""


class _Algorithms(Mapping[str, type[Any]]):
    """The classes; a module is imported when its class is first asked for (importing torch takes seconds)."""

    def __getitem__(self, name: str) -> type[Any]:
        module, _, cls = TABLE[name].partition(":")
        found: type[Any] = getattr(import_module(f"{__name__}.{module}"), cls)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(TABLE)

    def __len__(self) -> int:
        return len(TABLE)


ALGORITHMS: Mapping[str, type[Any]] = _Algorithms()
