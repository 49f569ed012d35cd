"""Log lines of events that have several: python studies/fdlora-logs/prepare.py [logs_16_systems.parquet]

Writes runs/fdlora-logs/data.parquet with a column ``split``. An event's lines differ in their parameters only. Kept on
one side of the split, as near-copies are by default, many test lines would be of events that were never trained; so
distinct lines are divided by event here: has the model learnt an event, whatever its parameters?
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path("runs/fdlora-logs/data.parquet")
LEAST, MOST, SYSTEM = 5, 20, 150
"""Distinct lines of an event, at least and at most; lines of a system."""
SHARES = (("test", 0.2), ("validation", 0.3))
"""Splits by cumulated share; the rest is trained on."""


def divided(lines: list[str], draw: random.Random) -> dict[str, str]:
    """Every line's split: of an event, at least one line each."""
    draw.shuffle(lines)
    found = dict.fromkeys(lines, "train")
    start = 0
    for split, share in SHARES:
        stop = max(start + 1, round(share * len(lines)))
        found.update(dict.fromkeys(lines[start:stop], split))
        start = stop
    return found


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "studies/data/logs_16_systems.parquet")
    events: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in pq.read_table(source).to_pylist():
        events[row["system"]][row["event"]].add(row["content"])
    rows: list[dict[str, str]] = []
    for system, found in sorted(events.items()):
        draw = random.Random(system)
        names = sorted(name for name, lines in found.items() if len(lines) >= LEAST)
        draw.shuffle(names)
        own: list[dict[str, str]] = []
        for name in names:
            lines = draw.sample(sorted(found[name]), min(MOST, len(found[name])))
            if len(own) + len(lines) > SYSTEM:
                continue
            about = {"system": system, "event": f"{system} {name}"}
            own += [{**about, "content": line, "split": part} for line, part in divided(lines, draw).items()]
        rows += own
        print(f"{system}: {len(own)} lines of {len({row['event'] for row in own})} events")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), OUT)
    print(f"{OUT}: {len(rows)} lines")


if __name__ == "__main__":
    main()
