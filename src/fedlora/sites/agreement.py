"""What all participants must have in common before they train, as facts that are compared by name."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import fedlora
from fedlora.data.keys import listed
from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.spec import Client, ModelSpec, Tree
from fedlora.federation.wire import encode
from fedlora.learning.backbone import Backbone
from fedlora.learning.tasks import Task
from fedlora.study.config import RunConfig
from fedlora.study.experiment import Experiment, Terms

REMEDIES = {
    "fedlora": "install the same version at both ends",
    "algorithm": "give every participant the same algorithm file; check the run file's [algorithm]",
    "base": "copy the server's model folder to the site, or name the same one in [model] base",
    "tokenizer": "copy the tokenizer's files along with the model",
    "template": "the template of chats or labels differs: copy the tokenizer's files, or install the same version",
    "labels": "correct [data] labels in the run file, or the site's mapping in [data.labels]",
    "model": "the adapted layers or the head differ: use the same model and [adapter] targets",
    "start": "the same seed gives other numbers: check the run file's seed and the versions of torch",
}


def facts(
    backbone: Backbone, task: Task, spec: ModelSpec, algorithm: Algorithm[Any, Any, Any], seed: int
) -> dict[str, str]:
    """What must be equal, by name: readable texts, and SHA-256 of what is large."""
    shapes = {"sites": spec.sites, "ranks": spec.ranks, "whole": spec.whole, "width": spec.width}
    numbers = {"alpha": spec.alpha, "scaling": spec.scaling, "dtype": str(spec.dtype)}
    return {
        "fedlora": fedlora.__version__,
        "algorithm": algorithm_fact(algorithm),
        "base": f"sha256:{backbone.fingerprint[:32]}",
        "tokenizer": tokenizer(backbone.processor),
        "template": template(backbone.processor, task),
        "labels": json.dumps(list(spec.labels), ensure_ascii=False),
        "model": digest(json.dumps({**shapes, **numbers}, sort_keys=True).encode()),
        "start": digest(encode(start(spec, seed))),
    }


def facts_of(experiment: Experiment) -> dict[str, str]:
    """Those of an experiment that is put together."""
    e = experiment
    return facts(e.backbone, e.task, e.spec, e.algorithm, e.config.seed)


def start(spec: ModelSpec, seed: int) -> Tree:
    """The random start that all derive from the seed instead of sending it."""
    return {**spec.adapter(spec.ranks, seed), **spec.start(seed)}


def digest(content: bytes) -> str:
    """The first 32 digits of SHA-256: what is compared is meant to be read by people."""
    return "sha256:" + hashlib.sha256(content).hexdigest()[:32]


def algorithm_fact(algorithm: Algorithm[Any, Any, Any]) -> str:
    """Its name and parameters, and the digest of the file that it is written in."""
    cls = type(algorithm)
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    return f"{told(algorithm)} {digest(source.encode())}"


def told(value: Any) -> str:
    """A value's ``repr``, the same in every process: functions by their names and sets in order, for where a function
    lies in memory, and how a set of texts is walked, is every process's own.

    >>> told({"words": frozenset(["b", "a"]), "pair": (print,)})
    "{'words': {'a', 'b'}, 'pair': (<built-in function print>,)}"
    """
    match value:
        case set() | frozenset():
            return f"{{{', '.join(sorted(map(told, value)))}}}"
        case list():
            return f"[{', '.join(map(told, value))}]"
        case tuple() if type(value) is tuple:
            return f"({', '.join(map(told, value))}{',' * (len(value) == 1)})"
        case dict():
            return f"{{{', '.join(f'{told(key)}: {told(one)}' for key, one in value.items())}}}"
        case _ if is_dataclass(value) and not isinstance(value, type):
            parts = [f"{field.name}={told(getattr(value, field.name))}" for field in fields(value) if field.repr]
            return f"{type(value).__qualname__}({', '.join(parts)})"
    return re.sub(r" at 0x[0-9a-f]+>", ">", repr(value))


def tokenizer(processor: Any) -> str:
    """The tokenizer's rules where they can be read, else its vocabulary, else what it prints of itself."""
    if processor is None:
        return "none"
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        value = json.loads(backend.to_str())
        value |= {"truncation": None, "padding": None}  # these change with every call
        return digest(json.dumps(value, sort_keys=True).encode())
    if hasattr(processor, "get_vocab"):
        return digest(repr(sorted(processor.get_vocab().items())).encode())
    return digest(repr(processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__name__).encode())


