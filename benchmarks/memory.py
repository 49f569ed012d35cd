"""Peak memory above the loaded model of a federation of 20 and of 1,000 clients, all of them in one round.

What a process holds also grows with the number of batches, up to a plateau: kernels that are kept for every shape, and
gaps between freed activations. So 20 clients are also measured with as many client-steps as the 1,000 take.

Each federation is a whole ``fedlora.run`` in a process of its own: reading the data, one round, scores of every
client, checkpoint, adapters. Run as ``python -m benchmarks.memory FOLDER MODEL ALGORITHM CLIENTS
ROUNDS TOKENS``, this module is that process.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import ROOT, Report

EXAMPLES, FEW, MANY = 20, 20, 1000
LABELS = ("calm", "dull", "keen", "wary")
Tokens = int | Literal["auto"]
CASES: tuple[tuple[str, Tokens], ...] = (("fedit", "auto"), ("flexlora", "auto"), ("fedit", 2048))
"""Algorithms, and the tokens of a pass ("auto": as many as the library chooses)."""
LIMIT = 100.0
"""MB that 1,000 clients may need more than 20."""


def measure(
    folder: Path, model: str, algorithm: str, clients: int, rounds: int = 1, tokens: Tokens = "auto"
) -> dict[str, Any]:
    """One federation in its own process: megabytes above the loaded model, seconds, client-steps."""
    given = (folder, model, algorithm, clients, rounds, tokens)
    words = [sys.executable, "-m", "benchmarks.memory", *map(str, given)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> Report:
    """Both sizes for both algorithms, on MiniLM (short runs: on a tiny encoder)."""
    model = "tiny" if quick else "minilm"
    sizes = ((FEW, 1), (FEW, MANY // FEW), (MANY, 1))
    rows: list[tuple[object, ...]] = []
    details: dict[str, Any] = {}
    for algorithm, tokens in CASES:
        name = algorithm if tokens == "auto" else f"{algorithm}, passes of {tokens:,} tokens"
        found: list[dict[str, Any]] = []
        for clients, rounds in sizes:
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(Path(folder), model, algorithm, clients, rounds, tokens))
            print(f"{name}, {clients} clients, {rounds} rounds: {found[-1]}", file=sys.stderr)
        once, longer, many = (one["megabytes"] for one in found)
        rows.append((name, once, longer, many, many - once, many - longer, found[-1]["seconds"]))
        details[name] = found
    return Report(
        "memory",
        "Peak memory above the loaded model, MB",
        (
            "algorithm",
            f"{FEW} clients, 1 round",
            f"{FEW} clients, {MANY // FEW} rounds",
            f"{MANY:,} clients, 1 round",
            "more than 1 round",
            f"more than {MANY // FEW} rounds",
            f"seconds for {MANY:,}",
        ),
        rows,
        (
            f"{'a tiny BERT' if quick else 'MiniLM'} in the type that was measured to be faster, rank 8, "
            f"{EXAMPLES} examples each (70/10/20), "
            "everybody in every round: a whole run from reading the data to the adapters of up to 100 clients",
            "peak resident memory of the process from the moment that model, tokenizer and libraries are loaded",
            f"{MANY // FEW} rounds of {FEW} clients take as many client-steps as one of {MANY:,}: what kernels per "
            "shape and the allocator's gaps hold is in both",
        ),
        {"federations": details},
    )


# -- the process that is measured


def child(folder: Path, model: str, algorithm: str, clients: int, rounds: int, tokens: Tokens) -> dict[str, Any]:
    """Runs one federation in this process."""
    import fedlora
    from fedlora.study import run as _everything  # noqa: F401  loaded before the count begins

    folder.mkdir(parents=True, exist_ok=True)
    data, module = write_data(folder / "data.jsonl", clients), load(folder, model)
    config = {
        "model": {"name": model, "task": "text-classification", "dtype": "auto"},
        "data": {
            "train": str(data),
            "text": "text",
            "label": "label",
            "max_length": 48,
            "partition": {"by": "column", "column": "client"},
        },
        "algorithm": {"name": algorithm},
        "training": {"rounds": rounds, "batch_size": 8, "eval_every": 0},
        "engine": {"tokens": tokens},
    }
    before = forget_peak()
    start = time.perf_counter()
    result = fedlora.run(config, model=module, out=folder / "run")
    seconds = time.perf_counter() - start
    assert all(line["participants"] == clients for line in result.history[1:])
    return {
        "megabytes": (peak() - before) / 1e6,
        "loaded": before / 1e6,
        "seconds": seconds,
        "client_steps": sum(line["client_steps"] for line in result.history),
    }


def write_data(file: Path, clients: int) -> Path:
    """Texts of 4 to 44 words out of 10,000 made-up ones, frequent as in a language (Zipf); no two are alike."""
    rng = random.Random(clients)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(10_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(2, len(vocabulary) + 2)))
    with file.open("w") as out:
        for client in range(clients):
            for _ in range(EXAMPLES):
                words = rng.choices(vocabulary, cum_weights=weights, k=rng.randint(4, 44))
                row = {"client": f"client {client:04d}", "text": " ".join(words), "label": rng.choice(LABELS)}
                out.write(json.dumps(row) + "\n")
    return file


def load(folder: Path, model: str) -> Any:
    """The encoder with its tokenizer as ``processor``; both have worked once."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    if model == "minilm":
        from fedlora.learning.sources import minilm_folder

        place = minilm_folder()
    else:
        sys.path.insert(0, str(ROOT / "tests"))
        from study import tiny

        place = tiny.encoder(folder / "model")
    module = AutoModel.from_pretrained(place)
    module.processor = AutoTokenizer.from_pretrained(place)
    with torch.no_grad():
        module(**module.processor(["once"] * 64, return_tensors="pt"))
    return module


def forget_peak() -> int:
    """The resident bytes now; the peak is counted from here where the system can (Linux), else from the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were ever resident since."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    place, model, algorithm, clients, rounds, tokens = sys.argv[1:]
    made = child(Path(place), model, algorithm, int(clients), int(rounds), "auto" if tokens == "auto" else int(tokens))
    print(json.dumps(made))
