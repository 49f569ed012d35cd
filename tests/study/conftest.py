"""What several files of tests are given."""

from __future__ import annotations

import sys
import types

import pytest

from study.own_code import Temperature, halves


@pytest.fixture
def user_code(monkeypatch):
    """A gate and a prediction as if they had come from a user's algorithm file."""
    module = types.ModuleType("fedlora_user_test")
    for item in (halves, Temperature):
        monkeypatch.setattr(item, "__module__", module.__name__)
        setattr(module, item.__name__, item)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
