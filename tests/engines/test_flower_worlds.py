"""Whole runs, real models and data: simulated, and at sites over an in-process Grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conformance.grid import LocalGrid, node
from fedlora.engines.flower.federate import plan
from fedlora.engines.flower.fleet import Patience
from fedlora.engines.flower.host import federation, require_federable
from fedlora.engines.flower.resident import Resident
from fedlora.errors import UserError
from fedlora.study import algorithm as algorithms
from fedlora.study import export
from fedlora.study.config import load
from fedlora.study.predict import predict
from fedlora.study.run import proceed, run
from study import tiny

SYSTEMS: dict[str, dict[str, Any]] = {
    "fdlora": {"algorithm": {"generations": 2}},
    "flexlora": {"clients": {"ranks": [2, 4]}},
    "pfedlora": {"clients": {"models": ["own", "model"]}},
    "ce-lora": {},
}
TESTED = 10  # about as many test examples has a client


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.encoder(folder / "own")
    return tiny.run_file(
        folder,
        training="rounds = 2\nbatch_size = 8\nepochs = 1\neval_every = 0\n",
        data="partition = {clients = 5}\n",
    )


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(world: Path, system: str, lanes: int, dtype: str) -> Any:
    sections = {**SYSTEMS[system], "engine": {"lanes": lanes}, "model": {"dtype": dtype}}
    models = sections.get("clients", {}).get("models")
    if models:
        sections["clients"] = {"models": [str(world.parent / name) for name in models]}
    sections["algorithm"] = {"name": system, **sections.get("algorithm", {})}
    return load(world).replace(**sections)


def federated(config: Any, folder: Path, sites: int = 2) -> Path:
    """A run whose sites are in this process."""
    folder.mkdir()
    plan(config, folder, sites)
    residents = [Resident(place) for place in sorted((folder / "sites").iterdir())]
    grid = LocalGrid({100 + number: node(resident) for number, resident in enumerate(residents)})
    host = federation(load(folder / "config.toml"), folder, grid, Patience(poll=0.0))
    host.fleet.available(1)
    proceed(host)
    return folder


def both(world: Path, system: str, lanes: int, dtype: str, place: Path) -> tuple[Path, Path]:
    config = settings(world, system, lanes, dtype)
    return run(config, out=place / "here").folder, federated(config, place / "there")


def arrays(folder: Path) -> dict[str, torch.Tensor]:
    """Every array of every deployed model."""
    found: dict[str, torch.Tensor] = {}
    for about in sorted(folder.rglob("fedlora.json")):
        name = json.loads(about.read_text())["client"]
        for file in sorted(about.parent.rglob("*.safetensors")):
            place = file.relative_to(about.parent)
            found |= {f"{name}/{place}/{key}": value for key, value in load_file(file).items()}
    return found


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_one_lane_is_bit_equal(system: str, world: Path, tmp_path: Path) -> None:
    here, there = both(world, system, 1, "float32", tmp_path)
    ours, theirs = arrays(here), arrays(there)
    assert ours.keys() == theirs.keys()
    assert len({name.split("/")[0] for name in ours}) >= 5
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for key in ("personal", "global", "bytes", "flops", "data_hash", "clients"):
        assert summary(here)[key] == summary(there)[key]
    assert 0 < summary(here)["class_prior"]["mean"] < 1
    assert summary(there)["class_prior"]["mean"] is None  # said to be unknown, not left out
    assert "no server sees" in summary(there)["class_prior"]["unknown"]
    assert not (there / "adapters" / export.CLIENTS).exists()
    said = [predict(place, ["the plum near some axe"], "1") for place in (here, there)]
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_float64_agrees_whatever_shares_a_pass(system: str, world: Path, tmp_path: Path) -> None:
    here, there = both(world, system, 4, "float64", tmp_path)
    ours, theirs = arrays(here), arrays(there)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(value, theirs[name], rtol=0, atol=1e-10) for name, value in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_fast_mode_scores_within_two_examples(system: str, world: Path, tmp_path: Path) -> None:
    here, there = both(world, system, 8, "bfloat16" if system != "pfedlora" else "float32", tmp_path)
    ours, theirs = (summary(place)["personal"]["per_client"] for place in (here, there))
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[name] - theirs[name]) <= 2 / TESTED + 1e-9 for name in ours)


def test_language_model_and_round_lines(tmp_path: Path) -> None:
    tiny.language_model(tmp_path / "lm")
    file = tmp_path / "lm.toml"
    rows = [json.dumps({"prompt": f"the {w}", "response": "sees a cat"}) for w in ("saw", "fig", "hen", "axe") * 10]
    (tmp_path / "lm.jsonl").write_text("\n".join(rows))
    file.write_text(
        '[model]\nname = "lm"\ntask = "causal-lm"\ndtype = "float32"\n'
        '[data]\ntrain = "lm.jsonl"\nprompt = "prompt"\nresponse = "response"\npartition = {clients = 3}\n'
        '[algorithm]\nname = "fedit"\n[training]\nrounds = 2\nsteps = 2\n[engine]\nlanes = 1\n'
    )
    config = load(file)
    here, there = run(config, out=tmp_path / "here").folder, federated(config, tmp_path / "there", 3)
    ours, theirs = arrays(here), arrays(there)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    line = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()][1]
    assert set(line["sites"]) == {"site-1", "site-2", "site-3"}
    for number, site in enumerate(line["sites"].values()):
        assert site["seconds"] > 0
        assert site["refused"] == 0
        own = line["clients"][str(number)]
        assert own["up"] < site["up"] < own["up"] + 5000  # an evaluation's sums and the names around them
        assert own["down"] < site["down"]
    assert line["loss"] == [json.loads(one) for one in (here / "metrics.jsonl").read_text().splitlines()][1]["loss"]


def test_what_no_federation_can_do_is_refused(world: Path, tmp_path: Path) -> None:
    pooled = load(world, ["algorithm.name=pooled"])
    with pytest.raises(UserError, match="no federation"):
        require_federable(pooled, algorithms.build(pooled))
    everyone = load(world, ["training.eval_everyone=true"])
    with pytest.raises(UserError, match="everybody's test data"):
        require_federable(everyone, algorithms.build(everyone))
    (tmp_path / "many").mkdir()
    with pytest.raises(UserError, match="--sites 9"):
        plan(load(world), tmp_path / "many", 9)
