"""From files to a population: who trains, holds out and tests on what, and what is refused or warned of."""

from __future__ import annotations

import json
import pickle
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedlora.data.duplicates import near_groups
from fedlora.data.population import Population, build, from_datasets
from fedlora.data.preview import describe
from fedlora.data.settings import DataSettings, PartitionSettings
from fedlora.errors import UserError

TASK = "text-classification"


def _rows(count: int, labels: int = 3, owners: int = 4, seed: int = 0) -> list[dict[str, object]]:
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefghijklmnop", k=6))  # noqa: E731
    return [
        {"text": " ".join(word() for _ in range(8)), "label": f"l{rng.randrange(labels)}", "owner": f"o{i % owners}"}
        for i in range(count)
    ]


def _file(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def _all_rows(population: Population) -> list[int]:
    return sorted(int(row) for splits in population.clients.values() for rows in splits.values() for row in rows)


def _owner_and_split(population: Population) -> dict[int, tuple[str, str]]:
    return {
        int(row): (client, split)
        for client, splits in population.clients.items()
        for split, rows in splits.items()
        for row in rows
    }


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(30, 150),
    st.sampled_from(
        [{"clients": 4}, {"clients": 3, "alpha": 2.0}, {"clients": 5, "classes_per_client": 2}, {"column": "owner"}]
    ),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0, 1]),
)
def test_every_row_has_one_client_and_one_split(
    tmp_path: Path, count: int, way: dict[str, object], seed: int, repeats: float, held: int
) -> None:
    rows = _rows(count, seed=seed)
    rng = random.Random(seed)
    rows = [{**row, "text": rng.choice(rows)["text"].upper() + "!"} if rng.random() < repeats else row for row in rows]
    source = _file(tmp_path / "a.jsonl", rows)
    config = DataSettings(
        train=source, partition=PartitionSettings(**way), seed=seed, holdout_clients=held, label_space="client"
    )
    one, two = build(config, TASK), build(config, TASK)
    assert _all_rows(one) == list(range(count))
    assert one.digest == two.digest
    assert _owner_and_split(one) == _owner_and_split(two)
    assert one.digest != build(config.model_copy(update={"seed": seed + 1}), TASK).digest
    assert one.table.column_names == ["text", "label"] == list(one.fields)
    where = _owner_and_split(one)
    texts: dict[str, set[str]] = {}
    for row, text in enumerate(one.table["text"]):
        texts.setdefault(text.lower().rstrip("!"), set()).add(where[row][1])
    crossing = [text for text, splits in texts.items() if len(splits) > 1]
    assert not crossing
    trained = {one.table["label"][int(row)] for client in one.clients for row in one.train(client)}
    assert one.labels == tuple(sorted(trained)) == tuple(sorted({str(row["label"]) for row in rows}))
    assert len(one.seen) == len(one.clients) - held
    for client, splits in one.clients.items():
        fit, holdout = splits["fit"], splits["holdout"]
        assert fit.dtype == holdout.dtype == np.int64
        assert len(fit) > 0 or client in one.unseen
        assert np.array_equal(one.train(client), np.sort(np.concatenate([fit, holdout])))


def test_a_test_file_is_divided_by_the_clients_own_label_shares(tmp_path: Path) -> None:
    train, test = _rows(2000, labels=6, seed=1), _rows(900, labels=6, seed=2)
    config = DataSettings(
        train=_file(tmp_path / "train.jsonl", train),
        test=_file(tmp_path / "test.jsonl", test),
        validation=_file(tmp_path / "dev.jsonl", _rows(300, labels=6, seed=3)),
        partition=PartitionSettings(by="dirichlet", alpha=0.5, clients=5),
    )
    population = build(config, TASK)
    assert _all_rows(population) == list(range(3200))
    assert population.clients.counts().sum(axis=0).tolist() == [2000, 300, 900]
    label = population.table["label"][:]
    totals = Counter(str(row["label"]) for row in train)
    for name, size in (("test", Counter(str(row["label"]) for row in test)), ("holdout", None)):
        size = size or Counter(label[2000:2300])
        for splits in population.clients.values():
            mine = Counter(label[row] for row in splits["fit"])
            got = Counter(label[row] for row in splits[name])
            for value, total in totals.items():
                assert abs(got[value] - size[value] * mine[value] / total) <= 1
    assert all(row < 2000 for splits in population.clients.values() for row in splits["fit"])


