"""A federation in fedlora's simulator: ``python -m benchmarks.peers.ours TASK.json`` prints a line of JSON, as the
peers' programs do. Type, lanes and tokens of a pass are those that "auto" stands for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.lanes import SEED, TASK, World, fleet, world
from benchmarks.peers.cases import ALPHA, LABELS, RANK, shape_of
from benchmarks.peers.processes import Task
from fedlora.federation.rounds import rounds
from fedlora.federation.sampling import cohort
from fedlora.federation.spec import Client
from fedlora.learning.backbone import Backbone, load_backbone
from fedlora.learning.batches import lanes_for
from fedlora.learning.fast import measure
from fedlora.study.experiment import TOKENS


def timed(task: Task, backbone: Backbone, large: World) -> list[float]:
    """Seconds of every round, the first with a small cohort."""

    def sampler(clients: Sequence[Client], round: int, seed: int) -> Sequence[Client]:
        return cohort(clients, round, seed, min(task.warm, task.clients) if round == 1 else None)

    lanes = lanes_for(TOKENS, large.examples.lengths, large.shape.batch, len(large.splits))
    members = fleet(backbone, large, lanes, TOKENS)
    reports = rounds(large.algorithm, large.spec, members, total=task.rounds + 1, seed=SEED, sampler=sampler)
    moments = []
    for report in reports:
        assert not report.lost
        assert not report.rejected
        moments.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(moments)]


def main() -> None:
    """Loads, chooses the type as a run does, and times the rounds."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    backbone = load_backbone("minilm", "text-classification", labels=LABELS)
    spec = backbone.spec(RANK, ALPHA)
    large = world(shape_of(task.shape), task.clients, task.steps, spec)
    dtype = measure(backbone, TASK, large.examples, spec, TOKENS)
    backbone.to(dtype)
    start = large.algorithm.server_init(spec, SEED)["merged"]
    count = sum(value.numel() for name, value in start.items() if not name.endswith("/scale"))
    ready = time.time()
    seconds = timed(task, backbone, large)
    print(json.dumps({"seconds": seconds, "ready": ready, "trained": count, "type": str(dtype).partition(".")[2]}))


if __name__ == "__main__":
    main()
