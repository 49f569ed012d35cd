"""The peers' environments: each has its own, made from PyPI when first needed and kept under ``benchmarks/.envs``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT

FOLDER = ROOT / "benchmarks" / ".envs"
SHARED = ("transformers", "peft", "numpy")
"""What the peers take in the project's own versions, so that the same model code is compared."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment. ``packages`` is what the peer needs beside torch, transformers and PEFT; ``shows`` are the
    distributions whose versions a report names."""

    name: str
    packages: tuple[str, ...]
    shows: tuple[str, ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return FOLDER / self.name / "bin" / "python"

    def ready(self) -> Path:
        """Its interpreter, after it was made if need be. RuntimeError says what failed."""
        wanted = "\n".join(self.requirements())
        done = FOLDER / self.name / "installed.txt"
        if done.exists() and done.read_text() == wanted:
            return self.python
        shutil.rmtree(FOLDER / self.name, ignore_errors=True)
        print(f"making the environment of {self.name}", file=sys.stderr, flush=True)
        command([sys.executable, "-m", "venv", str(FOLDER / self.name)])
        pip = [str(self.python), "-m", "pip", "install", "--quiet"]
        first, *rest = self.requirements()
        command([*pip, first])  # alone: with it installed, nothing else asks for another build of it
        command([*pip, *rest])
        done.write_text(wanted)
        return self.python

    def requirements(self) -> list[str]:
        """torch first."""
        known = constraints()
        return [f"torch=={known['torch']}", *(f"{name}=={known[name]}" for name in SHARED), *self.packages]

    def versions(self) -> dict[str, str]:
        """Of what was installed."""
        text = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in "
        text += "sys.argv[1:]}))"
        return json.loads(command([str(self.python), "-c", text, *self.shows]))


FLOWER = Environment("flower", ("flwr[simulation]==1.41.*",), ("flwr", "ray", "torch", "transformers", "peft"))
PFL = Environment("pfl", ("pfl[pytorch]==0.6.*",), ("pfl", "torch", "transformers", "peft"))


def constraints() -> dict[str, str]:
    """The project's pinned versions."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def command(words: list[str]) -> str:
    """What it printed; RuntimeError with the last line of its errors if it failed."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no output"]
        raise RuntimeError(f"{Path(words[0]).name} {' '.join(words[1:4])}: {last[0]}".replace(str(ROOT), "."))
    return done.stdout
