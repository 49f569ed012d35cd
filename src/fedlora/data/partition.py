"""Who owns which training example: row -> client, by one of four ways. Everything is a function of the seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import datasets
import numpy as np

from fedlora.data.keys import in_order, nearest, stream
from fedlora.data.settings import PartitionSettings
from fedlora.errors import UserError


def assign(
    settings: PartitionSettings, rows: int, classes: Sequence[str] | None, owners: Sequence[str] | None, seed: int
) -> tuple[np.ndarray, list[str]]:
    """(rows,) client number of each row (-1: nobody's) and the clients' ids.

    `classes` are the values that dirichlet and pathological skew by, `owners` those of the natural clients' column.
    Every client gets at least one row; where that cannot be, `UserError` says what to change.
    """
    if settings.by == "column":
        assert owners is not None
        return codes(owners)
    clients = settings.clients or 0
    if clients > rows:
        raise UserError(
            f"data.partition.clients = {clients}, but there are only {rows} training examples",
            f"ask for at most {rows} clients",
        )
    ids = [str(number).zfill(len(str(clients - 1))) for number in range(clients)]
    if settings.by == "iid":
        client = np.empty(rows, dtype=np.int64)
        client[stream(seed, "partition").permutation(rows)] = np.arange(rows) % clients
        return client, ids
    if classes is None:
        raise UserError(
            f"partition by {settings.by!r} skews classes, and this task has no data.label",
            "name a column of classes in data.partition.column, or partition by 'iid' or 'column'",
        )
    number, names = codes(classes)
    if settings.by == "dirichlet":
        return _dirichlet(number, len(names), clients, settings.alpha or 0.5, seed), ids
    return _pathological(number, len(names), clients, settings.classes_per_client or 1, seed), ids


def codes(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(rows,) number of each value among the distinct ones in order, and those.

    >>> codes(["b", "a", "b"])
    (array([1, 0, 1]), ['a', 'b'])
    """
    names = in_order(values)
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[value] for value in values), dtype=np.int64, count=len(values)), names


def _pathological(number: np.ndarray, kinds: int, clients: int, per_client: int, seed: int) -> np.ndarray:
    """(rows,) clients, of `per_client` classes each; a class's rows are shared evenly by the clients that have it.

    Classes are dealt from the least used ones, so that none lies idle while clients * per_client >= classes (Flower's
    partitioner draws them independently: with 10 clients of 10 classes it left 39 of CIFAR-100's classes unused).
    """
    if per_client > kinds:
        raise UserError(
            f"data.partition.classes_per_client = {per_client}, but the training data has {kinds} classes",
            f"ask for at most {kinds}",
        )
    rng = stream(seed, "partition")
    used = np.zeros(kinds, dtype=np.int64)
    owners: list[list[int]] = [[] for _ in range(kinds)]
    for i in range(clients):
        dealt = np.lexsort((rng.random(kinds), used))[:per_client]
        used[dealt] += 1
        for kind in dealt:
            owners[kind].append(i)
    client = np.full(len(number), -1, dtype=np.int64)
    for kind, having in enumerate(owners):
        rows = np.flatnonzero(number == kind)
        if having:
            client[rng.permutation(rows)] = rng.permutation(having)[np.arange(len(rows)) % len(having)]
    return client


def _dirichlet(number: np.ndarray, kinds: int, clients: int, alpha: float, seed: int) -> np.ndarray:
    """(rows,) clients: Flower's partitioner draws each class's shares from Dirichlet(alpha)."""
    try:
        from flwr_datasets.partitioner import DirichletPartitioner
    except ImportError:
        raise UserError(
            "partition by 'dirichlet' needs the package flwr-datasets", "pip install 'fedlora[partition]'"
        ) from None
    drawn = int(stream(seed, "partition").integers(2**31))
    partitioner = DirichletPartitioner(clients, "class", alpha, min_partition_size=1, shuffle=False, seed=drawn)
    # shuffled first: it deals a class's rows in order, and files are often sorted by more than their label
    rows = stream(seed, "partition", "order").permutation(len(number))
    partitioner.dataset = datasets.Dataset.from_dict({"class": number[rows], "row": rows})
    client = np.full(len(number), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every redraw; only the last counts
        try:
            for i in range(clients):
                client[partitioner.load_partition(i).with_format("numpy")["row"][:]] = i
        except ValueError:
            raise UserError(
                f"data.partition: ten draws of Dirichlet({alpha:g}) left some of {clients} clients without any of "
                f"{len(number)} examples of {kinds} classes",
                "ask for fewer clients, or raise alpha",
            ) from None
    return client


def hold_out(wanted: int | Sequence[str], ids: Sequence[str], seed: int) -> tuple[str, ...]:
    """The clients that never train: those named, or so many drawn by the seed. At least one client must be left."""
    if isinstance(wanted, int):
        chosen = {ids[i] for i in stream(seed, "holdout_clients").permutation(len(ids))[:wanted]}
    else:
        known = set(ids)
        for name in wanted:
            if name not in known:
                raise UserError(
                    f"data.holdout_clients: there is no client {name!r}{nearest(name, ids)}",
                    "`fedlora data FILE.toml` lists the clients",
                )
        chosen = set(wanted)
    if len(chosen) >= len(ids):
        raise UserError(
            f"data.holdout_clients takes all {len(ids)} clients: none is left to train", "hold out fewer clients"
        )
    return tuple(name for name in ids if name in chosen)
