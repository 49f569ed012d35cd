"""Sequences without their padding: inside a known transformer's layers, the tokens of a batch lie one after another.

    (sequences, longest, width)  --pack-->  (tokens, 1, width)  --layers-->  (tokens, 1, width)  --unpack-->  as before

Linear layers, norms and activations see each token alone and need no change; attention is block-diagonal: on a CPU
queries, keys and values are gathered into a few blocks of sequences of like length, and the outputs gathered back; on a
GPU a kernel takes the sequences as they lie. What lies before the first layer (embeddings) and after the last (norm,
pooling, a language model's head) sees padded sequences as ever.
A token's result, and so every number that is not finite, depends on its own sequence alone (unless it is computed
together with others, which asks for finite numbers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fedlora.adapters.lora import Plan
from fedlora.learning import varlen
from fedlora.learning.blockwise import Blocks, blocks_of, rooms
from fedlora.learning.varlen import Ends

KNOWN = {
    name: layers
    for layers, names in {
        "layer": (
            "BertEncoder", "CamembertEncoder", "Data2VecTextEncoder", "ElectraEncoder", "RobertaEncoder",
            "XLMRobertaEncoder",
        ),
        "layers": (
            "BioGptModel", "CohereModel", "EuroBertModel", "GPTNeoXModel", "Gemma3TextModel", "GemmaModel", "GlmModel",
            "GraniteModel", "HeliumModel", "LlamaModel", "MistralModel", "ModernBertModel", "NomicBertModel",
            "OPTDecoder", "Olmo2Model", "OlmoModel", "PersimmonModel", "Phi3Model", "PhiModel", "Qwen2Model",
            "Qwen3Model", "SmolLM3Model", "Starcoder2Model",
        ),
        "h": ("GPT2Model",),
        "transformer.layer": ("DistilBertModel",),
    }.items()
    for name in names
}  # fmt: skip
"""Modules whose layers see each token alone except in attention, and the path in them of the list of these layers."""
GRAIN, FINE, FEW = 64, 32, 512
"""Tokens of a packed batch in bfloat16 are a multiple of the first, where they are few of the second: oneDNN compiles a
kernel for every number of tokens."""
NAME = "fedlora_packed"


@dataclass(frozen=True, eq=False)
class Packing:
    """Where tokens lie. ``shape``: (sequences, longest); ``source`` (T,): the padded position that each packed token is
    read from; ``back`` (sequences * longest,): the packed token that each padded position is read from, for padding the
    first of its sequence; ``starts``: where each sequence begins, and the end of the last; tokens beyond it belong to
    nobody (copies, whose results nothing reads). ``attention``: the sequences as attention takes them."""

    shape: tuple[int, int]
    source: Tensor
    back: Tensor
    starts: tuple[int, ...]
    attention: Blocks | Ends

    def pack(self, values: Tensor) -> Tensor:
        """(sequences or 1, longest, ...) -> (tokens, 1, ...)."""
        whole = values.expand(self.shape[0], *values.shape[1:]).flatten(0, 1)
        return whole.index_select(0, self.source).unsqueeze(1)

    def joined(self, rows: Sequence[Tensor]) -> Tensor:
        """What is packed of sequences (tokens, width) -> (tokens, 1, width)."""
        more = len(self.source) - self.starts[-1]
        return torch.cat([*rows, rows[0][:1].expand(more, -1)]).unsqueeze(1)

    def unpack(self, values: Tensor) -> Tensor:
        """(tokens, 1, width) -> (sequences, longest, width); nothing flows back through padding."""
        node: Any = _Unpack
        return node.apply(values.squeeze(1), self).unflatten(0, self.shape)

    def plan(self, plan: Plan) -> Plan:
        """What adapted layers do with tokens instead of rows."""
        starts = (*self.starts[:-1], len(self.source))  # the last lane has the copies, whose gradient is zero
        rows = np.repeat(np.arange(self.shape[0]), np.diff(starts))
        row = torch.from_numpy(rows).to(self.source.device)
        slots = {
            site: tuple(s if s.gate is None else replace(s, gate=s.gate[row]) for s in slots)
            for site, slots in plan.slots.items()
        }
        dense = {
            site: tuple(d if d.gate is None else replace(d, gate=d.gate[row]) for d in changes)
            for site, changes in plan.dense.items()
        }
        dropout = None if plan.dropout is None else replace(plan.dropout, keys=plan.dropout.keys[row])
        segments = tuple((lane, starts[first], starts[last]) for lane, first, last in plan.segments)
        return Plan(segments, slots, dense, plan.merged, dropout)


class _Unpack(torch.autograd.Function):
    """Forward and backward are one gather each: a scatter would add up what is never there."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return values.index_select(0, packing.back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packing: Packing = ctx.packing
        grad = grads[0].index_select(0, packing.source)
        grad[packing.starts[-1] :] = 0
        return grad, None


