"""Partitions, splits and copies as properties over random inputs."""

from __future__ import annotations

import builtins
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import duplicates
from fedlora.data.duplicates import near_copies, normalise, soften
from fedlora.data.partition import assign, hold_out
from fedlora.data.settings import PartitionSettings
from fedlora.data.split import FIT, HOLDOUT, TEST, divide, follow, keep_trained
from fedlora.errors import UserError

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=7)) for i in range(400)]


def _numbered(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Clients of 1 to 60 rows with groups of copies inside and across them, some rows placed by the user."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    clients = draw(st.integers(1, 8))
    client = np.repeat(np.arange(clients), rng.integers(1, 60, clients))
    rows = len(client)
    group = np.where(
        rng.random(rows) < draw(st.sampled_from([0, 0.1, 0.8])), rng.integers(0, 12, rows), np.arange(rows) + 12
    )
    given_ = np.where(rng.random(rows) < draw(st.sampled_from([0, 0.2])), rng.integers(1, 3, rows), -1)
    return {
        "client": client,
        "given": given_,
        "group": _numbered(group),
        "stratum": rng.integers(0, draw(st.integers(1, 6)), rows),
        "has_test": np.bincount(client[given_ == TEST], minlength=clients) > 0,
    }


@settings(deadline=None)
@given(worlds(), st.integers(0, 5))
def test_divide_places_every_row_once_and_keeps_copies_together(world: dict[str, np.ndarray], seed: int) -> None:
    before = {name: array.copy() for name, array in world.items()}
    role = divide(**world, rng=np.random.default_rng(seed))
    again = divide(**world, rng=np.random.default_rng(seed))
    assert np.array_equal(role, again)
    assert all(np.array_equal(world[name], before[name]) for name in world)
    assert set(role) <= {FIT, HOLDOUT, TEST}
    placed = world["given"] != -1
    assert np.array_equal(role[placed], world["given"][placed])
    for group in np.unique(world["group"]):
        assert len(set(role[~placed & (world["group"] == group)])) <= 1
    for client, has_test in enumerate(world["has_test"]):
        mine = ~placed & (world["client"] == client)
        assert FIT in role[mine] or not mine.any()
        if has_test:
            assert TEST not in role[mine]
        if (placed & (world["client"] == client) & (world["given"] == HOLDOUT)).any():
            assert HOLDOUT not in role[mine]


@settings(deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_divide_without_copies_is_exact_and_stratified(sizes: list[int], kinds: int, seed: int) -> None:
    client = np.repeat(np.arange(len(sizes)), sizes)
    stratum = np.random.default_rng(seed).integers(0, kinds, len(client))
    role = divide(
        client,
        np.full(len(client), -1),
        np.arange(len(client)),
        stratum,
        np.zeros(len(sizes), dtype=bool),
        np.random.default_rng(seed),
    )
    for i, size in enumerate(sizes):
        counts = np.bincount(role[client == i], minlength=3)
        assert np.abs(counts - size * np.array([0.7, 0.1, 0.2])).max() < 1
        assert size < 2 or counts[TEST] > 0
        assert counts[FIT] > 0
        for kind in range(kinds):
            mine = (client == i) & (stratum == kind)
            got = np.bincount(role[mine], minlength=3)
            # a run of m rows in an even interleaving holds its share of each place to within two
            assert np.abs(got - mine.sum() * counts / size).max() <= 2


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 200), st.integers(0, 99))
def test_follow_gives_out_every_row_by_training_share(clients: int, kinds: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    quota = rng.integers(0, 30, (clients, kinds)) * (rng.random((clients, kinds)) < 0.6)
    quota[rng.integers(clients), :] += 1
    stratum = rng.integers(0, kinds, rows)
    client = follow(quota, stratum, np.random.default_rng(seed))
    assert client.shape == (rows,)
    total = np.zeros(clients)
    for kind in range(kinds):
        due = quota[:, kind] / quota[:, kind].sum() * (stratum == kind).sum()
        got = np.bincount(client[stratum == kind], minlength=clients)
        assert np.all(got[quota[:, kind] == 0] == 0)
        assert np.abs(got - due).max() < 1 + 1e-9
        total += due
    assert np.abs(np.bincount(client, minlength=clients) - total).max() <= 2


def test_follow_does_not_starve_small_clients() -> None:
    quota = np.ones((50, 20), dtype=int)
    quota[0] = 3  # rounding each class alone would give client 0 a row of every class, and most others none
    client = follow(quota, np.repeat(np.arange(20), 26), np.random.default_rng(0))
    counts = np.bincount(client, minlength=50)
    assert counts[0] == pytest.approx(30, abs=1)
    assert set(counts[1:]) <= {9, 10, 11}


def test_a_label_of_the_test_rows_alone_is_moved_to_training() -> None:
    role = np.array([FIT, TEST, TEST, TEST, HOLDOUT])
    label = np.array([0, 1, 1, 2, 3])
    group = np.array([0, 1, 2, 2, 3])
    every = np.full(5, True)
    kept = keep_trained(role, label, group, free=every, trains=every)
    assert kept.tolist() == [FIT, FIT, FIT, FIT, HOLDOUT]  # row 3 is a copy of row 2, but its label 2 needs it
    stranger = np.array([True, True, True, False, True])
    assert keep_trained(role, label, group, every, stranger).tolist() == [FIT, FIT, TEST, TEST, HOLDOUT]
    placed = np.array([True, False, True, True, True])
    assert keep_trained(role, label, group, placed, every).tolist() == [FIT, TEST, FIT, FIT, HOLDOUT]
    assert role.tolist() == [FIT, TEST, TEST, TEST, HOLDOUT]


# ------------------------------------------------------------------------------------------- copies


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=40), min_size=1, max_size=20), st.integers(0, 9))
def test_noise_never_separates_copies(texts: list[list[str]], seed: int) -> None:
    rng = random.Random(seed)
    plain = [" ".join(words) for words in texts]
    noisy = [
        "  ".join(rng.choice((w, w.upper(), w + "!", f"{w} {rng.randrange(99)}")) for w in words) for words in texts
    ]
    group = near_copies(plain + noisy)
    assert np.array_equal(group[: len(plain)], group[len(plain) :])


