"""The run file: sections, defaults and checks. Every key is refused by name if unknown, and written back resolved."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedlora.algorithms import ALGORITHMS
from fedlora.data.keys import meant
from fedlora.data.profiles import RankProfile
from fedlora.data.settings import DataSettings
from fedlora.errors import UserError

Task = Literal["text-classification", "image-classification", "causal-lm"]
Treatment = Literal["share", "private", "frozen"]
BUILT_IN = ("minilm", "embedded-lm", *(f"cnn-{i}" for i in range(1, 6)))
"""Names of models that no folder of the same name hides."""


class Section(BaseModel):
    """A table of the run file: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Section):
    """``[model]``. ``name``: a hub id, a folder, "minilm" (sentence encoder), "embedded-lm" (the small causal LM) or
    "cnn-1" to "cnn-5"; default: the first of ``[clients] models``, where there are any. ``dtype``: what the base
    computes in; ``bits = 4``: its linear layers, but for heads, are stored in 4 bits (NF4, as in QLoRA)."""

    name: str
    task: Task
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    bits: Literal[4] | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"

    @model_validator(mode="after")
    def _narrow(self) -> ModelSettings:
        if self.bits is not None and self.dtype == "float64":
            raise ValueError("bits = 4 computes in float32 or bfloat16: leave out dtype = 'float64'")
        return self


class ExtrasSettings(Section):
    """``[adapter.extras]``: how heads, norms, embeddings and the whole base (``backbone``) take part; None: as the
    algorithm does by default, but heads stay at home ("private") where ``[data] label_space`` is "client"."""

    head: Treatment | None = None
    norm: Treatment | None = None
    embedding: Treatment | None = None
    backbone: Treatment | None = None


class AdapterSettings(Section):
    """``[adapter]``. ``alpha`` (default 2 x rank) is alpha at the largest rank served; ``targets``: "auto", patterns,
    or [] (none); ``layers``: indices of the blocks to adapt; ``from``: a PEFT folder to start from."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    scaling: Literal["shared", "per-rank"] = "shared"
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["auto"] | list[str] = "auto"
    layers: list[int] | None = None
    extras: ExtrasSettings = ExtrasSettings()
    start: str | None = Field(None, alias="from")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class ClientSettings(Section):
    """``[clients]``. ``ranks``: one number, ``{attention = 8, mlp = 32}`` (mlp: at all other sites), a list of such
    cycled over the clients, or a named distribution; default: the adapter's rank. ``models``: models of the clients'
    own, a list cycled over them: folders, hub ids, "cnn-1" to "cnn-5"."""

    ranks: int | RankProfile | list[int | RankProfile] | str | None = None
    models: list[str] | None = Field(None, min_length=1)

    @field_validator("ranks", mode="before")
    @classmethod
    def _held(cls, value: Any) -> Any:  # 0 and [] are mistakes, not "unset"
        if value is None or isinstance(value, str):
            return value
        given = [vars(one) if isinstance(one, RankProfile) else one for one in _listed(value)]
        if any(isinstance(one, Mapping) and one.keys() != {"attention", "mlp"} for one in given):
            raise ValueError("ranks by site are {attention = 8, mlp = 32}, mlp standing for all other sites")
        ranks = [rank for one in given for rank in (one.values() if isinstance(one, Mapping) else [one])]
        if not ranks or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
            raise ValueError("give a whole number from 1, a list of such numbers, or a distribution's name")
        return value

    @model_validator(mode="after")
    def _not_base(self) -> ClientSettings:
        if "base" in (self.models or ()):
            raise ValueError("'base' stands for [model] name: name the model itself")
        return self


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class AlgorithmSettings(BaseModel):
    """``[algorithm]``: a name of ``fedlora algorithms`` or "my_file.py:MyClass", and its own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The algorithm's own parameters."""
        return dict(self.model_extra or {})


