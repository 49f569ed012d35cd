"""The pure pieces of the comparison with other simulators: counting operations, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.lanes import SHAPES
from benchmarks.peers import compare
from benchmarks.peers.cases import (
    FLOWER_PLAIN,
    FLOWER_TUNED,
    OURS,
    OURS_APART,
    PFL_PLAIN,
    PFL_TUNED,
    WAYS,
    Case,
    candidates,
    cases,
    crowds,
)
from benchmarks.peers.compare import Measured, Outcome, table
from benchmarks.peers.environments import FLOWER, PFL
from benchmarks.peers.flops import Encoder
from benchmarks.peers.ours import texts
from benchmarks.peers.processes import Run, Setting, Task
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fedlora.learning.flops import Counter
from fedlora.learning.loading import load_backbone

ROWS, LENGTH, WIDTH, LABELS = 3, 10, 32, 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_are_those_that_torch_counts(layers: int) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=LABELS,
        attn_implementation="eager",
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"])
    model = get_peft_model(BertForSequenceClassification(config), lora)
    ids = torch.randint(0, 64, (ROWS, LENGTH))
    with Counter() as counter:
        model(input_ids=ids, labels=torch.zeros(ROWS, dtype=torch.long)).loss.backward()
    pooler, classifier = 2 * (2 * ROWS * WIDTH**2), 3 * (2 * ROWS * WIDTH * LABELS)
    encoder = Encoder(layers, WIDTH, 48, rank=4)
    assert counter.total == encoder.per_step([LENGTH] * ROWS, 1) + pooler + classifier
    assert encoder.per_step([LENGTH] * 6, 2) == encoder.per_step([LENGTH] * ROWS, 1)


def outcome(*seconds: float, megabytes: float | None = None) -> Outcome:
    return Outcome(Setting(), [Run([value], 1.0, megabytes, {"type": "bfloat16"}) for value in seconds])


def test_table_has_rates_ratios_shares_and_failures() -> None:
    small = Case("small", SHAPES[0], clients=20, steps=5, rounds=1, repeats=2)
    many = Case("many", SHAPES[1], clients=1000, steps=1, rounds=1, repeats=1, ways=(OURS, PFL_TUNED), memory=True)
    first = {OURS: outcome(2.0, 4.0, 2.0), FLOWER_PLAIN: outcome(8.0, 8.0, 10.0), PFL_PLAIN: outcome(4.0, 8.0, 4.0)}
    first |= {
        OURS_APART: outcome(1.0, 1.0, 1.0),
        FLOWER_TUNED: Outcome(failure="no such wheel"),
        PFL_TUNED: outcome(4.0),
    }
    last = {OURS: outcome(10.0, megabytes=600.0), PFL_TUNED: outcome(25.0)}
    found = [Measured(small, first, work=1e9, peak=200e9), Measured(many, last, work=1e9, peak=200e9)]
    report = table("peers", "Others", found, {"flower": {"flwr": "1.41.0"}})
    rows = {row[0]: row[1:] for row in report.rows}
    assert list(rows) == list(WAYS)
    assert rows[OURS] == ("50.0 (1.00x, 2.00x; 25%)", "10.0 s (1.00x), 600 MB")
    assert rows[FLOWER_PLAIN] == ("12.5 (4.00x, 8.00x; 6%)", None)
    assert rows[FLOWER_TUNED] == ("failed", None)
    assert rows[PFL_TUNED] == ("25.0 (2.00x, 4.00x; 12%)", "25.0 s (2.50x)")
    text = report.markdown()
    assert "failed on small: Flower, tuned: no such wheel" in text
    assert "environment of flower: flwr 1.41.0" in text
    assert report.details["cases"]["small"][FLOWER_PLAIN]["ratios"] == {OURS: 4.0, OURS_APART: 8.0}


def test_our_texts_have_as_many_tokens_as_the_peers_batches(tmp_path: Path) -> None:
    case = Case("some", SHAPES[2], clients=3, steps=2, rounds=1, repeats=1)
    spec = load_backbone("minilm", "text-classification", labels=("a", "b", "c", "d")).spec(8)
    task = case.task(tmp_path, spec)
    rows = list(texts(task))
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    assert [len(tokenizer(row["text"])["input_ids"]) for row in rows] == case.lengths(spec).tolist()
    assert [row["client"] for row in rows] == [f"{k:04d}" for k in range(3) for _ in range(16)]


def test_cases_and_environments_are_what_is_promised() -> None:
    real = cases(quick=False)
    assert [case.clients for case in real] == [20, 20, 20]
    assert [case.name for case in cases(quick=True)] == [shape.name for shape in SHAPES]
    assert [case.clients for case in crowds(quick=False)] == [1000]
    for environment in (FLOWER, PFL):
        torch_, *rest = environment.requirements()
        assert torch_.startswith("torch==")
        assert any(name.startswith("peft==") for name in rest)


def test_every_case_takes_turns_and_failures_stay_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, bool, int | None]] = []

    def start(way: str, task: Task) -> Run:
        turns.append((way, task.setting.autocast, task.setting.workers))
        if way == FLOWER_PLAIN:
            raise RuntimeError("the actors died")
        return Run([1.0 if task.setting.autocast else 2.0], 1.0, 500.0, {"type": "bfloat16"})

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare, "peak", lambda encoder, tokens: 1e12)
    monkeypatch.setattr(compare, "versions", lambda: ({"flower": {"flwr": "1.41.0"}}, {"pfl": "no such Python"}))
    report = compare.shapes(quick=True)
    rows = {row[0]: row[1:] for row in report.rows}
    assert rows[FLOWER_PLAIN] == ("failed",) * 3
    assert rows[PFL_TUNED] == ("failed",) * 3
    assert rows[FLOWER_TUNED][0].startswith("2.0 (0.50x, 0.50x; ")
    assert "failed on 8 x 32 tokens: pfl-research, tuned: no such Python" in report.markdown()
    trials = len(candidates(quick=True))  # only the first case is tuned, then all ways take turns
    assert [turn[0] for turn in turns[trials : trials + 2]] == [OURS, OURS_APART]
    assert [turn[0] for turn in turns[trials + 4 : trials + 8]] == [OURS, OURS_APART, FLOWER_PLAIN, FLOWER_TUNED]
