"""A site takes part with what it has, or says by name why not, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import transformers

from fedlora.engines.flower.messages import Hello
from fedlora.engines.flower.ready import Ready, ready
from fedlora.errors import UserError
from fedlora.federation.rounds import evaluate, rounds
from fedlora.sites import agreement
from fedlora.study import algorithm as algorithms
from fedlora.study.config import parse
from fedlora.study.experiment import Terms, base_of, specified
from fedlora.study.export import deployed
from fedlora.study.predict import predict
from fedlora.study.tasks import task_of
from study.tiny import FILLERS, TOPICS, encoder, tokenizer

LABELS = tuple(TOPICS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a copy of it elsewhere, and a wider model of a site's own."""
    root = tmp_path_factory.mktemp("models")
    encoder(root / "base")
    encoder(root / "copy")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    transformers.BertModel(config).save_pretrained(root / "own")
    tokenizer().save_pretrained(root / "own")
    return root


def said(models: Path, algorithm: str = "flexlora", **sections: Any) -> Hello:
    """What a server without data says of a run."""
    value = {
        "model": {"name": str(models / "base"), "task": "text-classification", "dtype": "float32"},
        "data": {"labels": list(LABELS)},
        "adapter": {"rank": 8, "alpha": 16.0},
        "algorithm": {"name": algorithm},
        "training": {"rounds": 2, "steps": 2, "epochs": None},
        "engine": {"lanes": 1, "tokens": 512},
    }
    config = parse({key: {**value.get(key, {}), **sections.get(key, {})} for key in {*value, *sections}}, "run")
    found, backbone = algorithms.build(config), base_of(config, LABELS)
    terms = Terms(LABELS, ("text", "label"), dict.fromkeys(backbone.sites, 8), 8, {}, {})
    spec = specified(config, found, backbone, terms)
    facts = agreement.facts(backbone, task_of(config, LABELS, terms.fields, backbone), spec, found, config.seed)
    return Hello("run-1", config, terms, facts)