def test_a_test_file_is_divided_by_the_column(tmp_path: Path) -> None:
    train, test = _rows(40, seed=1), _rows(30, owners=6, seed=2)
    config = DataSettings(
        train=_file(tmp_path / "train.jsonl", train),
        test=_file(tmp_path / "test.jsonl", test),
        partition=PartitionSettings(column="owner"),
    )
    population = build(config, TASK)
    for row, (client, split) in _owner_and_split(population).items():
        assert client == (train + test)[row]["owner"]
        assert (split == "test") == (row >= 40)
    assert population.unseen == ("o4", "o5")
    assert population.seen == ("o0", "o1", "o2", "o3")
    assert any("2 clients without training data, only tested on: 'o4', 'o5'" in line for line in population.warnings)


def test_given_copies_across_files_are_warned_of(tmp_path: Path) -> None:
    train = _rows(50)
    test = [{**row, "text": str(row["text"]).title() + "."} for row in train[:7]] + _rows(5, seed=9)
    config = DataSettings(
        train=_file(tmp_path / "a.jsonl", train),
        test=_file(tmp_path / "b.jsonl", test),
        partition=PartitionSettings(clients=2),
    )
    warnings = build(config, TASK).warnings
    # copies of rows that landed in holdout count as well: they train too in the end
    assert any(line.startswith("7 of 12 given test examples are near-copies") for line in warnings)


def test_holdout_clients_never_train(tmp_path: Path) -> None:
    rows = _rows(80)
    rows[3]["label"] = "rare"  # owner o3
    source = _file(tmp_path / "a.jsonl", rows)
    config = DataSettings(train=source, partition=PartitionSettings(column="owner"), holdout_clients=("o1",))
    population = build(config, TASK)
    assert population.unseen == ("o1",)
    assert population.seen == ("o0", "o2", "o3")
    assert [len(rows) for rows in population.clients["o1"].values()] == [14, 2, 4]
    where = _owner_and_split(population)
    assert where[3][1] != "test"  # the only example of its label must train
    held = config.model_copy(update={"holdout_clients": ("o3",)})
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: label 'rare' of client 'o3', which never trains"):
        build(held, TASK)
    own = build(held.model_copy(update={"label_space": "client"}), TASK)
    assert own.labels == ("l0", "l1", "l2", "rare")
    stated = build(held.model_copy(update={"labels": ("rare", "l2", "l1", "l0")}), TASK)
    assert stated.labels == ("rare", "l2", "l1", "l0")
    assert any("no training example has 'rare'" in line for line in stated.warnings)
    drawn = config.model_copy(update={"holdout_clients": 2, "train": _file(tmp_path / "b.jsonl", _rows(80))})
    assert len(build(drawn, TASK).seen) == 2


def test_labels_that_nothing_trains_are_refused_with_their_line(tmp_path: Path) -> None:
    train, test = _rows(60), _rows(10, seed=5)
    test[4]["label"] = "L1"
    config = DataSettings(
        train=_file(tmp_path / "train.jsonl", train),
        test=_file(tmp_path / "test.jsonl", test),
        partition=PartitionSettings(clients=3),
    )
    with pytest.raises(UserError, match=r"test\.jsonl, line 5: label 'L1' is in no training example \(nearest: 'l1'\)"):
        build(config, TASK)
    with pytest.raises(UserError, match=r"train\.jsonl, line \d+: label 'l2' is not in data\.labels"):
        build(config.model_copy(update={"test": None, "labels": ("l0", "l1")}), TASK)


def test_numbers_as_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows = [{**row, "label": i % 12} for i, row in enumerate(_rows(120))]
    config = DataSettings(train=_file(tmp_path / "a.jsonl", rows), partition=PartitionSettings(clients=2))
    assert build(config, TASK).labels == tuple(map(str, range(12)))


def test_per_client_takes_distinct_examples_first(tmp_path: Path) -> None:
    rows = _rows(200, owners=4)
    for i in range(0, 160, 8):  # twenty times the same line of o0
        rows[i]["text"] = "always the same eight words of this client"
    source = _file(tmp_path / "a.jsonl", rows)
    config = DataSettings(train=source, partition=PartitionSettings(column="owner"), per_client=31)
    one = build(config, TASK)
    assert one.clients.counts().sum(axis=1).tolist() == [31] * 4
    own = [one.table["text"][int(row)] for rows in one.clients["o0"].values() for row in rows]
    assert len(set(own)) == 31  # 30 unique lines and one of the copies
    assert _all_rows(one) == list(range(one.table.num_rows))  # nobody tokenises what nobody has
    assert one.digest == build(config, TASK).digest != build(config.model_copy(update={"seed": 1}), TASK).digest
    assert not one.warnings
    few = DataSettings(train=source, partition=PartitionSettings(column="owner"), per_client=1000)
    assert _all_rows(build(few, TASK)) == list(range(200))


