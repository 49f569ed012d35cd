"""Federated LoRA fine-tuning for clients that differ in data, resources and models.

    import fedlora
    result = fedlora.run("my.toml")
    result.summary["personal"]["mean"]

Names are imported when they are first used: ``import fedlora`` itself loads nothing heavy.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.errors import Interrupted, UserError
    from fedlora.study.after import evaluate, personalize
    from fedlora.study.export import export
    from fedlora.study.predict import predict
    from fedlora.study.run import Result, resume, run

# GNU OpenMP's threads spin at barriers as if nobody else wanted the core: beside one busy process a round took ten
# times as long. With short spinning it takes half as long again, and on a quiet machine as long as before. It is read
# when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = ["Interrupted", "Result", "UserError", "evaluate", "export", "personalize", "predict", "resume", "run"]

_PLACES = {
    "run": "study.run",
    "resume": "study.run",
    "Result": "study.run",
    "evaluate": "study.after",
    "personalize": "study.after",
    "export": "study.export",
    "predict": "study.predict",
    "UserError": "errors",
    "Interrupted": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(import_module(f"fedlora.{_PLACES[name]}"), name)