def site(folder: Path, **sections: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    rows = [
        f"{FILLERS[i % 10]} {word},{'Tier' if topic == 'animals' else topic}"
        for i in range(6)
        for topic, words in TOPICS.items()
        for word in words
    ]
    (folder / "mine.csv").write_text("\n".join(["satz,thema", *rows]) + "\n")
    value: dict[str, Any] = {
        "server": {"address": "h:1"},
        "data": {"train": "mine.csv", "text": "satz", "label": "thema", "labels": {"Tier": "animals"}},
    }
    merged = {key: {**value.get(key, {}), **sections.get(key, {})} for key in {*value, *sections}}
    (folder / "site.toml").write_text(tomli_w.dumps({"name": "north", **merged}))
    return folder


def trained(here: Ready, hello: Hello) -> None:
    """One site alone goes through the rounds."""
    reports = list(rounds(here.fleet.algorithm, here.fleet.spec, here.fleet, total=2, seed=0, run_id="run-1"))
    assert [report.folded for report in reports[1:]] == [("north",)] * 2
    assert hello.run_id == "run-1"


@pytest.mark.parametrize("algorithm", ["flexlora", "fdlora", "ce-lora"])
def test_a_site_brings_its_rank_its_columns_and_its_own_copy_of_the_base(
    models: Path, tmp_path: Path, algorithm: str
) -> None:
    rank = {"rank": 3} if algorithm == "flexlora" else {}
    hello = said(models, algorithm)
    here = ready(site(tmp_path / "s", resources=rank, model={"base": str(models / "copy")}), hello)
    [client] = here.presence.clients
    assert (client.id, client.backbone, set(client.ranks.values())) == ("north", "base", {rank.get("rank", 8)})
    assert 60 <= (client.examples or 0) <= 80
    assert here.presence.facts == hello.facts
    trained(here, hello)


def test_a_site_brings_a_model_of_its_own(models: Path, tmp_path: Path) -> None:
    hello = said(models, "pfedlora", clients={"models": [str(models / "base")]})
    folder = site(tmp_path / "s", model={"own": str(models / "own")})
    here = ready(folder, hello)
    [client] = here.presence.clients
    assert client.backbone == str(models / "own")
    trained(here, hello)
    with pytest.raises(UserError, match=r"every site brings a model.*\n.*\[model\] own"):
        ready(site(tmp_path / "t"), hello)
    with pytest.raises(UserError, match="the run's clients share one base"):
        ready(folder, said(models))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"labels": {}}}, ["label 'Tier' is not one of the run's", "mine.csv, line 2"]),
        ({"data": {"labels": {"Tier": "animal"}}}, ["no label 'animal'", "nearest: 'animals'"]),
        ({"data": {"least": 1000}}, ["training examples, fewer than"]),
        ({"data": {"train": "none.csv"}}, ["none.csv"]),
        ({"allow": {"algorithms": ["fedit"]}}, ["'flexlora' is not allowed here"]),
        ({"allow": {"upload": ["adapter"]}}, ["would send head"]),
        ({"allow": {"rounds": 1}}, ["a run of 2 rounds"]),
        ({"resources": {"memory": "2 kB"}}, ["memory = 2,000 bytes"]),
    ],
)
def test_a_site_that_cannot_take_part_says_why(
    models: Path, tmp_path: Path, sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        ready(site(tmp_path / "s", **sections), said(models))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("algorithm", ["fdlora", "fedit"])
def test_a_rank_that_the_algorithm_cannot_serve_is_refused_before_the_first_round(
    models: Path, tmp_path: Path, algorithm: str
) -> None:
    with pytest.raises(UserError, match=r"ranks must be equal, but client 'north' has rank 4 at .* the server 8"):
        ready(site(tmp_path / "s", resources={"rank": 4}), said(models, algorithm))


def test_a_model_that_does_not_load_is_refused_with_a_reason(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(UserError, match="broken"):
        ready(site(tmp_path / "s", model={"base": str(broken)}), said(models))


def evaluated(here: Ready, names: set[str], run: str) -> None:
    """The deployed models of a state that nobody has trained, kept at the site."""
    state = here.fleet.algorithm.server_init(here.fleet.spec, 0)
    fleet = replace(here.fleet, deploy=here.writer(names))
    checkpoint = {"state": state, "round": 0, "acked": {}}
    clients = list(here.fleet.clients.values())
    assert len(list(evaluate(here.fleet.algorithm, checkpoint, fleet, clients, total=2, run_id=run))) == 1


def test_what_a_run_deploys_outlives_the_next_run(models: Path, tmp_path: Path) -> None:
    folder = site(tmp_path / "s")
    for run, algorithm in (("run-1", "flexlora"), ("run-2", "fedit")):
        evaluated(ready(folder, replace(said(models, algorithm), run_id=run)), {"north"}, run)
    kept = {run: folder / "adapters" / "runs" / run / "north" for run in ("run-1", "run-2")}
    about = {run: json.loads((place / "fedlora.json").read_text())["algorithm"] for run, place in kept.items()}
    assert about == {"run-1": "flexlora", "run-2": "fedit"}
    assert deployed(folder, "north") == folder / "adapters" / "clients" / "north"  # the latest
    assert (deployed(folder, "north") / "fedlora.json").read_text() == (kept["run-2"] / "fedlora.json").read_text()
    [said_of_it] = predict(kept["run-1"], ["the cat"])
    assert set(said_of_it.probabilities) == set(LABELS)  # type: ignore[union-attr]


MINE = """
from dataclasses import dataclass
from fedlora.algorithms.fedit import FedIT
from fedlora.federation.algorithm import Algorithm

@dataclass(frozen=True)
class Mine(FedIT):
    note: str = "one"
"""


def test_a_file_of_one_s_own_is_run_from_the_site_s_copy(models: Path, tmp_path: Path) -> None:
    """Never from a path that the server names, and only if it is allowed and the same."""
    for place in ("server", "north"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(MINE)
    hello = said(models, f"{tmp_path / 'server' / 'mine.py'}:Mine")
    with pytest.raises(UserError, match=r"'mine\.py:Mine' is not allowed here"):
        ready(site(tmp_path / "s"), hello)
    folder = site(tmp_path / "t", allow={"algorithms": ["mine.py:Mine"]})
    (folder / "mine.py").write_text(MINE)
    (tmp_path / "server" / "mine.py").unlink()
    trained(ready(folder, hello), hello)
    other = site(tmp_path / "u", allow={"algorithms": ["mine.py:Mine"]})
    (other / "mine.py").write_text(MINE.replace("one", "two"))
    with pytest.raises(UserError, match="algorithm: the server has"):
        ready(other, hello)


def test_a_difference_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    hello = said(models)
    folder = site(tmp_path / "s")
    for name in ("base", "algorithm", "start", "fedlora"):
        other = replace(hello, facts={**hello.facts, name: "sha256:0000"})
        with pytest.raises(UserError, match=rf"^{name}: the server has sha256:0000, this site ") as error:
            ready(folder, other)
        assert hello.facts[name][:20] in str(error.value)
