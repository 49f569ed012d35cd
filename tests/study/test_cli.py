"""The command line in a temporary folder, as a user types it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import UserError
from fedlora.study.config import RunConfig
from study import tiny

RUNNER = CliRunner()


def fedlora(*words: object) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a user's own JSONL."""
    folder = tmp_path_factory.mktemp("user")
    file = tiny.run_file(
        folder,
        training="rounds = 3\nepochs = 4\nbatch_size = 4\n",
        data='partition = {by = "column", column = "hospital"}\nholdout_clients = 1\n',
    )
    out = folder / "run"
    assert "wrote" in fedlora("run", file, "--out", out)
    return out


def test_a_table_says_that_nobody_has_trained(tmp_path: Path) -> None:
    partition = 'partition = {by = "column", column = "hospital"}\n'
    file = tiny.run_file(tmp_path, training="rounds = 2\nlr = 1e30\n", data=partition)
    said = fedlora("run", file, "--out", tmp_path / "run")
    assert "12 of 12 replies were lost or refused: run.log says whose and why" in said
    assert (tmp_path / "run" / "run.log").read_text().count("Diverged") == 12


def test_a_run_says_what_is_to_be_known_of_its_data(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 1\nsteps = 1\n", data='test = "mine.jsonl"\n')
    said = fedlora("run", file, "--out", tmp_path / "run").replace("\n", " ")
    warning = "240 of 240 given test examples are near-copies of training examples"
    assert f"warning: {warning}" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == [warning]
    assert f"WARNING fedlora.study.run: {warning}" in (tmp_path / "run" / "run.log").read_text()


def test_a_run_folder_holds_what_it_says(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert summary["algorithm"] == "fedit"
    assert summary["metric"] == "accuracy"
    assert summary["higher_is_better"] is True
    assert summary["rounds"] == 3
    personal = summary["personal"]
    assert 0 < summary["class_prior"]["mean"] < 1
    scores = list(personal["per_client"].values())
    assert summary["clients"] == len(scores) == 5
    assert math.isclose(personal["mean"], sum(scores) / len(scores))
    assert personal["worst_decile"] == min(scores)  # the worst ceil(5 / 10) clients are one
    assert personal["mean"] > 0.5  # chance is 1/3
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert summary["bytes"]["up"] == sum(line["bytes"]["up"] for line in lines) > 0
    assert lines[1]["client_steps"] == 4 * sum(math.ceil(n / 4) for n in trained(done)) > 0
    assert summary["unseen"]["clients"] == 1
    assert "St.%20A%2Fward%200" in {path.name for path in (done / "adapters" / "clients").iterdir()}
    assert (done / "adapters" / "global" / "adapter_config.json").exists()


def trained(done: Path) -> list[int]:
    """Training examples of the clients that train."""
    from fedlora.data.population import build
    from fedlora.study.config import load

    config = load(done / "config.toml")
    people = build(config.data, config.model.task)
    return [len(people.train(name)) for name in people.seen]


def test_data_shows_clients_and_trains_nothing(done: Path) -> None:
    text = fedlora("data", done / "config.toml")
    assert "St. A/ward 0" in text
    assert "animals" in text


def test_help_names_every_key_as_errors_say(tmp_path: Path) -> None:
    said = fedlora("run", "--help")
    assert re.search(r"FILE\.toml  the run file", said)
    for table, key in (("model", "name"), ("adapter", "from"), ("adapter.extras", "head"), ("data.partition", "alpha")):
        assert key in said.partition(f"[{table}]\n")[2].splitlines()[0].replace(",", " ").split()
    for section, model in RunConfig.model_fields.items():
        keys = getattr(model.annotation, "model_fields", {section: model})
        assert {field.alias or name for name, field in keys.items()} <= set(re.findall(r"\w+", said))
    assert all(line == "" or len(line) <= 100 for line in said.partition("Keys")[2].splitlines())
    file = tmp_path / "my.toml"
    file.write_text("")
    refused = RUNNER.invoke(app, ["run", str(file)])
    assert "fedlora run --help" in str(refused.exception)


def test_evaluate_predict_export_and_personalize(done: Path, tmp_path: Path) -> None:
    other = tiny.reviews(tmp_path / "other.jsonl", 60, seed=5)
    score = float(fedlora("evaluate", done, "--data", other).split("accuracy: ")[1].split()[0])
    assert score > 0.5
    client = "St. A/ward 0"
    assert "accuracy" in fedlora("evaluate", done, "--data", other, "--client", client)
    assert fedlora("predict", done, "--client", client, "--text", "the old horse").startswith(tuple(tiny.TOPICS))
    with pytest.raises(UserError, match="empty"):
        fedlora("predict", done, "--client", client, "--text", " ")
    exported = tmp_path / "adapter"
    fedlora("export", done, "--client", client, "--to", exported)
    assert (exported / "adapter_model.safetensors").exists()
    assert fedlora("predict", exported, "--text", "the old horse") == fedlora(
        "predict", done, "--client", client, "--text", "the old horse"
    )
    fedlora("export", done, "--merge", "--to", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()
    text = fedlora("personalize", done, "--data", other, "--client", "St. New")
    assert "accuracy" in text
    assert fedlora("predict", done, "--client", "St. New", "--text", "one pear").startswith(tuple(tiny.TOPICS))
    with pytest.raises(UserError, match="there already"):
        fedlora("personalize", done, "--data", other, "--client", "St. New")
    other.write_text(json.dumps({"text": "one saw", "label": "tool"}) + "\n")
    for words in (("evaluate",), ("personalize", "--client", "St. Odd")):
        with pytest.raises(UserError, match=r"'tool' is unknown to the run \(nearest: 'tools'\); it knows 'animals'"):
            fedlora(words[0], done, "--data", other, *words[1:])


def test_resume_trains_for_longer_as_if_never_stopped(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, training="rounds = 2\n")
    fedlora("run", file, "--out", tmp_path / "short")
    fedlora("resume", tmp_path / "short", "--rounds", 3)
    fedlora("run", file, "--set", "training.rounds=3", "--out", tmp_path / "straight")
    names = ("adapters/global/adapter_model.safetensors", "adapters/clients/3/adapter_model.safetensors")
    for name in names:
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    with pytest.raises(UserError, match="beyond"):
        fedlora("resume", tmp_path / "short", "--rounds", 1)


@pytest.mark.parametrize("name", ["fdlora", "feddpa", "flexlora", "ce-lora", "fedproto", "ditto"])
def test_a_client_with_test_rows_only_is_scored(tmp_path: Path, name: str) -> None:
    """Under every variant: it has nothing to fuse, to gate or to compare with."""
    split = 'test = "test.jsonl"\npartition = {column = "hospital"}\n'
    file = tiny.run_file(
        tmp_path, data=split, algorithm=f'name = "{name}"\n', training="rounds = 1\nsteps = 2\neval_every = 0\n"
    )
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    tested = [{**row, "hospital": who} for who in ("north", "new") for row in rows[:6]]
    for place, found in (("mine", [{**row, "hospital": "north"} for row in rows]), ("test", tested)):
        (tmp_path / f"{place}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    fedlora("run", file, "--out", tmp_path / "run")
    personal = json.loads((tmp_path / "run" / "summary.json").read_text())["personal"]
    assert personal["without_test_data"] == 0
    assert personal["mean"] is not None
    assert all(found["mean"] is not None for found in personal["variants"].values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.round=3", "did you mean 'rounds'"),
        ("algorithm.name=fedti", "did you mean 'fedit'"),
        ("algorithm.proximl=1", "did you mean 'proximal'"),
        ("training.lr=-1", "'training.lr' = -1"),
        ("data.label=lable", "lable"),
        ("data.train=nothing.jsonl", "nothing.jsonl"),
        ("clients.ranks=heavy", "heavy-tail"),
        ("clients.ranks=0", "'clients.ranks' = 0: give a whole number from 1"),
        ("clients.ranks=[]", r"'clients.ranks' = \[\]: give"),
        ("clients.ranks=[{attention = 2, mpl = 4}]", "ranks by site are {attention = 8, mlp = 32}"),
        ("clients.ranks={attention = 2, mlp = 0}", "give a whole number from 1"),
        ("clients.ranks=[2.5]", r"'clients.ranks' = \[2.5\]: give"),
        ("training.rounds", "section.key=value"),
        ("training.clients_per_round=2.5", "neither a number of clients nor a share"),
        ("engine.lanes=0", "'engine.lanes' = 0: .*a number from 1"),
        ("engine.tokens=-4", "'engine.tokens' = -4: .*a number from 1"),
        ("output.client_adapters=-1", "a number from 0"),
        ("seed=1180591620717411303424", "'seed' = 1180591620717411303424: Input should be less than"),
        ("data.seed=-1", "'data.seed' = -1: Input should be greater than or equal to 0"),
        ("engine.device=cuda:99", r"\[engine\] device = 'cuda:99': of CUDA's devices there (is|are) \w+ here"),
        ("training.generate=5", r"my.toml: \[training\] generate = 5 is for causal-lm .*, not text-classification"),
        ("training.loss_on=all", r"my.toml: \[training\] loss_on = 'all' is for causal-lm .*, not text-class"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: str, said: str) -> None:
    file = tiny.run_file(tmp_path)
    with pytest.raises(UserError, match=said):
        fedlora("run", file, "--set", change, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("flexlora", "adapter.targets=[]", "no layer is adapted"),
        ("fdlora", "adapter.targets=[]", "no layer is adapted"),
        ("flora", "adapter.targets=[]", "no layer is adapted"),
        ("ce-lora", "adapter.targets=[]", "no layer is adapted"),
        ("flexlora", "adapter.extras.backbone=share", "backbone is 'share'"),
        ("flora", "adapter.extras.backbone=private", "backbone is 'private'"),
        ("fedex-lora", "adapter.extras.backbone=share", "backbone is 'share'"),
    ],
)
def test_what_an_algorithm_cannot_train_is_named(tmp_path: Path, name: str, change: str, said: str) -> None:
    file = tiny.run_file(tmp_path, algorithm=f'name = "{name}"\n', training="rounds = 1\n")
    with pytest.raises(UserError, match=said):
        fedlora("run", file, "--set", change, "--out", tmp_path / "run")


def test_an_algorithm_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from fedlora.algorithms.fedit import FedIT as Base\n"
        "from fedlora.federation.algorithm import Algorithm\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Base):\n"
        '    """FedIT with a proximal term."""\n'
        "    proximal: float = 0.1\n"
    )
    file = tiny.run_file(tmp_path, algorithm='name = "mine.py:Mine"\n', training="rounds = 1\n")
    fedlora("run", file, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1


def test_algorithms_are_listed() -> None:
    text = fedlora("algorithms")
    assert "flexlora" in text
    assert "proximal" in text


def test_python_takes_objects_instead_of_names(tmp_path: Path) -> None:
    import datasets
    import transformers

    import fedlora as package

    model = transformers.AutoModel.from_pretrained(tiny.encoder(tmp_path / "model"))
    model.processor = tiny.tokenizer()
    rows = [json.loads(line) for line in tiny.reviews(tmp_path / "x.jsonl", 80).read_text().splitlines()]
    clients = {name: datasets.Dataset.from_list(rows[i::2]) for i, name in enumerate(("north", "south"))}
    config = {
        "model": {"name": "mine", "task": "text-classification", "dtype": "float32"},
        "data": {"text": "text", "label": "label"},
        "algorithm": {"name": "fedit"},
    }
    result = package.run(config, model=model, clients=clients, out=tmp_path / "run", training={"rounds": 1})
    assert sorted(result.summary["personal"]["per_client"]) == ["north", "south"]
    assert len(result.history) == 2


def test_a_language_model_runs_exports_and_predicts(tmp_path: Path) -> None:
    tiny.language_model(tmp_path / "lm")
    tiny.reviews(tmp_path / "mine.jsonl", 60)
    file = tmp_path / "lm.toml"
    file.write_text(
        '[model]\nname = "lm"\ntask = "causal-lm"\ndtype = "float32"\n'
        '[data]\ntrain = "mine.jsonl"\ntext = "text"\npartition = {clients = 3}\n'
        '[clients]\nranks = [{attention = 2, mlp = 5}, 4, 8]\n[algorithm]\nname = "flexlora"\n[training]\nrounds = 2\n'
    )
    fedlora("run", file, "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["metric"] == "bits_per_byte"
    assert summary["higher_is_better"] is False
    assert summary["personal"]["mean"] < lines[0]["personal"]["mean"]
    assert any(name.startswith("truncation/") for name in lines[-1]["measures"])
    fedlora("predict", tmp_path / "run", "--client", "0", "--text", "the old")
    own = load_file(tmp_path / "run" / "adapters" / "clients" / "0" / "adapter_model.safetensors")
    held = {("self_attn" in name, len(value)) for name, value in own.items() if "lora_A" in name}
    assert held == {(True, 2), (False, 5)}


def test_a_bucket_has_the_smallest_clients_rank(tmp_path: Path) -> None:
    file = tiny.run_file(
        tmp_path, training="rounds = 1\n", clients="ranks = [2, 4]\n", data="partition = {clients = 3}\n"
    )
    fedlora("run", file, "--set", "algorithm.merge=bucket", "--out", tmp_path / "run")
    described = json.loads((tmp_path / "run" / "adapters" / "clients" / "1" / "adapter_config.json").read_text())
    assert described["r"] == 2


def test_names_are_no_paths_and_paths_keep_their_split(tmp_path: Path) -> None:
    """The quickstart's run file lies beside the folder of its run, which is called like the algorithm."""
    from fedlora.study.config import located

    for name in ("flexlora", "minilm", "mine.jsonl", "other"):
        (tmp_path / name).mkdir()
    found = located(
        {
            "model": {"name": "minilm"},
            "algorithm": {"name": "flexlora"},
            "data": {"train": ["mine.jsonl:train", "mine.jsonl"], "test": "hub/name:test"},
            "adapter": {"from": "other"},
        },
        tmp_path,
    )
    file = str(tmp_path / "mine.jsonl")
    assert found == {
        "model": {"name": "minilm"},
        "algorithm": {"name": "flexlora"},
        "data": {"train": [f"{file}:train", file], "test": "hub/name:test"},
        "adapter": {"from": str(tmp_path / "other")},
    }


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fdlora", "population", 1),  # no evolution strategy has one candidate
        ("fdlora", "sync_every", -1),  # once meant every round
        ("fdlora", "stage1_epochs", -1),
        ("fdlora", "outer_lr", math.nan),
        ("fdlora", "outer_momentum", 1.0),
        ("fedit", "bucket_rank", 0),
        ("fedit", "server_betas", [0.9, 1.0]),
        ("flexlora", "finetune_epochs", -1),
        ("slora", "density", -0.1),
        ("slora", "sparse_rounds", -1),
    ],
)
def test_hyper_parameters_are_held_to_their_ranges(name: str, key: str, value: object) -> None:
    from fedlora.study.algorithm import build
    from fedlora.study.config import parse

    said = {"model": {"name": "minilm", "task": "text-classification"}, "data": {"train": "mine.jsonl"}}
    with pytest.raises(UserError, match=rf"^\[algorithm\] {key} = .*: Input should be (greater|less|a finite)"):
        build(parse({**said, "algorithm": {"name": name, key: value}}, "here"))


def test_none_is_written_and_read_back(tmp_path: Path) -> None:
    """TOML has no None: an optional parameter is switched off by a word, also after the file is written again."""
    from tomllib import loads

    from fedlora.study.algorithm import build
    from fedlora.study.config import dumps, parse

    value = {
        "model": {"name": "minilm", "task": "text-classification"},
        "data": {"train": "mine.jsonl"},
        "algorithm": {"name": "ce-lora", "project": "none", "start_std": "none"},
    }
    again = parse(loads(dumps(parse(value, "here"))), "there")
    algorithm = build(again)
    assert (algorithm.project, algorithm.start_std, algorithm.core_lr) == (None, None, None)
    with pytest.raises(UserError, match="mixing = 'none'"):
        build(parse(value | {"algorithm": {"name": "ce-lora", "mixing": "none"}}, "here"))


@pytest.mark.parametrize(
    "stated",
    [
        {"name": "ce-lora", "project": 0},
        {"name": "ce-lora", "blend": 1.5},
        {"name": "ce-lora", "noise": -0.1},
        {"name": "ce-lora", "noise": float("nan")},
        {"name": "ce-lora", "start_std": 0.0},
        {"name": "ce-lora", "core_lr": -1.0},
        {"name": "pfedlora", "rank": 0},
        {"name": "pfedlora", "mu": -0.3},
        {"name": "ditto", "proximal": -0.1},
        {"name": "fedamp", "step": 3.0},
        {"name": "feddpa", "references": 0},
        {"name": "fedgh", "lr": -0.01},
        {"name": "fedkd", "energy": 2.0},
        {"name": "fedproto", "strength": float("inf")},
        {"name": "fedrep", "head_epochs": 0},
        {"name": "fml", "a": 1.5},
        {"name": "hetlora", "prune": 1.5},
        {"name": "lora-fair", "ridge": -1.0},
    ],
    ids=str,
)
def test_a_parameter_out_of_its_range_is_named_before_anything_is_loaded(stated: dict[str, Any]) -> None:
    from fedlora.study.algorithm import build
    from fedlora.study.config import parse

    (name,) = stated.keys() - {"name"}
    value = {
        "model": {"name": "minilm", "task": "text-classification"},
        "data": {"train": "mine.jsonl"},
        "algorithm": stated,
    }
    with pytest.raises(UserError, match=rf"\[algorithm\] {name} = {stated[name]}: Input should be"):
        build(parse(value, "here"))
