"""The table of names, and what an algorithm's file may know."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora.algorithms
from fedlora.algorithms import ALGORITHMS, TABLE
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.orders import Training
from fedlora.federation.spec import Extras

FOLDER = Path(fedlora.algorithms.__file__).parent
OWN = {module.partition(":")[0] for module in TABLE.values()}
ALLOWED = {
    "fedlora.federation.algorithm",
    "fedlora.federation.orders",
    "fedlora.federation.spec",
    "fedlora.federation.aggregate",
    "fedlora.adapters.algebra",
    "fedlora.adapters.lowrank",
    "fedlora.algorithms.distillation",
    "fedlora.algorithms.prototypes",
    "fedlora.errors",
    # what several algorithms share: a file of this folder that is no algorithm of the table
    *(f"fedlora.algorithms.{file.stem}" for file in FOLDER.glob("*.py") if file.stem not in OWN),
}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_entry_is_a_frozen_dataclass_with_defaults(name: str) -> None:
    cls = ALGORITHMS[name]
    assert cls.__bases__ == (Algorithm,)
    value = cls()
    assert isinstance(value.training, Training)
    assert isinstance(getattr(value, "extras", Extras()), Extras)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.training = Training()
    assert cls.__doc__.splitlines()[0].strip().endswith((".", ":"))


def test_names_are_listed_without_importing_torch() -> None:
    program = "import sys, fedlora.algorithms as a; print(len(a.ALGORITHMS), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(len(ALGORITHMS)), "False"]
    with pytest.raises(KeyError):
        ALGORITHMS["nothing"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_files_know_the_contract_and_nothing_else_of_the_project(file: Path) -> None:
    tree = ast.parse(file.read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {module for module in found if module.startswith("fedlora")} <= ALLOWED
    assert not {module.split(".")[0] for module in found} & {"cma", "ot", "sklearn", "transformers", "peft"}