class TrainingSettings(Section):
    """``[training]``. None: the algorithm's own default. ``clients_per_round``: a count, or a share; default
    everybody. ``loss_on``: the tokens of instruction data that are learnt. ``generate``: new tokens per answer when
    scoring; above 0 adds exact match and Rouge-L. ``eval_every``: rounds between evaluations (0: only at the end);
    ``eval_clients``: how many clients those on the way score (default: all).
    ``eval_everyone``: score every client's deployed model on everybody's test data too, at the end. ``validate``: keep
    the validation rows out of training and score them wherever the test rows are scored."""

    rounds: int = Field(10, ge=0)
    clients_per_round: int | float | None = Field(None, gt=0)
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    head_lr: float | None = Field(None, gt=0)
    optimizer: Literal["adamw", "sgd"] | None = None
    momentum: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    clip: float | None = Field(None, gt=0)
    schedule: Literal["constant", "linear", "cosine"] | None = None
    loss_on: Literal["answer", "all"] = "answer"
    generate: int = Field(0, ge=0)
    eval_every: int = Field(1, ge=0)
    eval_clients: int | None = Field(None, ge=1)
    eval_everyone: bool = False
    validate_rounds: bool = Field(False, alias="validate")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    @field_validator("clients_per_round")
    @classmethod
    def _count_or_share(cls, value: float | None) -> float | None:
        if isinstance(value, float) and value > 1:
            raise ValueError(f"{value} is neither a number of clients nor a share of them: a share is at most 1.0")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSettings:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class EngineSettings(Section):
    """``[engine]``. ``lanes``: how many clients train in one pass over the base (1: the plain reference); ``tokens``:
    the budget of one pass, padding included; ``prefix``: bytes in which what the layers below the first adapter say of
    each text is kept (0: it is computed anew in every pass); ``checkpointing``: layers keep their inputs only and are
    computed again for gradients, the same numbers in less memory and more time; ``prepack``: a base in bfloat16 on a
    CPU holds its frozen layers' weights a second time, as the matrix units read them (no effect elsewhere); ``shard``:
    how many clients are folded apart from the others; partial aggregates are merged in order (default: all at once; on
    Ray a number that follows from the actors).

    On Ray (``name = "ray"``): ``address``: of a cluster that is there, "auto" or "host:port" (default: a private one
    for the run); ``actors``: how many processes with a base each (default: one a GPU, else one for every ``threads``
    cores); ``threads``: what each computes with; ``join``: seconds for the first actor to load the base.

    Between machines (``fedlora federate``): ``deadline``: seconds that a round waits for its clients; ``quorum``: the
    share of them without which it waits on; ``join``: seconds for the sites to come and load the base; ``message``: the
    largest message of a site, in bytes."""

    name: Literal["simulator", "ray"] = "simulator"
    lanes: int | Literal["auto"] = "auto"
    tokens: int | Literal["auto"] = "auto"
    device: str = "auto"
    prefix: int = Field(0, ge=0)
    checkpointing: bool = False
    prepack: bool = True
    shard: int | None = Field(None, ge=1)
    address: str | None = None
    actors: int | None = Field(None, ge=1)
    threads: int = Field(1, ge=1)
    deadline: float = Field(600.0, gt=0)
    quorum: float = Field(0.5, ge=0, le=1)
    join: float = Field(600.0, gt=0)
    message: int = Field(256 * 2**20, ge=2**20, le=2**30)

    @field_validator("lanes", "tokens")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f'{value} is not possible: a number from 1, or "auto"')
        return value


