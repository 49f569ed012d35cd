"""Federated LoRA fine-tuning for clients that differ in data, resources and models.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import fedlora
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = [{"text": f"def plus_{i}(x):\\n    return x + {i}", "owner": f"team-{i % 2}"} for i in range(40)]
    >>> _ = (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    >>> settings = {
    ...     "model": {"name": "embedded-lm", "task": "causal-lm", "dtype": "float32"},
    ...     "data": {"train": str(folder / "code.jsonl"), "text": "text", "partition": {"column": "owner"}},
    ...     "algorithm": {"name": "fedit"},
    ...     "training": {"rounds": 1, "steps": 1},
    ... }
    >>> result = fedlora.run(settings, out=folder / "run")        # or fedlora.run("my.toml")
    >>> result.summary["metric"], list(result.summary["personal"]["per_client"])
    ('bits_per_byte', ['team-0', 'team-1'])
    >>> [answer] = fedlora.predict(result.folder, ["def plus_7"], client="team-1", max_new_tokens=3)
    >>> sorted(fedlora.evaluate(result.folder, folder / "code.jsonl"))
    ['bits_per_byte', 'loss']
    >>> place, scores = fedlora.personalize(result.folder, folder / "code.jsonl", client="team-2")
    >>> fedlora.export(result.folder, folder / "adapter", client="team-2").name      # PEFT loads it
    'adapter'
    >>> fedlora.resume(result.folder, rounds=2).summary["rounds"]
    2

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
