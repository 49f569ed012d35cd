"""Dividing each client's examples into fit, holdout and test, and a given test file among the clients."""

from __future__ import annotations

import numpy as np

FIT, HOLDOUT, TEST = 0, 1, 2
NAMES = ("fit", "holdout", "test")
SHARES = np.array([0.7, 0.1, 0.2])
_FREE = -1


def at_most(
    limit: int, client: np.ndarray, given: np.ndarray, copies: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(rows,) bool: at most `limit` random rows of each client and given part, distinct ones before copies of them.

    client, given, copies: (rows,) int64, rows of one number in `copies` being equal.

    >>> kept = at_most(2, np.zeros(5, int), np.zeros(5, int), np.array([7, 7, 7, 7, 8]), np.random.default_rng(0))
    >>> int(kept.sum()), bool(kept[4])
    (2, True)
    """
    part = np.unique(np.stack([client, given]), axis=1, return_inverse=True)[1].ravel()
    luck = rng.random(len(client))
    copy = _rank(np.stack([part, copies]), luck)
    return _rank(part[None], luck, copy) < limit


def _rank(group: np.ndarray, *by: np.ndarray) -> np.ndarray:
    """(rows,) the row's place in its group (a column of `group`), ordered by the last key, then the ones before it."""
    number = np.unique(group, axis=1, return_inverse=True)[1].ravel()
    order = np.lexsort((*by, number))
    first = np.searchsorted(number[order], np.arange(number.max(initial=-1) + 1))
    rank = np.empty(len(number), dtype=np.int64)
    rank[order] = np.arange(len(number)) - first[number[order]]
    return rank


def follow(quota: np.ndarray, stratum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(rows,) client of each row of a test file, so that clients get the file's classes as `quota` has them.

    quota: (clients, strata) training examples; row j of class s goes to client i in proportion to quota[i, s].
    Rounding errors are carried from class to class, so a client with a small share of many classes still gets its due
    in total. A class that nobody trains on goes by the clients' sizes.

    >>> follow(np.array([[8, 0], [2, 5]]), np.array([0] * 5 + [1] * 3), np.random.default_rng(0)).tolist()[5:]
    [1, 1, 1]
    """
    client = np.empty(len(stratum), dtype=np.int64)
    carry = np.zeros(len(quota))
    for kind in np.unique(stratum):
        rows = np.flatnonzero(stratum == kind)
        column = (quota[:, kind] if quota[:, kind].any() else quota.sum(axis=1)).astype(float)
        due = column * (len(rows) / column.sum())
        owed = np.where(column > 0, due + carry, 0.0)
        given = np.floor(due).astype(np.int64)
        left = len(rows) - int(given.sum())
        if left:  # at most one row more than the floor each, to those who are owed most
            rank = np.where(column > 0, owed - given, -np.inf) + 1e-9 * rng.random(len(column))
            given[np.argsort(-rank)[:left]] += 1
        carry += due - given
        client[rng.permutation(rows)] = np.repeat(np.arange(len(quota)), given)
    return client


def divide(
    client: np.ndarray,
    given: np.ndarray,
    group: np.ndarray,
    stratum: np.ndarray,
    has_test: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(rows,) FIT, HOLDOUT or TEST: each client's rows 70/10/20, stratified, a group never in two of them.

    client, group, stratum: (rows,) int64, numbered from 0. given: (rows,) HOLDOUT or TEST where the user said so, -1
    elsewhere. has_test: (clients,) bool: the user brought this client's test data, nothing is taken from the rest.
    What the user brings drops out of 70/10/20 (a test file leaves 7:1, a validation file 7:2). Copies of rows that
    the user placed stay in FIT. Groups go first, the largest to where most is missing; the single rows then fill up
    each client's exact quotas, taken evenly along its classes in random order.
    """
    clients = len(has_test)
    shares = np.tile(SHARES, (clients, 1))
    shares[np.bincount(client[given == HOLDOUT], minlength=clients) > 0, HOLDOUT] = 0
    shares[has_test, TEST] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    free = given == _FREE
    quota = shares * np.bincount(client[free], minlength=clients)[:, None]
    role = given.astype(np.int64)
    sizes = np.bincount(group) if len(group) else np.zeros(0, dtype=np.int64)
    single = free & (sizes[group] == 1)
    _place_groups(role, client, group, sizes, quota, rng)
    placed = free & ~single
    filled = np.bincount(client[placed] * 3 + role[placed], minlength=clients * 3).reshape(clients, 3)
    rows = np.flatnonzero(single)
    role[rows] = _place_singles(client[rows], stratum[rows], np.maximum(quota - filled, 0), shares, rng)
    return role


def _place_groups(
    role: np.ndarray,
    client: np.ndarray,
    group: np.ndarray,
    sizes: np.ndarray,
    quota: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Writes into `role` the place of every free row that has copies."""
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(sizes)
    missing = quota.copy()
    # rows that may still come to FIT, or have: a client must not lose its last one
    hope = np.bincount(client[role == _FREE], minlength=len(quota))
    several = np.flatnonzero(sizes > 1)
    several = several[rng.permutation(len(several))]
    for number in several[np.argsort(-sizes[several], kind="stable")]:
        rows = order[ends[number] - sizes[number] : ends[number]]
        rows_free = rows[role[rows] == _FREE]
        owners, counts = np.unique(client[rows_free], return_counts=True)
        gain = (missing[owners] * counts[:, None]).sum(axis=0)
        gain[(quota[owners] == 0).any(axis=0)] = -np.inf
        must = len(rows_free) < len(rows) or (hope[owners] == counts).any()
        place = FIT if must else int(np.argmax(gain))
        role[rows_free] = place
        missing[owners, place] -= counts
        if place != FIT:
            hope[owners] -= counts


def _place_singles(
    client: np.ndarray, stratum: np.ndarray, missing: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(rows,) places of rows without copies: exact counts per client, spread evenly along its classes."""
    if not len(client):
        return np.zeros(0, dtype=np.int64)
    clients, kinds = len(missing), int(stratum.max()) + 1
    number = np.bincount(client, minlength=clients)
    total = missing.sum(axis=1, keepdims=True)
    target = np.where(total > 0, missing / np.where(total > 0, total, 1), shares) * number[:, None]
    count = np.floor(target + 1e-9).astype(np.int64)
    left = number - count.sum(axis=1)
    first = np.argsort(-(target - count + np.array([0, 1e-6, 2e-6])), axis=1, kind="stable")  # ties: test, then holdout
    rank = np.argsort(first, axis=1)
    count += rank < left[:, None]
    # rows by client, its classes in random order, random within; places by client, evenly interleaved
    pair, inverse = np.unique(client * kinds + stratum, return_inverse=True)
    rows = np.lexsort((rng.random(len(client)), rng.random(len(pair))[inverse], client))
    repeat = count.ravel()
    cell = np.repeat(np.arange(clients * 3), repeat)
    within = np.arange(len(cell)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    sequence = np.lexsort((cell % 3, (within + 0.5) / repeat[cell], cell // 3))
    place = np.empty(len(client), dtype=np.int64)
    place[rows] = cell[sequence] % 3
    return place


def keep_trained(
    role: np.ndarray, label: np.ndarray, group: np.ndarray, free: np.ndarray, trains: np.ndarray
) -> np.ndarray:
    """`role`, changed so that every label of the rows `free & trains` has one to train on, with all copies of that row.

    free: (rows,) bool, rows that the user did not place himself. trains: (rows,) bool, rows of training clients.
    """
    trained = np.zeros(int(label.max(initial=-1)) + 1, dtype=bool)
    trained[label[trains & (role != TEST)]] = True
    role = role.copy()
    for row in np.flatnonzero(free & trains & ~trained[label]):
        if not trained[label[row]]:
            copies = free & (group == group[row])
            role[copies] = FIT
            trained[label[copies & trains]] = True
    return role
