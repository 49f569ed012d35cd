"""The federation's data: one table, and for each client the rows it fits, holds out and tests on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa

from fedlora.data import duplicates
from fedlora.data.fields import as_dataset, columns_of, extract
from fedlora.data.formats import Part, checked, of_dataset
from fedlora.data.keys import in_order, listed, nearest, stream
from fedlora.data.partition import assign, codes, hold_out
from fedlora.data.remarks import quantities, unheeded, unread, untested
from fedlora.data.settings import DataSettings, Sources
from fedlora.data.sources import SPLIT_NAMES, Split, many
from fedlora.data.split import FIT, HOLDOUT, NAMES, TEST, at_most, divide, follow, keep_trained
from fedlora.errors import UserError

_GIVEN: dict[str, int] = {"train": -1, "validation": HOLDOUT, "test": TEST}


class Clients(Mapping[str, Mapping[str, np.ndarray]]):
    """Client id -> {"fit", "holdout", "test"} -> (n,) int64 row numbers: slices of one array, made on access.

    Costs 8 bytes a row and 32 bytes a client beside the ids, so that 100,000 clients stay cheap.
    """

    def __init__(self, ids: Sequence[str], client: np.ndarray, role: np.ndarray) -> None:
        """client, role: (rows,) int64; rows with client -1 are nobody's."""
        owned = np.flatnonzero(client >= 0)
        cell = client[owned] * len(NAMES) + role[owned]
        self._rows = owned[np.argsort(cell, kind="stable")].astype(np.int64)
        self._rows.setflags(write=False)
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(ids) * len(NAMES)))])
        self._number = {name: i for i, name in enumerate(ids)}

    def __getitem__(self, client: str) -> Mapping[str, np.ndarray]:
        first = self._number[client] * len(NAMES)
        ends = self._ends[first : first + len(NAMES) + 1].tolist()
        return {name: self._rows[ends[i] : ends[i + 1]] for i, name in enumerate(NAMES)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)

    def counts(self) -> np.ndarray:
        """(clients, 3) int64: rows of each client in fit, holdout and test."""
        return np.diff(self._ends).reshape(len(self), len(NAMES))


