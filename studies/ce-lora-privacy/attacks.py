"""Attacks on gradients: gradient matching, the span check, and recognition among candidates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from target import Case, Target, cut, distances, mismatch, observed, repeated
from torch import Tensor
from torch.nn import functional

from fedlora.federation.spec import stream

LENGTH, POOL = 8, 64
"""Tokens of a short text, with [CLS] and [SEP]; candidates of the recognition test."""
RESTARTS, ITERATIONS, RATE, SWEEPS, CANDIDATES = 2, 60, 0.3, 2, 8
Row = dict[str, Any]


def recalls(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(share of the distinct true tokens that were found, share of places) between [CLS] and [SEP].
    ``found`` (tries, tokens), ``truth`` (texts, tokens)."""
    inner, guessed = truth[:, 1:-1], found[:, 1:-1]
    distinct = set(inner.flatten().tolist())
    places = (inner[:, None] == guessed[None]).any(1).float().mean()
    return len(distinct & set(guessed.flatten().tolist())) / len(distinct), float(places)


def matching(target: Target, case: Case, ids: Tensor, labels: Tensor) -> Iterator[Row]:
    """Gradient matching on single texts."""
    texts = cut(ids, LENGTH)
    wanted = list(observed(target, case, texts, labels).values())
    found = optimised(target, case, wanted, texts, labels, 0)
    for i in range(len(ids)):
        share, places = recalls(found[i : i + 1], texts[i : i + 1])
        yield {"tokens": LENGTH, "batch": 1, "text": i, "set": share, "place": places}