def _jaccard(a: list[str], b: list[str]) -> float:
    one, two = set(pairwise(a)), set(pairwise(b))
    return len(one & two) / len(one | two)


@given(text=st.text(st.characters(max_codepoint=127) | st.sampled_from(" 7_é\u2028"), max_size=20))
def test_words_of_plain_text_are_found_as_those_of_any_text(text: str) -> None:
    folded = text.casefold()
    words = re.sub(r"[\W\d_]+", " ", folded).split()
    assert normalise(text) == (" ".join(words) or " ".join(folded.split()))


def test_a_sketch_has_the_smallest_of_each_hash_over_word_pairs() -> None:
    """The module takes short cuts; splits of published runs hang on these numbers."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 40))) for _ in range(30)]
    numbers: dict[str, int] = {}
    factors = np.random.default_rng(0).integers(0, 2**63, 32, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for text, found in zip(texts, duplicates._sketches(texts), strict=True):
        words = [numbers.setdefault(word, len(numbers)) + 1 for word in text.split()]
        pairs = [mixed(mixed(a) + b) for a, b in pairwise(words)]
        assert found.tolist() == [min(mixed(pair * int(factor)) for pair in pairs) >> 32 for factor in factors]


def mixed(value: int) -> int:
    """A 64-bit mixing step in Python's own numbers."""
    value = value * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 29) * 0xBF58476D1CE4E5B9 % 2**64
    return value ^ value >> 32


def test_near_copies_follow_the_jaccard_similarity_of_word_pairs() -> None:
    rng = random.Random(3)
    bases = [rng.choices(WORDS, k=60) for _ in range(150)]
    close = [[*words[:30], rng.choice(WORDS), *words[31:]] for words in bases]
    far = [words[:20] + rng.choices(WORDS, k=40) for words in bases]
    assert min(map(_jaccard, bases, close)) > 0.9
    assert max(map(_jaccard, bases, far)) < 0.4
    group = near_copies([" ".join(words) for words in bases + close + far]).reshape(3, 150)
    assert (group[0] == group[1]).mean() > 0.99
    assert not (group[0] == group[2]).any()
    assert len(set(group[0])) == 150


def test_long_texts_with_a_shared_preamble_are_told_apart() -> None:
    rng = random.Random(4)
    preamble = " ".join(rng.choices(WORDS, k=50))
    group = near_copies([f"{preamble} {' '.join(rng.choices(WORDS, k=200))}" for _ in range(50)])
    assert len(set(group)) == 50


def test_short_texts_are_copies_only_where_equal() -> None:
    texts = ["yes", "Yes.", "no", "1", "2", "", "go on", "go  on!", "😀", "😐"]
    assert near_copies(texts).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_a_template_that_fills_a_client_falls_back_to_exact_copies() -> None:
    near = np.array([0, 0, 0, 1, 0, 2, 3, 4, 4])
    exact = np.array([0, 0, 1, 2, 3, 4, 5, 6, 6])
    client = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    group, broken = soften(near, lambda: exact, client)
    assert broken == 1
    assert group[0] == group[1]
    assert len(set(group.tolist())) == 7  # {0,1}, 2, 3, 4, 5, 6, {7,8}
    assert group[7] == group[8]