def packing(
    mask: Tensor, heads: int, dtype: torch.dtype, together: bool = False, by_ends: bool = False
) -> Packing | None:
    """How a batch is packed; None where its padding is not at the right. ``mask``: (sequences, longest), 1 where a
    token is; ``together``: see ``rooms``; ``by_ends``: for ``varlen``'s kernel, which needs no blocks.

    >>> found = packing(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]), 1, torch.float32)
    >>> found.source.tolist(), found.starts
    ([0, 1, 3, 6, 7, 8], (0, 2, 3, 6))
    """
    kept = mask.cpu().numpy().astype(bool)
    count, longest = kept.shape
    lengths = kept.sum(1)
    if not np.array_equal(kept, np.arange(longest) < lengths[:, None]) or not lengths.all():
        return None
    starts = np.concatenate([[0], lengths.cumsum()])
    source, back = np.flatnonzero(kept), starts[:-1, None] + np.where(kept, np.arange(longest), 0)
    if by_ends:
        attention = Ends(torch.from_numpy(starts.astype(np.int32)).to(mask.device), int(lengths.max()))
    else:
        more = filled(len(source), dtype) - len(source)
        source = np.concatenate([source, np.zeros(more, dtype=np.int64)])
        attention = blocks_of(rooms(lengths, dtype, together), starts, len(source), heads, mask.device)
    return Packing(
        (count, longest),
        torch.from_numpy(source).to(mask.device),
        torch.from_numpy(back.reshape(-1)).to(mask.device),
        tuple(starts.tolist()),
        attention,
    )


def packed_sizes(
    lengths: np.ndarray, dtype: torch.dtype, together: bool = False, by_ends: bool = False
) -> tuple[int, int]:
    """(tokens, scores) that are computed for sequences of some lengths, what fills up included; ``together``,
    ``by_ends``: see ``packing``.

    >>> packed_sizes(np.array([2, 1, 3]), torch.float32), packed_sizes(np.array([40, 50]), torch.bfloat16)
    ((6, 27), (96, 32768))
    """
    if by_ends:
        return int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
    shapes = [room.shape for room in rooms(lengths, dtype, together)]
    return filled(int(lengths.sum()), dtype), sum(rows * length**2 for rows, length in shapes)


def filled(tokens: int, dtype: torch.dtype) -> int:
    """So many tokens with those that fill up."""
    return tokens + (-tokens % (FINE if tokens < FEW else GRAIN) if dtype == torch.bfloat16 else 0)


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of a model that can be packed: ``path`` of their list in the model, the ``layers`` themselves, the
    number of ``heads`` of their queries, their ``size``, the ``window`` that attention looks back over (it is whole in
    sequences that are no longer), and the ``config`` that names their attention."""

    path: str
    layers: Sequence[nn.Module]
    heads: int
    size: int
    window: int
    config: Any

    def depth(self, sites: Iterable[str]) -> int:
        """The lowest layer that has one of the sites (0: there is none)."""
        numbers = [int(site.removeprefix(f"{self.path}.").split(".", 1)[0]) for site in sites]
        return min(numbers, default=0)

    def by_ends(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether attention takes sequences that lie end to end."""
        return varlen.agrees(device, dtype, self.size)

    def packing(self, mask: Tensor, dtype: torch.dtype, together: bool = False) -> Packing | None:
        """How a batch is packed for these layers: see ``packing``."""
        return packing(mask, self.heads, dtype, together, self.by_ends(mask.device, dtype))


