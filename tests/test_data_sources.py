"""Reading files: what comes out, and that every fault is reported with its file, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.data.fields import columns_of, examples, extract
from fedlora.data.keys import in_order
from fedlora.data.settings import DataSettings, PartitionSettings
from fedlora.data.sources import parts, read
from fedlora.errors import UserError

ROWS = [{"text": "good\nfilm", "label": "pos"}, {"text": 'a "bad", one', "label": "neg"}, {"text": "ünï", "label": "1"}]
TASK = "text-classification"


def _write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _table(source: str, **columns: str) -> pa.Table:
    names = columns or {"text": "text", "label": "label"}
    return pa.concat_tables([extract(part, names) for part in parts(source)])


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    paths = [
        _write(tmp_path / "a.jsonl", lines),
        _write(tmp_path / "b.jsonl", "\ufeff" + lines.replace("\n", "\r\n\r\n") + "\n\n"),
        _write(tmp_path / "c.json", json.dumps(ROWS, indent=1)),
        _write(tmp_path / "d.csv", 'text,label\n"good\nfilm",pos\n"a ""bad"", one",neg\nünï,1\n'),
        _write(tmp_path / "e.tsv", 'text\tlabel\n"good\nfilm"\tpos\n"a ""bad"", one"\tneg\nünï\t1\n'),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    for path in [*paths, str(tmp_path / "f.parquet")]:
        before = Path(path).read_bytes()
        assert read(path).to_list() == ROWS
        assert _table(path).to_pylist() == ROWS
        assert Path(path).read_bytes() == before


def test_values_of_several_types_become_text(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.jsonl", '{"text": 12, "label": 1}\n{"text": "b", "label": "x"}\n{"text": true, "label": 2}'
    )
    assert _table(path).to_pylist() == [
        {"text": "12", "label": "1"},
        {"text": "b", "label": "x"},
        {"text": "true", "label": "2"},
    ]


def test_long_files_keep_types_and_line_numbers(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": i if i < 30_000 else str(i)}) for i in range(41_000)]
    lines[40_000] = '{"text": "t", "label": " "}'
    path = _write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 40001: column 'label' is empty"):
        _table(path)
    assert read(path)[39_999] == {"text": "t39999", "label": "39999"}
    assert read(path)[7] == {"text": "t7", "label": "7"}


def test_class_names_floats_and_spaces(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    assert _table(str(tmp_path / "a.parquet"))["label"].to_pylist() == ["yes", "no"]
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, 2.0]}), tmp_path / "b.parquet")
    assert _table(str(tmp_path / "b.parquet"))["label"].to_pylist() == ["1", "2"]
    path = _write(tmp_path / "c.csv", "text, label\n  a , pos \n")
    assert _table(path).to_pylist() == [{"text": "  a ", "label": "pos"}]


@pytest.mark.parametrize(
    ("label", "kind", "texts"),
    [
        ([1.0, 2.0], pa.float16(), ["1", "2"]),
        ([1e30, 2.0], pa.float64(), ["1e+30", "2"]),
        ([0.5, 2.0], pa.float32(), ["0.5", "2"]),
        ([1.0, float("nan")], pa.float64(), "row 2: column 'label' is empty"),
        ([float("nan"), 0.5], pa.float32(), "row 1: column 'label' is empty"),
        ([1.0, float("-inf")], pa.float16(), "row 2: column 'label' is infinite"),
    ],
)
def test_float_labels(tmp_path: Path, label: list[float], kind: pa.DataType, texts: list[str] | str) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array(label, kind)}), tmp_path / "a.parquet")
    if isinstance(texts, str):
        with pytest.raises(UserError, match=texts):
            _table(str(tmp_path / "a.parquet"))
    else:
        assert _table(str(tmp_path / "a.parquet"))["label"].to_pylist() == texts


def test_a_suffix_takes_the_rows_of_a_split(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "text,label,split\na,x,train\n,y,test\nc,x,train\n")
    assert read(f"{path}:train")["text"][:] == ["a", "c"]
    with pytest.raises(UserError, match=r"a\.csv, line 3: column 'text' is empty"):
        _table(f"{path}:test")
    with pytest.raises(UserError, match=r"no row has 'tset'.*nearest: 'test'"):
        read(f"{path}:tset")


def test_examples_of_one_more_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "body,stars\na,3\n")
    assert examples(path, DataSettings(text="body", label="stars"), TASK).to_list() == [{"text": "a", "label": "3"}]


def test_folders(tmp_path: Path) -> None:
    _write(tmp_path / "train-1.csv", "text,label\na,x\n")
    _write(tmp_path / "train_2.jsonl", '{"text": "b", "label": 1}')
    _write(tmp_path / "test.csv", "text,label\nc,x\n")
    assert read(tmp_path)["text"][:] == ["a", "b"]
    assert read(tmp_path)["file"][:] == ["train-1", "train_2"]
    assert read(tmp_path, "test")["text"][:] == ["c"]
    with pytest.raises(UserError, match="holds no validation data"):
        read(tmp_path, "validation")
    with pytest.raises(UserError, match=r":tset: a folder has no split of that name \(nearest: 'test'\)"):
        read(f"{tmp_path}:tset")


def test_image_folders(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.jpg", "test/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        _write(tmp_path / name, name.encode())
    table = pa.concat_tables([extract(p, {"image": "image", "label": "label"}) for p in parts(tmp_path)])
    assert table["label"].to_pylist() == ["cat", "dog"]
    assert [Path(i["path"]).read_bytes() for i in table["image"].to_pylist()] == [
        b"train/cat/1.png",
        b"train/dog/1.jpg",
    ]


def test_hidden_files_and_other_things_are_no_data(tmp_path: Path) -> None:
    _write(tmp_path / "a.csv", "text,label\na,x\n")
    for name in ("._a.csv", "~$a.csv", ".~lock.a.csv#", ".hidden.jsonl"):
        _write(tmp_path / name, b"\0\5\26\7mac")
    assert read(tmp_path)["text"][:] == ["a"]
    for name in ("cat/1.png", "cat/._1.png", "cat/Thumbs.db", "cat/notes.txt", ".trash/2.png"):
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        _write(tmp_path / "pics" / name, name)
    (found,) = parts(tmp_path / "pics")
    assert found.table["image"].to_pylist() == [str(tmp_path / "pics" / "cat" / "1.png")]
    assert [path.name for path in found.unread] == ["notes.txt"]


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "y"])})
    rows = {"text": ["a", "b"], "label": [1, 0]}
    train = datasets.Dataset.from_dict(rows, features=features)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train.select([0]), dev=train.select([1])).save_to_disk(tmp_path / "several")
    assert _table(str(tmp_path / "one")).to_pylist() == [{"text": "a", "label": "y"}, {"text": "b", "label": "n"}]
    assert read(tmp_path / "several")["text"][:] == ["a"]
    assert read(tmp_path / "several", "validation")["text"][:] == read(f"{tmp_path}/several:dev")["text"][:] == ["b"]
    with pytest.raises(UserError, match=r"several: the saved datasets are 'train', 'dev', not 'test'\n  -> write"):
        read(tmp_path / "several", "test")
    with pytest.raises(UserError, match=r"one:train: the file has no column 'split'"):
        read(f"{tmp_path}/one:train")
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"one: a saved dataset that cannot be read: .*\n  -> save it anew"):
        read(tmp_path / "one")


def test_image_columns(tmp_path: Path) -> None:
    _write(tmp_path / "one.png", b"1")
    images = [
        pa.array([b"1", b"2"]),
        pa.array([b"1", b"2"], pa.large_binary()),
        pa.array([{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "x"}]),
    ]
    for i, column in enumerate(images):
        pq.write_table(pa.table({"image": column}), tmp_path / f"{i}.parquet")
        taken = _table(str(tmp_path / f"{i}.parquet"), image="image")["image"].to_pylist()
        assert [value["bytes"] for value in taken] == [b"1", b"2"]
    path = _write(tmp_path / "a.csv", "image\none.png\n")
    assert _table(path, image="image")["image"].to_pylist() == [{"bytes": None, "path": str(tmp_path / "one.png")}]
    (tmp_path / "folder").mkdir()
    for name in ("two.png", "folder"):
        path = _write(tmp_path / "a.csv", f"image\none.png\n{name}\n")
        with pytest.raises(UserError, match=rf"line 3: image '{name}' does not exist"):
            _table(path, image="image")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", \n',
            r"a\.jsonl, line 2, column \d+: not JSON .*\n  -> ",
        ),
        ("a.jsonl", '{"text": "a", "label": "x"}\n\n[1]\n', r"a\.jsonl, line 3: '\[1\]' is not an object"),
        ("a.json", '[{"text": "a",\n "label": }]', r"a\.json, line 2, column \d+: not JSON"),
        ("a.json", '[{"text": "a", "label": 1}, 3]', r"a\.json, row 2: '3' is not an object"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "\xe4"}', r"line 2: not UTF-8 text \(byte 11: 0xe4\)"),
        ("a.jsonl", "", "holds no examples"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", "", "holds no examples"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', r"line 2: column 'label' is empty\n"),
        ("a.jsonl", '{"text": "a", "label": null}\n' * 3, r"line 1: column 'label' is empty \(and 2 more\)"),
        ("a.jsonl", '{"text": ["a"], "label": "x"}', "column 'text' holds list.*not text"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": NaN}', "line 2: column 'label' is empty\n"),
        ("a.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": NaN}', "line 2: column 'label' is empty\n"),
        ("a.jsonl", '{"text": NaN, "label": "x"}\n{"text": "b", "label": "y"}', "line 1: column 'text' is empty\n"),
        ("a.json", '[{"text": "a", "label": 2}, {"text": NaN, "label": 1}]', "row 2: column 'text' is empty\n"),
        ("a.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": Infinity}', "line 2: column 'label' is inf"),
        ("a.jsonl", '\n{"text": "a"}\n{"text": "b \\ud83d"}', r"line 3: column 'text' holds half .*: 'b \\ud83d'"),
        ("a.json", '[{"text": "a"}, {"\\udc00": 1}]', r"row 2: column '\\udc00' holds half a character"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"n": ' + "9" * 5000,
            r"line 2: cannot be read \(Exceeds the limit .*'\{.n.: 9",
        ),
        ("a.jsonl", '{"text": "a"}\n{"n": ' + "[" * 100_000, r"line 2: cannot be read \(nested too deeply\): '"),
        ("a.json", "[" * 100_000, r"a\.json: cannot be read \(nested too deeply\)\n"),
        ("a.csv", 'text,label\n"two\nlines",x\n \t,y\n', r"a\.csv, line 4: column 'text' is empty"),
        ("a.csv", "text,label\na,x\nb,c,y\n", r"line 3: 3 cells where the header has 2 .*last cell 'y'"),
        ("a.csv", "text,label\na,x\nb\n", r"line 3: 1 cells where the header has 2"),
        ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', r"line 3 .*unexpected end of data"),
        ("a.csv", "text;label\na;x\n", "has no ','"),
        ("a.csv", "text,text\na,x\n", "column 'text' stands twice"),
        ("a.csv", "Text,lable\na,x\n", r"no column 'text' .*'Text', 'lable' \(nearest: 'Text'\)\n  -> .*text = 'Text'"),
        ("a.parquet", "nonsense", "not a readable Parquet file"),
        ("a.xlsx", "nonsense", r"files ending in '\.xlsx' cannot be read\n  -> convert"),
    ],
)
def test_faults_are_named_with_place_and_remedy(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        _table(path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n  -> " in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    _write(tmp_path / "reviews.csv", "text\na\n")
    with pytest.raises(UserError, match=r"review\.csv does not exist \(nearest: 'reviews\.csv'\)"):
        read(tmp_path / "review.csv")
    with pytest.raises(UserError, match="nor does the folder"):
        read(tmp_path / "no" / "review.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no train data"):
        read(tmp_path / "empty")


def test_hub_failures_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, name: str | None, split: str) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"'owner/set@en' \(split 'train'\) is neither .*: no network\n  -> "):
        read("owner/set@en:train")


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        features = datasets.Features({"t": datasets.Value("string"), "l": datasets.ClassLabel(names=["n", "y"])})
        data = datasets.Dataset.from_dict({"t": ["a", "b", "c"], "l": [0, 1, -1]}, features=features)
        return data.select([1, 0] if split == "train" else [2])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _table("owner/set@en", text="t", label="l").to_pylist() == [
        {"text": "b", "label": "y"},
        {"text": "a", "label": "n"},
    ]
    with pytest.raises(UserError, match=r"owner/set:dev, row 1: column 'l' is empty"):
        _table("owner/set:dev", text="t", label="l")
    assert asked == [("owner/set", "en", "train"), ("owner/set", None, "dev")]


def test_columns_of_a_task() -> None:
    assert columns_of(DataSettings(), TASK) == {"text": "text", "label": "label"}
    assert columns_of(DataSettings(prompt="q", response="a"), "causal-lm") == {"prompt": "q", "response": "a"}
    assert columns_of(DataSettings(text="body"), "causal-lm") == {"text": "body"}
    assert columns_of(DataSettings(image="img"), "image-classification") == {"image": "img", "label": "label"}
    for config, task, message in (
        (DataSettings(prompt="q"), "causal-lm", "needs data.prompt and data.response"),
        (DataSettings(prompt="q"), TASK, "does not read data.prompt"),
        (DataSettings(), "text-clasification", "nearest: 'text-classification'"),
    ):
        with pytest.raises(UserError, match=message):
            columns_of(config, task)


def test_partition_settings_follow_from_what_is_given() -> None:
    assert PartitionSettings(column="site") == PartitionSettings(by="column", column="site")
    assert PartitionSettings(alpha=0.3).clients == 10
    assert PartitionSettings(column="topic", alpha=0.3).by == "dirichlet"
    assert PartitionSettings(classes_per_client=3).by == "pathological"
    for ways in (PartitionSettings(), PartitionSettings(column="x"), PartitionSettings(alpha=1)):
        assert PartitionSettings(**ways.model_dump(exclude_none=True)) == ways
    for wrong in ({"by": "iid", "alpha": 1.0}, {"by": "column"}, {"by": "colum"}, {"column": "a", "clients": 3}):
        with pytest.raises(ValueError, match=r"does not use|needs the column|Input should be"):
            PartitionSettings(**wrong)
    assert DataSettings(labels=(1, 2), holdout_clients=[3]).model_dump()["holdout_clients"] == ("3",)
    assert DataSettings(holdout_clients=3).holdout_clients == 3
    with pytest.raises(ValueError, match="names 'a' twice"):
        DataSettings(labels=("a", "b", "a"))


def test_numbers_are_ordered_by_value() -> None:
    assert in_order(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert in_order(["9" * 5000, "10"]) == ["10", "9" * 5000]