# ------------------------------------------------------------------------------------------- partitions

WAYS = [
    {"by": "iid", "clients": 7},
    {"by": "dirichlet", "clients": 7, "alpha": 0.5},
    {"by": "pathological", "clients": 7, "classes_per_client": 2},
    {"by": "column", "column": "owner"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["by"])
def test_partitions_give_each_row_to_one_client_by_the_seed(way: dict[str, object]) -> None:
    rng = np.random.default_rng(1)
    classes = [f"class {i}" for i in rng.integers(0, 10, 700)]
    owners = [str(i) for i in rng.integers(0, 13, 700)]
    ways = PartitionSettings(**way)
    client, ids = assign(ways, 700, classes, owners, seed=4)
    again, _ = assign(ways, 700, classes, owners, seed=4)
    other, _ = assign(ways, 700, classes, owners, seed=5)
    assert np.array_equal(client, again)
    assert (np.array_equal(client, other)) == (ways.by == "column")
    assert set(client) == set(range(len(ids)))
    if ways.by == "column":
        assert [ids[i] for i in client] == owners
        assert ids == [str(i) for i in range(13)]
    elif ways.by == "iid":
        assert set(np.bincount(client)) == {100}
    elif ways.by == "pathological":
        assert all(len({classes[row] for row in np.flatnonzero(client == i)}) == 2 for i in range(7))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_pathological_clients_have_their_classes_and_none_lies_idle(
    clients: int, kinds: int, per_client: int, seed: int
) -> None:
    per_client = min(per_client, kinds)
    classes = [str(kind) for kind in range(kinds) for _ in range(clients + kind)]
    ways = PartitionSettings(by="pathological", clients=clients, classes_per_client=per_client)
    client, _ = assign(ways, len(classes), classes, None, seed)
    held = {i: {classes[row] for row in np.flatnonzero(client == i)} for i in range(clients)}
    assert all(len(mine) == per_client for mine in held.values())
    users = Counter(kind for mine in held.values() for kind in mine)
    assert max(users.values()) - min(users.get(str(kind), 0) for kind in range(kinds)) <= 1
    assert (client == -1).any() == (clients * per_client < kinds)


def test_small_alpha_is_skewed_and_large_alpha_is_not() -> None:
    classes = [str(i % 5) for i in range(2000)]

    def skew(alpha: float) -> float:
        client, _ = assign(PartitionSettings(alpha=alpha, clients=4), 2000, classes, None, seed=0)
        shares = np.array([[np.sum(client[k::5] == i) for k in range(5)] for i in range(4)]) / 2000 * 20
        return float(np.abs(shares - 1).mean())

    assert skew(0.1) > 0.7 > 0.2 > skew(100.0)


def test_impossible_partitions_say_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for ways, classes, message in (
        ({"clients": 7}, None, "clients = 7, but there are only 6 .*\n  -> ask for at most 6"),
        (
            {"alpha": 0.01, "clients": 6},
            ["a"] * 6,
            "ten draws of Dirichlet.*\n  -> ask for fewer clients, or raise alpha",
        ),
        ({"alpha": 1.0, "clients": 2}, None, "no data.label\n  -> name a column"),
        ({"classes_per_client": 4, "clients": 2}, list("aabbcc"), "has 3 classes\n  -> ask for at most 3"),
    ):
        with pytest.raises(UserError, match=message):
            assign(PartitionSettings(**ways), 6, classes, None, seed=0)
    real = builtins.__import__

    def without_flower(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("flwr_datasets"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_flower)
    with pytest.raises(UserError, match=r"pip install 'fedlora\[partition\]'"):
        assign(PartitionSettings(alpha=1.0, clients=2), 6, list("aabbcc"), None, seed=0)


def test_holdout_clients() -> None:
    ids = [str(i) for i in range(20)]
    assert hold_out(["3", "11"], ids, 0) == ("3", "11")
    assert len(hold_out(4, ids, 0)) == 4
    assert hold_out(4, ids, 0) == hold_out(4, ids, 0) != hold_out(4, ids, 1)
    assert hold_out(0, ids, 0) == hold_out((), ids, 0) == ()
    with pytest.raises(UserError, match=r"no client '333'"):
        hold_out(["333"], ids, 0)
    with pytest.raises(UserError, match="none is left to train"):
        hold_out(20, ids, 0)