@dataclass(frozen=True)
class Population:
    """All clients' data.

    table: its columns are ("text", "label"), ("image", "label"), ("prompt", "response") or ("text",), checked; every
    row is somebody's.
    clients: every client, the unseen ones included. unseen: clients that never train. labels: the label space
    (() for causal-lm). warnings: what a user should read before a run. digest: SHA-256 of examples and splits.
    """

    table: datasets.Dataset
    clients: Clients
    unseen: tuple[str, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The table's columns."""
        return tuple(self.table.column_names)

    @property
    def seen(self) -> tuple[str, ...]:
        """The clients that train, in order."""
        unseen = set(self.unseen)
        return tuple(name for name in self.clients if name not in unseen)

    def train(self, client: str) -> np.ndarray:
        """(n,) int64: fit and holdout rows together, in the table's order."""
        rows = self.clients[client]
        return np.sort(np.concatenate([rows["fit"], rows["holdout"]]))


@dataclass(frozen=True)
class _Rows:
    """Examples whose owners are known, before they are split."""

    table: datasets.Dataset
    client: np.ndarray  # (rows,) int64, -1: nobody's
    given: np.ndarray  # (rows,) int64: what the user said, else -1
    labels: list[str] | None
    ids: Sequence[str]
    has_test: np.ndarray  # (clients,) bool: the user brought test data for it
    unseen: tuple[str, ...]
    read: Sequence[Part]  # where each row stood, for errors
    warnings: tuple[str, ...] = ()  # of what was read


def build(settings: DataSettings, task: str) -> Population:
    """Reads, partitions and splits the data of a study. Everything but the files is fixed by `settings.seed`.

    Raises `UserError` for what cannot be read or divided, naming file, line or column and the remedy.
    """
    if not settings.train:
        raise UserError("data.train is missing", "name a file, a folder or a hub dataset: train = 'examples.jsonl'")
    columns = columns_of(settings, task)
    ways = settings.partition
    # "client" carries the column that partitions: the owner, or the class to skew by
    wanted = columns | ({"client": ways.column} if ways.column else {})
    tables: list[pa.Table] = []
    read: list[Part] = []
    given: list[int] = []
    warnings: list[str] = []
    splits: tuple[tuple[Split, Sources | None], ...] = (
        ("train", settings.train),
        ("validation", settings.validation),
        ("test", settings.test),
    )
    for name, sources in splits:
        for part in many(sources, name) if sources else ():
            tables.append(extract(part, wanted))
            warnings += unheeded(part, name, wanted.values())
            read.append(replace(part, table=part.table.schema.empty_table()))  # only the places are needed from here
            given.append(_GIVEN[name])
    placed = np.repeat(given, [len(part.places) for part in read])
    stacked = pa.concat_tables(tables)
    labels = stacked["label"].to_pylist() if "label" in columns else None
    values = stacked["client"].to_pylist() if ways.column else labels
    client, ids, extra = _owners(settings, placed, values)
    rows = _Rows(
        table=as_dataset([stacked.select(list(columns))]),
        client=client,
        given=placed,
        labels=labels,
        ids=[*ids, *extra],
        has_test=np.full(len(ids) + len(extra), settings.test is not None),
        unseen=hold_out(settings.holdout_clients, ids, settings.seed) + extra,
        read=read,
        warnings=(*unread(read), *warnings),
    )
    return _finish(rows, settings)


def from_datasets(
    clients: Mapping[str, datasets.Dataset],
    settings: DataSettings,
    task: str,
    *,
    strangers: bool = False,
    partial: bool = False,
) -> Population:
    """The same from each client's own dataset; a column `split` (train, validation, test) is respected where present.

    `strangers`: nobody of them trains (they are only scored or served, with the labels that `settings` lists).
    `partial`: these are not all clients of the federation: others may train the listed labels that these only test.

    Raises `UserError` that names the client and row of what is wrong.
    """
    clients = checked(clients)
    columns = columns_of(settings, task)
    ids = in_order(clients)
    tables: list[pa.Table] = []
    read: list[Part] = []
    given: list[np.ndarray] = []
    for name in ids:
        data = clients[name]
        if len(data) == 0:
            raise UserError(f"client {name!r} has no examples", "leave it out")
        part = of_dataset(data, f"client {name!r}")
        tables.append(extract(part, columns))
        read.append(replace(part, table=part.table.schema.empty_table()))
        given.append(_said(part))
    client = np.repeat(np.arange(len(ids)), [len(part.places) for part in read])
    placed = np.concatenate(given)
    table = as_dataset(tables)
    rows = _Rows(
        table=table,
        client=client,
        given=placed,
        labels=table["label"][:] if "label" in columns else None,
        ids=ids,
        has_test=np.bincount(client[placed == TEST], minlength=len(ids)) > 0,
        unseen=tuple(ids) if strangers else hold_out(settings.holdout_clients, ids, settings.seed),
        read=read,
    )
    return _finish(rows, settings, partial)


def _said(part: Part) -> np.ndarray:
    """What the column `split` says of each row: -1 to be split, HOLDOUT or TEST."""
    if "split" not in part.table.column_names:
        return np.full(len(part.places), -1, dtype=np.int64)
    given = np.empty(len(part.places), dtype=np.int64)
    for row, value in enumerate(part.table["split"].to_pylist()):
        split = SPLIT_NAMES.get(str(value).casefold())
        if split is None:
            raise UserError(
                f"{part.place(row)}: column 'split' says {value!r}{nearest(str(value), SPLIT_NAMES)}",
                "use train, validation or test",
            )
        given[row] = _GIVEN[split]
    return given


def _owners(
    settings: DataSettings, placed: np.ndarray, values: list[str] | None
) -> tuple[np.ndarray, list[str], tuple[str, ...]]:
    """(rows,) client of every row, the clients, and those that only the validation or test file knows.

    values: the partitioning column (owner, or class) of every row; None where no column says anything.
    """
    ways = settings.partition
    train = placed == -1
    training = [value for value, kept in zip(values, train, strict=True) if kept] if values else None
    natural = ways.by == "column"
    owner, ids = assign(
        ways,
        int(train.sum()),
        classes=None if natural else training,
        owners=training if natural else None,
        seed=settings.seed,
    )
    client = np.full(len(placed), -1, dtype=np.int64)
    client[train] = owner
    if natural:
        assert values is not None
        extra = tuple(in_order(set(values) - set(ids)))
        number = {name: i for i, name in enumerate([*ids, *extra])}
        client[:] = [number[value] for value in values]
        return client, ids, extra
    stratum = codes(values)[0] if values else np.zeros(len(placed), dtype=np.int64)
    kinds = int(stratum.max()) + 1
    owned = train & (client >= 0)
    quota = np.bincount(client[owned] * kinds + stratum[owned], minlength=len(ids) * kinds).reshape(-1, kinds)
    for role in (HOLDOUT, TEST):
        rows = placed == role
        client[rows] = follow(quota, stratum[rows], stream(settings.seed, "divide", NAMES[role]))
    return client, ids, ()


def _finish(rows: _Rows, settings: DataSettings, partial: bool = False) -> Population:
    """Draws, splits, checks and seals."""
    warnings = [*rows.warnings, *_unused(rows, rows.client >= 0)]
    table = rows.table
    near, exact = duplicates.near_groups(table), cache(lambda: duplicates.exact_groups(table))
    if settings.per_client is not None:
        kept = at_most(settings.per_client, rows.client, rows.given, exact(), stream(settings.seed, "per_client"))
        rows = replace(rows, client=np.where(kept, rows.client, -1))
    owned = rows.client >= 0
    group = np.zeros(len(owned), dtype=np.int64)
    group[owned], shared = duplicates.soften(near[owned], lambda: exact()[owned], rows.client[owned])
    if shared:
        warnings += [
            f"{shared} sets of near-copies fill more than half of a client: there only exact copies are kept together"
        ]
    code, names = codes(rows.labels) if rows.labels else (np.zeros(len(owned), dtype=np.int64), [])
    role = np.full(len(owned), -1, dtype=np.int64)
    role[owned] = divide(
        rows.client[owned],
        rows.given[owned],
        np.unique(group[owned], return_inverse=True)[1],
        code[owned],
        rows.has_test,
        stream(settings.seed, "split"),
    )
    strangers = set(rows.unseen)
    unseen = np.isin(rows.client, [i for i, name in enumerate(rows.ids) if name in strangers])
    if rows.labels:
        role = keep_trained(role, code, group, free=owned & (rows.given == -1), trains=owned & ~unseen)
    clients = Clients(rows.ids, rows.client, role)  # of all rows read, which errors and remarks name
    _check_clients(clients, strangers)
    labels: tuple[str, ...] = ()
    if rows.labels:
        learns = owned & (role != TEST) & (~unseen if settings.label_space == "union" else True)
        labels, more = _label_space(rows, settings, code, names, learns, unseen | partial)
        ours = owned & (rows.given == -1) & ~unseen & ~rows.has_test[rows.client]
        warnings += [*more, *quantities(labels), *untested(code[ours], names, role[ours] == TEST)]
    warnings += _remarks(clients, rows, role, near)
    return Population(
        table=rows.table if owned.all() else rows.table.select(np.flatnonzero(owned)),
        clients=Clients(rows.ids, rows.client[owned], role[owned]),
        unseen=rows.unseen,
        labels=labels,
        warnings=tuple(warnings),
        digest=_digest(rows, role),
    )


def _label_space(
    rows: _Rows, settings: DataSettings, code: np.ndarray, names: list[str], learns: np.ndarray, unseen: np.ndarray
) -> tuple[tuple[str, ...], list[str]]:
    """The label space and its warnings; refuses labels that nothing trains (a listed one of an unseen client's rows may
    be another's to train)."""
    is_trained = np.bincount(code[learns], minlength=len(names)) > 0
    trained = [name for name, known in zip(names, is_trained, strict=True) if known]
    is_listed = np.isin(names, settings.labels or ())
    untaught = (rows.client >= 0) & ~is_trained[code] & ~(unseen & is_listed[code])
    for row in np.flatnonzero(untaught).tolist():
        label, owner = names[code[row]], rows.ids[rows.client[row]]
        who = f"of client {owner!r}, which never trains, " if unseen[row] else ""
        if settings.labels and not trained:  # none of these clients trains: the run has, and knows its labels
            raise UserError(
                f"{_place(rows.read, row)}: label {label!r} is unknown to the run"
                f"{nearest(label, settings.labels)}; it knows {listed(settings.labels)}",
                "correct the label or remove the row",
            )
        raise UserError(
            f"{_place(rows.read, row)}: label {label!r} {who}is in no training example"
            f"{nearest(label, trained)}; training labels: {listed(trained)}",
            "hold out another client, or list every label in data.labels"
            if unseen[row]
            else "correct the label, add training examples of it, or remove the row",
        )
    if settings.labels is None:
        return tuple(trained), []
    for row in np.flatnonzero(learns & ~is_listed[code]).tolist():
        label = names[code[row]]
        raise UserError(
            f"{_place(rows.read, row)}: label {label!r} is not in data.labels{nearest(label, settings.labels)}",
            "correct the label or list it there",
        )
    idle = [name for name in settings.labels if name not in set(trained)]
    return settings.labels, [f"data.labels: no training example has {listed(idle)}"] if idle else []


def _check_clients(clients: Clients, unseen: set[str]) -> None:
    counts = clients.counts()
    for name, (fit, _, _) in zip(clients, counts, strict=True):
        if fit == 0 and name not in unseen:
            raise UserError(
                f"client {name!r} has no training examples",
                "give it some, list it in data.holdout_clients, or ask for fewer clients",
            )


def _unused(rows: _Rows, owned: np.ndarray) -> list[str]:
    if owned.all():
        return []
    left = [] if rows.labels is None else in_order(rows.labels[row] for row in np.flatnonzero(~owned))
    of = f" (labels {listed(left)})" if left else ""
    return [f"{int((~owned).sum())} examples{of} fall to no client: ask for more clients or classes per client"]


def _remarks(clients: Clients, rows: _Rows, role: np.ndarray, near: np.ndarray) -> list[str]:
    """What a user should know of a division that is nevertheless valid."""
    remarks: list[str] = []
    counts = clients.counts()
    names = list(clients)
    untrained = [name for name, count in zip(names, counts, strict=True) if count[FIT] == 0]
    if untrained:
        remarks.append(f"{_number(untrained, 'client')} without training data, only tested on: {listed(untrained)}")
    untested = [name for name, count in zip(names, counts, strict=True) if count[TEST] == 0]
    if untested:
        remarks.append(f"{_number(untested, 'client')} without test data, left out of the scores: {listed(untested)}")
    placed = (rows.given != -1) & (rows.client >= 0)
    known = np.zeros(int(near.max()) + 1, dtype=bool)
    known[near[(rows.given == -1) & (role == FIT)]] = True
    for kind in (HOLDOUT, TEST):
        copies = int((known[near] & placed & (role == kind)).sum())
        if copies:
            total = int((placed & (role == kind)).sum())
            remarks.append(f"{copies} of {total} given {NAMES[kind]} examples are near-copies of training examples")
    return remarks


def _number(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}" + ("" if len(names) == 1 else "s")


def _place(read: Sequence[Part], row: int) -> str:
    for part in read:
        if row < len(part.places):
            return part.place(row)
        row -= len(part.places)
    raise IndexError(row)


def _digest(rows: _Rows, role: np.ndarray) -> str:
    """SHA-256 over every example, the clients' ids, and who has which example for what."""
    digest = hashlib.sha256()
    contents = duplicates.contents(rows.table)
    while some := [b"%d:%b" % (len(content), content) for content in islice(contents, 100)]:
        digest.update(b"".join(some))
    for name in [*(rows.labels or ()), *rows.ids, *rows.unseen]:
        digest.update(b"%d:" % len(name.encode()) + name.encode())
    for array in (rows.client, role):
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()