class OutputSettings(Section):
    """``[output]``. ``dir``: the run folder (default: runs/...); ``client_adapters``: how many deployed models are
    written (default: all up to 100)."""

    dir: str | None = None
    client_adapters: int | Literal["all", "none"] | None = None

    @field_validator("client_adapters")
    @classmethod
    def _not_negative(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 0:
            raise ValueError(f'{value} is not possible: a number from 0, "all" or "none"')
        return value


class RunConfig(Section):
    """A whole run file."""

    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()  # type: ignore[call-arg]
    data: DataSettings
    clients: ClientSettings = ClientSettings()  # type: ignore[call-arg]
    algorithm: AlgorithmSettings
    training: TrainingSettings = TrainingSettings()  # type: ignore[call-arg]
    engine: EngineSettings = EngineSettings()  # type: ignore[call-arg]
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _stored_base(self) -> RunConfig:
        whole = "[clients] models" if self.clients.models else "[adapter.extras] backbone"
        trained = self.clients.models or self.adapter.extras.backbone in ("share", "private")
        if self.model.bits is not None and trained:
            raise ValueError(f"what [model] bits = {self.model.bits} stores is not trained, and {whole} trains it")
        return self

    @model_validator(mode="after")
    def _answers(self) -> RunConfig:
        training, prompted = self.training, self.model.task == "causal-lm" and self.data.text is None
        if prompted or (not training.generate and training.loss_on == "answer"):
            return self
        key = f"generate = {training.generate}" if training.generate else "loss_on = 'all'"
        has = "causal-lm on [data] text" if self.model.task == "causal-lm" else self.model.task
        raise ValueError(f"[training] {key} is for causal-lm with [data] prompt and response, not {has}: leave it out")

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        tables = values if isinstance(values, dict) else {}
        model, clients = tables.get("model"), tables.get("clients")
        names = clients.get("models") if isinstance(clients, dict) else None
        if isinstance(model, dict) and "name" not in model and isinstance(names, list) and names:
            return {**tables, "model": {**model, "name": names[0]}}
        return values

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with keys of some sections replaced: ``config.replace(engine={"lanes": 4})``."""
        value = self.model_dump(by_alias=True)
        for section, keys in sections.items():
            known: Any = value.get(section, {})
            value[section] = {**known, **keys} if isinstance(keys, Mapping) else keys  # what is wrong, parse names
        return parse(value, "the resolved configuration")


def parse(value: Mapping[str, Any], place: str) -> RunConfig:
    """Validates nested plain values; a UserError names every wrong key, its value and the nearest known name."""
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        problems = explained(error, RunConfig)
    raise UserError(f"{place}: {problems}", "see `fedlora run --help` and the README for the keys")


def explained(error: ValidationError, model: type[BaseModel]) -> str:
    """Every wrong key of a file that ``model`` describes, its value and the nearest known name."""
    return "; ".join(_explained(problem, model) for problem in error.errors())


def _explained(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}' ({meant(path[-1], _keys(path[:-1], model))})"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    said = problem["msg"].removeprefix("Value error, ")
    return f"'{key}' = {problem['input']!r}: {said}" if key else said  # of keys of several sections


def _keys(path: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The keys a table knows."""
    model: Any = root
    for part in path:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        options = () if field is None else getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def read(file: Path) -> dict[str, Any]:
    """The tables of a TOML file; UserError where there is none, or it cannot be read, or is not TOML."""
    try:
        return tomllib.loads(file.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file", "write one (see the README) or check the path") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}", "name a file that can be read") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8: {error}", "save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}", "strings need quotes; tables look like [data]") from None


def load(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies ``section.key=value`` changes; relative data paths are found beside the file."""
    file = Path(path)
    value = read(file)
    for change in changes:
        apply(value, change)
    return parse(located(value, file.parent), str(file))


def apply(value: dict[str, Any], change: str) -> None:
    """Sets one dotted key in nested tables, the value written as in TOML (or plain text).

    >>> table = {"training": {"lr": 0.1}}
    >>> apply(table, "training.lr=0.01"); apply(table, "algorithm.name=fedit"); table
    {'training': {'lr': 0.01}, 'algorithm': {'name': 'fedit'}}
    """
    key, separator, text = change.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {change!r}: not of the form section.key=value", "for example --set training.lr=0.001")
    try:
        parsed = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = text
    assign(value, key.strip(), parsed)


def assign(value: dict[str, Any], key: str, entry: Any) -> None:
    """Sets one dotted key in nested tables."""
    *tables, last = key.split(".")
    for name in tables:
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise UserError(f"{key} = {entry!r}: '{name}' is a value, not a table", "name a key inside a table")
    value[last] = entry


def located(value: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Data, model and algorithm paths that exist beside the run file (or here) become absolute; other names stay.

    ``file.parquet:test`` and ``file.py:Class`` keep what follows the colon.
    """

    def find(name: Any) -> Any:
        if isinstance(name, list):
            return [find(item) for item in name]
        if not isinstance(name, str) or name in BUILT_IN or name in ALGORITHMS:
            return name
        head, colon, tail = name.rpartition(":")
        for file, rest in ((name, ""), (head, colon + tail)):
            for candidate in (folder / file, Path(file)):
                if file and candidate.exists():
                    return os.path.abspath(candidate) + rest
        return name

    places = {"data": ("train", "test", "validation"), "model": ("name",), "algorithm": ("name",), "adapter": ("from",)}
    places |= {"clients": ("models",)}
    result = {key: dict(table) if isinstance(table, dict) else table for key, table in value.items()}
    for section, keys in places.items():
        table = result.get(section)
        if isinstance(table, dict):
            table.update({key: find(table[key]) for key in keys if key in table})
    return result


def dumps(config: RunConfig) -> str:
    """The configuration as TOML, without keys that are unset."""

    def clean(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: clean(child) for key, child in node.items() if child is not None and child != {}}
        return [clean(child) for child in node] if isinstance(node, list | tuple) else node

    return tomli_w.dumps(clean(config.model_dump(by_alias=True, mode="json")))