def template(processor: Any, task: Task) -> str:
    """How an example becomes tokens: the chat template, and what the task itself says."""
    said = [getattr(processor, "chat_template", None), repr(task)]
    return digest(repr(said).encode())


def differences(server: Mapping[str, str], site: Mapping[str, str]) -> list[str]:
    """One sentence a fact that differs, with both values and the remedy; empty: they agree.

    >>> differences({"fedlora": "1.0", "base": "x"}, {"fedlora": "1.1", "base": "x"})
    ['fedlora: the server has 1.0, this site 1.1 -> install the same version at both ends']
    """
    order = [*REMEDIES, *sorted({*server, *site} - REMEDIES.keys())]
    return [
        f"{name}: the server has {_shown(server.get(name))}, this site {_shown(site.get(name))}"
        f"{_only(name, server, site)} -> {REMEDIES.get(name, 'use the same version of fedlora at both ends')}"
        for name in order
        if server.get(name) != site.get(name)
    ]


def ranks_of(config: RunConfig) -> Any:
    """``[clients] ranks`` where it is one number or a list of them, for each site states its own; UserError else."""
    ranks = config.clients.ranks or config.adapter.rank
    given = ranks if isinstance(ranks, list) else [ranks]
    if not all(isinstance(rank, int) for rank in given):
        raise UserError(
            f"[clients] ranks = {ranks!r}: each site states its own rank",
            "leave it out; [adapter] rank is the largest served",
        )
    return ranks


def served(config: RunConfig, backbone: Backbone, labels: Sequence[str], fields: tuple[str, ...]) -> Terms:
    """The terms of a run whose server knows no site yet."""
    ranks = ranks_of(config)
    given = ranks if isinstance(ranks, list) else [ranks]
    most = {name: min(max(given), *_sides(layer)) for name, layer in backbone.sites.items()}
    return Terms(tuple(labels), fields, most, min(given), {}, {})


def _sides(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def unsuited(algorithm: Algorithm[Any, Any, Any], spec: ModelSpec, seed: int, clients: Iterable[Client]) -> str:
    """Why the algorithm cannot begin, or cannot serve one of these clients, asked before a round depends on it; empty:
    it serves all.

    The start is made anew for every site that comes: a copy for a whole run would cost more than that.
    """
    try:
        state = algorithm.server_init(spec, seed)
        for client in clients:
            if unknown := sorted(spec.ranks.keys() ^ client.ranks.keys()):
                return f"client {client.id!r}: the server and the site do not both have a rank of {listed(unknown)}"
            algorithm.broadcast(state, client, 0)
    except UserError as problem:
        return str(problem)
    return ""


def _shown(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= 300 else f"{value[:260]}... ({digest(value.encode())})"


def _only(name: str, server: Mapping[str, str], site: Mapping[str, str]) -> str:
    """Which labels only one of them has."""
    if name != "labels" or not (server.get(name) and site.get(name)):
        return ""
    ours, theirs = (set(json.loads(one[name])) for one in (server, site))
    if ours == theirs:
        return " (in another order)"
    more = {"the server": ours - theirs, "this site": theirs - ours}
    said = [f"only {who} has {listed(sorted(own), 20)}" for who, own in more.items() if own]
    return f" ({'; '.join(said)})"
