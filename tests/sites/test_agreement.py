"""Facts agree exactly where what they stand for is equal, and a difference is told by name with both values."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from conformance.table import TABLE, world
from fedlora.algorithms import ALGORITHMS
from fedlora.algorithms.fedit import FedIT
from fedlora.federation.orders import Objective, cross_entropy
from fedlora.learning.backbone import Backbone
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import TextClassification
from fedlora.sites.agreement import algorithm_fact, differences, facts, unsuited
from study.tiny import encoder

LABELS = ("malign", "benign")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("model") / "enc")


def other(outputs: Any, params: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(outputs, params, batch)


def loaded(model: Path, labels: tuple[str, ...] = LABELS) -> Backbone:
    return load_backbone(model, "text-classification", labels=labels)


def told(backbone: Backbone, *, seed: int = 3, task: Any = None, name: str = "fedit", **spec: Any) -> dict[str, str]:
    agreed = replace(backbone.spec(4, 8.0), **spec)
    return facts(backbone, task or TextClassification(backbone.labels), agreed, ALGORITHMS[name](), seed)


def test_two_copies_agree_whatever_their_folder_and_compute_type(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    narrow = loaded(copy)
    one = told(loaded(model))
    assert differences(one, told(narrow)) == []
    assert differences(one, told(narrow.to(torch.bfloat16))) == []
    narrow.processor(
        ["the cat"], truncation=True, max_length=5, padding="max_length"
    )  # leaves its mark in the tokenizer
    assert differences(one, told(narrow)) == []


def names(found: list[str]) -> set[str]:
    return {line.split(":")[0] for line in found}


def test_each_difference_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = loaded(model)
    one = told(backbone)
    assert names(differences(one, told(backbone, seed=4))) == {"start"}
    assert names(differences(one, told(backbone, name="fdlora"))) == {"algorithm"}
    assert names(differences(one, told(backbone, task=TextClassification(LABELS, max_length=64)))) == {"template"}
    assert names(differences(one, told(backbone, alpha=9.0))) == {"model", "start"}
    swapped = differences(one, told(loaded(model, LABELS[::-1])))
    assert "labels" in names(swapped)
    assert any("in another order" in line for line in swapped)
    monkeypatch.setattr(fedlora, "__version__", "9.9")
    assert differences(one, told(backbone)) == [
        f"fedlora: the server has {one['fedlora']}, this site 9.9 -> install the same version at both ends"
    ]


def test_a_label_is_told_by_name(model: Path) -> None:
    found = differences(told(loaded(model)), told(loaded(model, ("malign", "bening"))))
    line = next(line for line in found if line.startswith("labels"))
    assert "only the server has 'benign'; only this site has 'bening'" in line
    assert "[data.labels]" in line


def test_one_changed_weight_and_one_changed_word_are_noticed(model: Path) -> None:
    one, backbone = told(loaded(model)), loaded(model)
    with torch.no_grad():
        backbone.module.get_parameter(next(iter(backbone._actual.values()))).view(-1)[7] += 0.5
    assert names(differences(one, told(backbone))) == {"base"}
    backbone = loaded(model)
    backbone.processor.add_tokens(["zebra"])
    assert names(differences(one, told(backbone))) == {"tokenizer"}
    backbone = loaded(model)
    backbone.processor.chat_template = "{{ messages }}"
    assert names(differences(one, told(backbone))) == {"template"}


def test_a_fact_that_only_one_of_them_knows_is_a_difference() -> None:
    assert "this site nothing" in differences({"new": "1"}, {})[0]
    assert "the server has nothing" in differences({}, {"new": "1"})[0]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_s_fact_is_the_same_in_every_process(name: str) -> None:
    found = algorithm_fact(ALGORITHMS[name]())
    assert " at 0x" not in found
    assert found == algorithm_fact(ALGORITHMS[name]())


@dataclass(frozen=True)
class Own(FedIT):
    """Has a function and a set among its parameters."""

    objective: Objective = cross_entropy
    layers: frozenset[int] = frozenset()


def test_a_function_is_told_by_name_not_by_its_place_in_memory() -> None:
    assert "objective=<function cross_entropy>" in algorithm_fact(Own())
    assert algorithm_fact(Own(objective=other)) != algorithm_fact(Own())


def test_a_set_is_told_in_order() -> None:
    one, other_way = frozenset([0, 8]), frozenset([8, 0])
    assert repr(one) != repr(other_way)  # as sets of texts differ from process to process
    assert "layers={0, 8}" in algorithm_fact(Own(layers=one))
    assert algorithm_fact(Own(layers=one)) == algorithm_fact(Own(layers=other_way))
    assert algorithm_fact(Own(layers=one)) != algorithm_fact(Own(layers=frozenset([0])))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_whom_an_algorithm_cannot_serve_is_known_before_a_round(name: str) -> None:
    fleet = world(name)
    assert unsuited(fleet.algorithm, fleet.spec, 0, fleet.clients.values()) == ""
    odd = replace(fleet.clients["c1"], ranks=dict.fromkeys(fleet.spec.ranks, 3))
    found = unsuited(fleet.algorithm, fleet.spec, 0, [odd])
    assert ("ranks must be equal, but client 'c1' has rank 3" in found) == (TABLE[name].ranks == "refused")
    stranger = replace(odd, ranks={"fc1": 3, "fc9": 3})
    assert "client 'c1'" in unsuited(fleet.algorithm, fleet.spec, 0, [stranger])
    assert "'fc2', 'fc9'" in unsuited(fleet.algorithm, fleet.spec, 0, [stranger])
