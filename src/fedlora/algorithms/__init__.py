"""The table of names: ``[algorithm] name`` -> class, imported when asked for.

Adding an algorithm is one file here, one row below and one reference test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

TABLE: Mapping[str, tuple[str, str]] = {
    "local": ("local:LocalOnly", "each client alone, epochs chosen by validation"),
    "head-only": ("head_only:HeadOnly", "a linear head on the frozen base, averaged or private"),
    "pooled": ("pooled:Pooled", "all data in one place: an upper bound, not federated"),
    "fedit": ("fedit:FedIT", "FedAvg on LoRA; FedProx, server optimisers, finetune_epochs = 1 after it, class priors"),
    "ffa-lora": ("ffa_lora:FFALoRA", "A frozen at a shared random start, B averaged"),
    "fedsa-lora": ("fedsa_lora:FedSALoRA", "A averaged, B private"),
    "rolora": ("rolora:RoLoRA", "rounds alternate between B and A"),
    "hetlora": ("hetlora:HetLoRA", "mixed ranks: padded, weighted by the update's size, truncated"),
    "flora": ("flora:FLoRA", "mixed ranks: stacked and merged exactly into the base every round"),
    "flexlora": ("flexlora:FlexLoRA", "mixed ranks: the exact sum, redistributed by truncated SVD"),
    "fedex-lora": ("fedex_lora:FedExLoRA", "factors averaged, what that misses added to the base"),
    "lora-fair": ("lora_fair:LoRAFAIR", "factors averaged, then B corrected for what that misses"),
    "rbla": ("rbla:RBLA", "mixed ranks: each row averaged over the clients that have it"),
    "replication": ("replication:Replication", "mixed ranks: missing rows copied from the largest clients"),
    "slora": ("slora:SLoRA", "sparse full tuning first, then LoRA from the SVD of its change"),
    "ditto": ("ditto:Ditto", "FedIT, and a personal model beside it that is pulled towards the average"),
    "fedper": ("fedper:FedPer", "one adapter averaged under private heads, all trained together"),
    "fedrep": ("fedrep:FedRep", "a private head, trained first in every round; then the shared adapter under it"),
    "fedrod": ("fedrod:FedRoD", "a shared model for balanced classes, and a private head on its features"),
    "fedamp": ("fedamp:FedAMP", "every client its own mixture of all clients' models, by their distances"),
    "fdlora": ("fdlora:FDLoRA", "a personal and a global adapter, fused per client without gradients"),
    "standalone": ("standalone:Standalone", "private models, each client alone"),
    "pfedlora": ("pfedlora:PFedLoRA", "private backbones, one small shared adapter on the representation"),
    "ce-lora": ("ce_lora:CELoRA", "tri-factor adapters: only the r x r core travels, mixed per client"),
    "feddpa": ("feddpa:FedDPA", "a local beside the global adapter, weighted per example"),
    "fml": ("fml:FML", "a private and a shared model that teach each other"),
    "fedkd": ("fedkd:FedKD", "a private teacher and a shared student, whose updates are compressed"),
    "lg-fedavg": ("lg_fedavg:LGFedAvg", "private representations, one shared head averaged"),
    "fedgh": ("fedgh:FedGH", "private models; the server trains one head on class means of representations"),
    "fedproto": ("fedproto:FedProto", "private models pulled towards shared class prototypes"),
}
"""name -> (module:class, one line)."""

DESCRIPTIONS: Mapping[str, str] = {name: line for name, (_, line) in TABLE.items()}


class _Algorithms(Mapping[str, type[Any]]):
    """The classes; a module is imported when its class is first asked for (importing torch takes seconds)."""

    def __getitem__(self, name: str) -> type[Any]:
        module, _, cls = TABLE[name][0].partition(":")
        found: type[Any] = getattr(import_module(f"{__name__}.{module}"), cls)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(TABLE)

    def __len__(self) -> int:
        return len(TABLE)


ALGORITHMS: Mapping[str, type[Any]] = _Algorithms()
