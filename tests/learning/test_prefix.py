"""What lower layers say is kept: the same numbers as without, the same bits whatever was known, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedlora
from fedlora.learning.backbone import Backbone
from fedlora.learning.flops import Counter
from fedlora.learning.loading import load_backbone
from learning.test_packing import LENGTHS, apart, batch, gated, qwen, roberta
from learning.worlds import LABELS, bert
from study import tiny

ROOM = 1 << 30
ADAPTER = "adapters/global/adapter_model.safetensors"
Found = tuple[torch.Tensor, ...]


def upper(kind: str, dtype: torch.dtype = torch.float64) -> Backbone:
    """Adapters in the upper of two layers only."""
    if kind == "qwen2":
        return load_backbone(qwen(), "causal-lm", layers=[1], dtype=dtype)
    module = bert() if kind == "bert" else roberta()
    return load_backbone(module, "text-classification", labels=LABELS, layers=[1], dtype=dtype)


def outcome(base: Backbone, rows: slice | None = None) -> Found:
    """Features (and logits) and, for the whole batch, the gradients of what is trained."""
    inputs = batch()
    if rows is not None:
        with torch.no_grad():
            features, logits = base.forward({name: value[rows] for name, value in inputs.items()})
        return (features,) if logits is None else (features, logits)
    plan, leaves = gated(base)
    features, logits = base.forward(inputs, plan)
    real = () if logits is None else (logits[inputs["attention_mask"].bool()],)
    out = torch.cat([part.flatten() for part in (features, *real)])
    return (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))


def lower_calls(base: Backbone) -> list[int]:
    """Grows by the tokens that the lower layer computes, whenever it does."""
    seen: list[int] = []
    layer = next(m for name, m in base.module.named_modules() if name.endswith(("layer.0", "layers.0")))
    inner = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
    inner.register_forward_hook(lambda _, args, __: seen.append(args[0].numel() // args[0].shape[-1]))
    return seen


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen2"])
def test_numbers_are_those_of_whole_passes(kind: str) -> None:
    plain, keeping = upper(kind), upper(kind)
    keeping.remember(ROOM)
    wanted = outcome(plain)
    for _ in range(2):
        found = outcome(keeping)
        assert apart(found, wanted) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_what_was_known(dtype: torch.dtype) -> None:
    fresh, warm, small = (upper("bert", dtype) for _ in range(3))
    fresh.remember(ROOM)
    warm.remember(ROOM)
    small.remember(2000)  # hardly any text has room
    outcome(warm, slice(1, 5))
    outcome(warm, slice(0, 2))
    for base in (warm, small):
        for mine, other in zip(outcome(base), outcome(fresh)):
            assert torch.equal(mine, other)


def test_a_text_is_computed_once() -> None:
    base = upper("bert")
    base.remember(ROOM)
    seen = lower_calls(base)
    outcome(base)
    assert sorted(seen) == sorted(LENGTHS)
    outcome(base)
    outcome(base, slice(2, 6))
    assert len(seen) == len(LENGTHS)


def test_the_same_tokens_in_other_segments_are_another_text() -> None:
    plain, keeping = upper("bert"), upper("bert")
    keeping.remember(ROOM)
    ids = torch.tensor([[5, 6, 7, 8]] * 3)
    types = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    with torch.no_grad():
        found, wanted = (base.forward(inputs)[0] for base in (keeping, plain))
    torch.testing.assert_close(found, wanted)
    assert keeping._prefix is not None
    assert len(keeping._prefix.held) == 2


def test_memory_has_a_bound() -> None:
    base = upper("bert")
    base.remember(10_000)
    outcome(base)
    prefix = base._prefix
    assert prefix is not None
    assert prefix.held
    assert prefix.size == sum(value.numel() * value.element_size() for value in prefix.held.values()) <= 10_000
    assert all(value.untyped_storage().nbytes() == value.numel() * 8 for value in prefix.held.values())


def test_what_is_replaced_is_not_read_from_memory() -> None:
    base = upper("bert")
    base.remember(ROOM)
    before = outcome(base, slice(0, 3))[0]
    path = next(path for path in base._actual if "layer.0" in path and path.endswith("query.weight"))
    other = torch.zeros_like(base.parameter(path))
    inputs = {name: value[:3] for name, value in batch().items()}
    with torch.no_grad():
        given, _ = base.forward(inputs, overrides={path: other})
        with base.replaced({path: other}):
            inside, _ = base.forward(inputs)
    torch.testing.assert_close(given, inside)
    assert float((given - before).norm()) > 1e-6
    assert torch.equal(outcome(base, slice(0, 3))[0], before)


def test_another_type_forgets() -> None:
    base = upper("bert")
    base.remember(ROOM)
    outcome(base)
    base.to(torch.float32)
    assert outcome(base, slice(0, 2))[0].dtype == torch.float32


def test_nothing_is_kept_where_the_lowest_layer_is_adapted() -> None:
    base = load_backbone(bert(), "text-classification", labels=LABELS, dtype=torch.float64)
    base.remember(ROOM)
    assert base._prefix is None


def test_whoever_counts_operations_sees_them_all() -> None:
    plain, keeping = upper("bert"), upper("bert")
    keeping.remember(ROOM)
    outcome(keeping)
    counts: list[int] = []
    for base in (plain, keeping):
        with Counter() as counter:
            outcome(base)
        counts.append(counter.total)
    assert counts[0] == counts[1] > 0


def test_a_run_with_it_scores_the_same_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    file = tiny.run_file(tmp_path, adapter="layers = [-1]\nrank = 2\n")
    plain = fedlora.run(file, out=tmp_path / "plain")
    engine = {"prefix": ROOM}
    kept = fedlora.run(file, out=tmp_path / "kept", engine=engine)
    assert kept.summary["flops"] == plain.summary["flops"]
    one, other = (load_file(tmp_path / run / ADAPTER) for run in ("plain", "kept"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    total = kept.summary["rounds"]
    fedlora.run(file, out=tmp_path / "cut", engine=engine, training={"rounds": 1})
    fedlora.resume(tmp_path / "cut", rounds=total)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "kept" / ADAPTER).read_bytes()