def test_per_client_counts_given_parts_each(tmp_path: Path) -> None:
    train, test = _file(tmp_path / "a.jsonl", _rows(120)), _file(tmp_path / "b.jsonl", _rows(80, seed=1))
    built = build(
        DataSettings(train=train, test=test, partition=PartitionSettings(column="owner"), per_client=16), TASK
    )
    assert built.clients.counts().tolist() == [[14, 2, 16]] * 4


def test_tiny_clients(tmp_path: Path) -> None:
    rows = _rows(7, labels=1, owners=7)
    rows += [{**row, "owner": "o0"} for row in _rows(1, labels=1, seed=3)]
    config = DataSettings(train=_file(tmp_path / "a.jsonl", rows), partition=PartitionSettings(column="owner"))
    population = build(config, TASK)
    assert population.clients.counts().tolist() == [[1, 0, 1]] + [[1, 0, 0]] * 6
    assert "6 clients without test data, left out of the scores: 'o1', 'o2', 'o3'" in population.warnings[0]


def test_unused_classes_are_warned_of(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.jsonl", _rows(90, labels=5))
    ways = PartitionSettings(classes_per_client=2, clients=2)
    population = build(DataSettings(train=source, partition=ways), TASK)
    assert len(population.labels) == 4
    assert len(_all_rows(population)) < 90
    assert f"{90 - len(_all_rows(population))} examples (labels 'l" in population.warnings[0]


def test_causal_lm_skewed_by_a_column(tmp_path: Path) -> None:
    rows = [{"q": row["text"], "a": f"answer {row['text']}", "kind": row["label"]} for row in _rows(200)]
    source = _file(tmp_path / "a.jsonl", rows)
    settings_ = DataSettings(
        train=source, prompt="q", response="a", partition=PartitionSettings(column="kind", alpha=0.3)
    )
    population = build(settings_, "causal-lm")
    assert population.table.column_names == ["prompt", "response"]
    assert population.labels == ()
    assert population.table[3] == {"prompt": rows[3]["q"], "response": rows[3]["a"]}
    plain = DataSettings(train=source, text="q", test=f"{source}", partition=PartitionSettings(clients=4))
    assert build(plain, "causal-lm").clients.counts()[:, 2].tolist() == [50, 50, 50, 50]
    with pytest.raises(UserError, match=r"no data\.label\n  -> name a column"):
        build(DataSettings(train=source, text="q", partition=PartitionSettings(alpha=0.3)), "causal-lm")
    with pytest.raises(UserError, match=r"data\.train is missing"):
        build(DataSettings(text="q"), "causal-lm")


def test_images_are_kept_encoded_and_copies_stay_together(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "x").mkdir()
    for i in range(20):
        image.new("RGB", (3, 2), (i // 2, 0, 0)).save(tmp_path / "x" / f"{i}.png")
    rows = [{"image": f"x/{i}.png", "label": i % 4} for i in range(20)]
    config = DataSettings(train=_file(tmp_path / "a.jsonl", rows), partition=PartitionSettings(clients=2))
    population = build(config, "image-classification")
    assert population.table[5]["image"].size == (3, 2)
    assert population.table[5]["image"].getpixel((0, 0)) == (2, 0, 0)
    assert near_groups(population.table).tolist() == [i // 2 for i in range(20)]
    where = _owner_and_split(population)
    assert all(where[i][1] == where[i + 1][1] for i in range(0, 20, 2))


# ------------------------------------------------------------------------------------------- from Python


def _client(rows: list[dict[str, object]], **columns: list[str]) -> datasets.Dataset:
    data = {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}
    return datasets.Dataset.from_dict({**data, **columns})


def test_from_datasets_respects_a_split_column() -> None:
    rows = _rows(60)
    said = ["train"] * 12 + ["validation"] * 3 + ["test"] * 5
    clients = {
        "b/ü": _client(rows[:20], split=said),
        "a": _client(rows[20:40]),
        "c": _client(rows[40:], split=["Train"] * 20),
    }
    population = from_datasets(clients, DataSettings(), TASK)
    assert list(population.clients) == ["a", "b/ü", "c"]
    assert population.clients.counts().tolist() == [[14, 2, 4], [12, 3, 5], [14, 2, 4]]
    given_ = population.clients["b/ü"]
    assert [population.table["text"][int(i)] for i in given_["holdout"]] == [row["text"] for row in rows[12:15]]
    assert [population.table["text"][int(i)] for i in given_["test"]] == [row["text"] for row in rows[15:20]]
    again = from_datasets(dict(reversed(clients.items())), DataSettings(), TASK)
    assert again.digest == population.digest


def test_from_datasets_names_the_client_at_fault() -> None:
    rows = _rows(20)
    good = _client(rows[:10])
    for clients, message in (
        ({}, "no clients were given"),
        (good, "clients: a Dataset was given, no mapping"),
        ({1: good}, "clients: the id 1 is of type int"),
        ({"a": good, "b": rows}, "client 'b' is given as a list, not as a datasets.Dataset\n.*from_pandas"),
        ({"a": good, "b": good.select([])}, "client 'b' has no examples"),
        ({"a": good, "b": good.rename_column("label", "lable")}, r"client 'b' has no column 'label'.*nearest: 'lable'"),
        (
            {"a": good, "b": _client(rows[:2], split=["train", "tset"])},
            r"client 'b', row 2: .*'tset' \(nearest: 'test'\)",
        ),
        ({"a": good, "b": _client(rows[:2], split=["test", "test"])}, "client 'b' has no training examples"),
        (
            {"a": good, "b": _client([*rows[:2], {"text": "", "label": "x"}])},
            "client 'b', row 3: column 'text' is empty",
        ),
    ):
        with pytest.raises(UserError, match=message):
            from_datasets(clients, DataSettings(), TASK)


# ------------------------------------------------------------------------------------------- size, shape, preview


def test_a_thousand_clients_are_quick_and_small(tmp_path: Path) -> None:
    rows = [{**row, "owner": i // 20} for i, row in enumerate(_rows(20_000))]
    source = _file(tmp_path / "a.jsonl", rows)
    build(DataSettings(train=_file(tmp_path / "b.jsonl", _rows(20)), partition=PartitionSettings(clients=2)), TASK)
    start = time.process_time()
    tracemalloc.start()
    population = build(DataSettings(train=source, partition=PartitionSettings(column="owner")), TASK)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 20  # under a second without tracing
    assert peak < 60e6
    assert now < 10e6
    assert len(population.clients) == 1000
    assert population.clients.counts().tolist() == [[14, 2, 4]] * 1000
    rows_of = population.clients["7"]["fit"]
    assert rows_of.base is not None  # a view, not a copy
    with pytest.raises(ValueError, match="read-only"):
        rows_of[0] = 1
    copy = pickle.loads(pickle.dumps(population.clients))
    assert np.array_equal(copy["7"]["fit"], rows_of)
    with pytest.raises(KeyError):
        population.clients["x"]


def test_the_preview_shows_clients_labels_and_warnings(tmp_path: Path) -> None:
    rows = _rows(81, owners=4)
    rows[80]["owner"] = "[bold]odd[/bold]"
    source = _file(tmp_path / "a.jsonl", rows)
    config = DataSettings(train=source, partition=PartitionSettings(column="owner"), holdout_clients=("o3",))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(describe(build(config, TASK), clients=4, labels=2))
    shown = console.export_text()
    assert "4 training clients and 1 that never train, 81 examples: 57 fit, 8 holdout, 16 test" in shown
    assert "[bold]odd[/bold]" in shown
    assert "and 1 more clients" in shown
    assert "and 1 rarer labels" in shown
    assert "warning: 1 client without test data, left out of the scores: '[bold]odd[/bold]'" in shown
    console.file.close()


def test_a_missing_partition_column_names_the_key_that_takes_it(tmp_path: Path) -> None:
    train = _file(tmp_path / "train.jsonl", _rows(8))
    for way in ({"column": "ovner"}, {"alpha": 1.0, "column": "ovner"}):
        settings = DataSettings(train=train, partition=PartitionSettings.model_validate(way))
        with pytest.raises(UserError, match=r"no column 'ovner' .*nearest: 'owner'\)\n  -> .*partition = \{column = "):
            build(settings, TASK)
