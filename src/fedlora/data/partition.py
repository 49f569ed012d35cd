"""Who owns which training example: row -> client, by one of four ways. Everything is a function of the seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

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
    return _by_class(settings, clients, classes, seed), ids


def codes(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(rows,) number of each value among the distinct ones in order, and those.

    >>> codes(["b", "a", "b"])
    (array([1, 0, 1]), ['a', 'b'])
    """
    names = in_order(values)
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[value] for value in values), dtype=np.int64, count=len(values)), names


def _by_class(settings: PartitionSettings, clients: int, classes: Sequence[str], seed: int) -> np.ndarray:
    """Dirichlet and pathological shares, drawn by Flower's partitioners."""
    numbers, names = codes(classes)
    per_client = settings.classes_per_client or 1
    if settings.by == "pathological" and per_client > len(names):
        raise UserError(
            f"data.partition.classes_per_client = {per_client}, but the training data has {len(names)} classes",
            f"ask for at most {len(names)}",
        )
    table = datasets.Dataset.from_dict({"class": numbers, "row": np.arange(len(numbers))})
    partitioner = _flower(settings, clients, int(stream(seed, "partition").integers(2**31)))
    partitioner.dataset = table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its retries, and unused classes: both are judged here
        try:
            shares = [partitioner.load_partition(i).with_format("numpy")["row"][:] for i in range(clients)]
        except ValueError as error:
            remedy = "raise alpha" if settings.by == "dirichlet" else "lower classes_per_client"
            raise UserError(
                f"partition by {settings.by!r} cannot give each of {clients} clients data from {len(numbers)} examples "
                f"of {len(names)} classes ({str(error).split('.')[0]})",
                f"ask for fewer clients, or {remedy}",
            ) from None
    client = np.full(len(numbers), -1, dtype=np.int64)
    for i, share in enumerate(shares):
        client[np.asarray(share, dtype=np.int64)] = i
    return client


def _flower(settings: PartitionSettings, clients: int, seed: int) -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError:
        raise UserError(
            f"partition by {settings.by!r} needs the package flwr-datasets", "pip install 'fedlora[partition]'"
        ) from None
    if settings.by == "dirichlet":
        return partitioner.DirichletPartitioner(
            clients, "class", alpha=settings.alpha or 0.5, min_partition_size=1, shuffle=False, seed=seed
        )
    return partitioner.PathologicalPartitioner(
        clients,
        "class",
        settings.classes_per_client or 1,
        class_assignment_mode="first-deterministic",  # the paper's: every class is used where clients suffice
        shuffle=False,
        seed=seed,
    )


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
