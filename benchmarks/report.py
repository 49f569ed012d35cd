"""A benchmark's result: a Markdown table, the same as JSON, and the machine that it was taken on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Report:
    """``rows`` hold what ``columns`` name; ``notes`` say how it was measured; ``details`` is for the JSON alone."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self, quick: bool = False) -> str:
        """The title, the table, the notes and the machine."""
        lines = [f"# {self.title}", ""]
        if quick:
            lines += ["*A short run, to see that it works: not for quoting.*", ""]
        lines += [_row(self.columns), _row(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_row([_text(cell) for cell in row]) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)]
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in machine().items()), ""]
        return "\n".join(lines)

    def write(self, quick: bool = False) -> Path:
        """``results/NAME.md`` and ``.json``; short runs go to ``results/quick``, so that they replace no real one."""
        folder = RESULTS / "quick" if quick else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        plain = {
            "name": self.name,
            "title": self.title,
            "quick": quick,
            "machine": machine(),
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "notes": list(self.notes),
            **self.details,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(plain, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(self.markdown(quick))
        return folder / f"{self.name}.md"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(cell: object) -> str:
    if cell is None:
        return ""
    return (
        f"{cell:.3g}"
        if isinstance(cell, float) and abs(cell) < 100
        else f"{cell:.0f}"
        if isinstance(cell, float)
        else str(cell)
    )


def machine() -> dict[str, object]:
    """Cores that this process may use, the processor, versions and threads."""
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The model's name, and what of its instructions decides about bfloat16."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name") or platform.machine()
    flags = set(facts.get("flags", "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({' '.join(known)})" if known else name