def packable(module: nn.Module) -> Layers | None:
    """A model's layers, where it is known that they may be packed."""
    found = [(path, m) for path, m in module.named_modules() if type(m).__name__ in KNOWN]
    if len(found) != 1:
        return None
    path, stack = found[0]
    config: Any = stack.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if kinds - {"full_attention", "sliding_attention"} or not plain or capped:
        return None
    if getattr(config, "add_cross_attention", False):
        return None
    slides = "sliding_attention" in kinds if getattr(config, "layer_types", None) else True
    window = (getattr(config, "sliding_window", None) if slides else None) or sys.maxsize
    attribute = KNOWN[type(stack).__name__]
    prefix = f"{path}.{attribute}" if path else attribute
    layers: Any = stack.get_submodule(attribute)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Layers(prefix, list(layers), heads, size, window, config)


@dataclass(frozen=True, eq=False)
class Known:
    """Packed hidden states (tokens, 1, width) before layer ``depth``: the layers below need not be computed, and are
    only where ``whole`` asks for it (what they say is not used)."""

    depth: int
    hidden: Tensor
    whole: bool = False


class Reached(Exception):
    """A pass is at the layer that it was made for, with these hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def until(found: Layers, depth: int) -> Generator[None]:
    """A pass inside the block ends before layer ``depth``, as ``Reached``."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args[0])

    handle = found.layers[depth].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def below(
    found: Layers, depth: int, dtype: torch.dtype, inputs: Mapping[str, Tensor], call: Callable[[], Any]
) -> Tensor:
    """(tokens, width) what the layers below ``depth`` say of one text; ``call``: a pass of its inputs."""
    alone = found.packing(inputs["attention_mask"], dtype)
    assert alone is not None
    with torch.no_grad(), packed(found, alone), until(found, depth):
        try:
            call()
        except Reached as end:
            return end.hidden[: alone.starts[-1], 0].clone()
    raise AssertionError("a pass went beyond the layer that it was to end at")


def _as_it_came(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


@contextmanager
def packed(found: Layers, packing: Packing, known: Known | None = None) -> Generator[None]:
    """The layers see packed tokens inside the block, and what comes after them padded sequences."""

    depth = -1 if known is None else known.depth
    skipped = [] if known is None or known.whole else found.layers[:depth]

    def enter(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if number == 0:
                args = (packing.pack(args[0]), *args[1:])
            if known is not None and number == depth:
                args = (known.hidden, *args[1:])
            if kwargs.get("position_embeddings") is not None:
                kwargs = {
                    **kwargs,
                    "position_embeddings": tuple(packing.pack(value) for value in kwargs["position_embeddings"]),
                }
            return args, {**kwargs, "packing": packing}

        return hook

    def leave(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return packing.unpack(out)

    before = found.config._attn_implementation
    with ExitStack() as stack:
        for i, layer in enumerate(found.layers):
            stack.callback(layer.register_forward_pre_hook(enter(i), with_kwargs=True).remove)
        stack.callback(found.layers[-1].register_forward_hook(leave).remove)
        for layer in skipped:
            layer.forward = _as_it_came
            stack.callback(layer.__dict__.pop, "forward")
        found.config._attn_implementation = NAME
        try:
            yield
        finally:
            found.config._attn_implementation = before


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, packing: Packing, scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface: (tokens, heads, 1, size) each -> (tokens, 1, heads, size)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    config = getattr(module, "config", None)
    causal = bool(getattr(module, "is_causal", False) and getattr(config, "is_causal", True))  # as its masks have it
    query, key, value = (x.squeeze(2) for x in (query, key, value))
    return packing.attention.attend(query, key, value, scaling, causal).unsqueeze(1), None


AttentionInterface.register(NAME, _attention)