def optimised(target: Target, case: Case, wanted: Sequence[Tensor], ids: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Token embeddings by gradient matching, decoded to the nearest tokens, then exchanged one by one."""
    n, length = ids.shape
    owner = torch.arange(n).repeat_interleave(RESTARTS)
    tree, goal = repeated(case.guess, owner), [w[owner] for w in wanted]
    begun = torch.randint(len(target.usable), (n * RESTARTS, length - 2), generator=stream(seed, "begin"))
    free = target.words[target.usable[begun]].clone().requires_grad_()
    first, last = (target.words[ids[owner, end]].detach()[:, None] for end in (0, -1))
    optimizer = torch.optim.Adam([free], lr=RATE * float(target.words.std()))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
    for _ in range(ITERATIONS):
        x = torch.cat([first, free, last], 1)
        loss = mismatch(target.gradients(tree, case.seen, x, labels[owner], again=True), goal)
        (free.grad,) = torch.autograd.grad(loss.sum(), [free])
        optimizer.step()
        decay.step()
    decoded = ids[owner].clone()
    decoded[:, 1:-1] = target.nearest(free.detach())
    scores = distances(target, case, owner, wanted, decoded, labels).view(n, RESTARTS)
    best = decoded.view(n, RESTARTS, length)[torch.arange(n), scores.argmin(1)]
    return exchanged(target, case, wanted, best, scores.amin(1), labels)


def exchanged(
    target: Target, case: Case, wanted: Sequence[Tensor], ids: Tensor, least: Tensor, labels: Tensor
) -> Tensor:
    """One token at a time becomes the best of those that the mismatch's slope recommends, if it is better."""
    every = torch.arange(len(ids))
    owner = every.repeat_interleave(CANDIDATES)
    for place in [*range(1, ids.shape[1] - 1)] * SWEEPS:
        x = target.words[ids].detach().requires_grad_()
        loss = mismatch(target.gradients(case.guess, case.seen, x, labels, again=True), wanted)
        slope = torch.autograd.grad(loss.sum(), x)[0][:, place]
        offered = target.usable[(slope @ target.words[target.usable].T).topk(CANDIDATES, largest=False).indices]
        tried = ids[owner].clone()
        tried[:, place] = offered.flatten()
        found, which = distances(target, case, owner, wanted, tried, labels).view(-1, CANDIDATES).min(1)
        ids = ids.clone()
        ids[:, place] = torch.where(found < least, offered[every, which], ids[:, place])
        least = torch.minimum(found, least)
    return ids


Test = tuple[Tensor | None, Tensor]
"""What an input of the first layer is mapped by (None: nothing), and orthonormal columns of the span it must be in."""


def tests(target: Target, case: Case, wanted: Mapping[str, Tensor], lane: int) -> list[Test]:
    """What the first layer's gradients say of its inputs x: rows of dA and dW are in the span of the x, those of dC in
    that of the A x, those of dB in that of the C A x."""
    found: list[Test] = []
    for name in case.seen:
        rows: list[Tensor] = []
        for site in (s for s in target.layers if ".layer.0." in s):
            gradient = wanted[f"{site}/{name}"][lane].double()
            rows.append(gradient / gradient.norm().clamp_min(1e-30))
            if name in ("B", "C"):
                own = {key: case.guess[f"{site}/{key}"][lane] for key in "AC" if f"{site}/{key}" in case.guess}
                found.append((own["C"] @ own["A"] if name == "B" and "C" in own else own["A"], basis(rows[-1])))
        if name in ("A", "W"):
            found.append((None, basis(torch.cat(rows))))
    return found


def spanned(target: Target, checks: Sequence[Sequence[Test]], length: int, tries: int) -> Tensor:
    """The usable tokens that are nearest to the spans, by place: (lanes, tries, length)."""
    found = torch.zeros(len(checks), tries, length, dtype=torch.int64)
    for place in range(length):
        x = target.module.encoder.embeddings(
            inputs_embeds=target.words[target.usable][:, None], position_ids=torch.tensor([[place]])
        )[:, 0]
        for lane, lanes_tests in enumerate(checks):
            outside = torch.zeros(len(x))
            for mapped, inside in lanes_tests:
                z = x if mapped is None else x @ mapped.T
                size = z.square().sum(1)
                outside += (size - (z @ inside).square().sum(1)) / size
            found[lane, :, place] = target.usable[outside.topk(tries, largest=False).indices]
    return found


def basis(rows: Tensor) -> Tensor:
    """Orthonormal columns that span the rows, as far as single precision tells."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right[sizes > 1e-5 * sizes[0].clamp_min(1e-30)].T.float()


def span_check(target: Target, case: Case, ids: Tensor, labels: Tensor) -> Iterator[Row]:
    """Single texts of several lengths; two and four short ones in a batch."""
    for batch, length in ((1, 6), (1, 8), (1, 16), (1, 24), (2, LENGTH), (4, LENGTH)):
        first = torch.arange(0, len(ids), batch)  # the texts of a batch have one owner
        texts = cut(ids, length)
        one = Case(case.name, case.layers, case.seen, repeated(case.tree, first), repeated(case.guess, first))
        keys = [key for key in one.tree if key.rpartition("/")[2] in one.seen]
        wanted = dict(
            zip(keys, target.gradients(one.tree, one.seen, target.words[texts].detach(), labels), strict=True)
        )
        with torch.no_grad():
            checks = [tests(target, one, wanted, lane) for lane in range(len(first))]
            found = spanned(target, checks, length, batch)
        for lane, start in enumerate(first.tolist()):
            share, places = recalls(found[lane], texts[start : start + batch])
            yield {"tokens": length, "batch": batch, "text": start, "set": share, "place": places}


def recognition(target: Target, case: Case, ids: Tensor, labels: Tensor, others: Sequence[Tensor]) -> Iterator[Row]:
    """Which of 64 texts was it: the one whose gradient, in the attacker's model, is nearest to what was seen."""
    texts = cut(ids, LENGTH)
    wanted = list(observed(target, case, texts, labels).values())
    for i in range(len(ids)):
        pool = cut(others[i * len(others) // len(ids)], LENGTH)
        drawn = pool[torch.randperm(len(pool), generator=stream(i, "pool"))[: POOL - 1]]
        candidates = torch.cat([texts[i : i + 1], drawn])
        scores = distances(target, case, torch.full((POOL,), i), wanted, candidates, labels)
        rank = 1 + int((scores[1:] < scores[0]).sum()) + int((scores[1:] == scores[0]).sum()) / 2
        yield {"tokens": LENGTH, "batch": 1, "text": i, "first": float(rank == 1), "rank": rank}


def guesses(target: Target, ids: Tensor, others: Sequence[Tensor]) -> Iterator[Row]:
    """Without any gradient: random tokens, and at each place the token that other texts have there most often."""
    for i, length in itertools.product(range(len(ids)), (6, 8, 16, 24)):
        truth, pool = cut(ids[i : i + 1], length), cut(others[i * len(others) // len(ids)], length)
        draw = torch.randint(len(target.usable), (1, length), generator=stream(i, length, "random"))
        inner = pool[:, 1:-1].flatten().bincount()
        often = functional.pad(inner.topk(length - 2).indices, (1, 1))[None]
        for name, found, by_place in (
            ("random tokens", target.usable[draw], target.usable[draw]),
            ("most frequent tokens", often, pool.mode(0).values[None]),
        ):
            share, places = recalls(found, truth)[0], recalls(by_place, truth)[1]
            yield {"case": name, "tokens": length, "batch": 1, "text": i, "set": share, "place": places}
