"""Gradient checkpointing: layers keep their inputs alone, and are computed again when gradients flow back.

A pass of L layers holds L inputs and one layer's activations instead of L layers' activations, for one forward pass
more (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.errors import UserError

CACHES = ("past_key_values", "layer_past")
"""What a layer would write a second time when it is computed again."""


def checkpointable(module: nn.Module, name: str) -> list[nn.Module]:
    """The layers of a model that transformers itself would checkpoint; UserError where it has none.

    >>> from fedlora.learning.sources import load_model, minilm_folder
    >>> model, _ = load_model(str(minilm_folder()), "minilm", "text-classification", ["a", "b"], "mean")
    >>> len(checkpointable(model, "minilm"))
    6
    """
    if found := _outermost(module):
        return found
    raise UserError(
        f"[engine] checkpointing: {name} has no layers that transformers knows how to compute again",
        "leave it out for this model",
    )


def _outermost(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


@contextmanager
def checkpointed(layers: Sequence[nn.Module], again: Callable[[], AbstractContextManager[None]]) -> Generator[None]:
    """A pass inside the block keeps what enters these layers only. ``again``: what surrounded the pass, for the time
    when a layer is computed once more, after the block. Layers whose forward is replaced already stay as they are."""
    with ExitStack() as stack:
        for layer in layers if torch.is_grad_enabled() else ():
            if "forward" not in vars(layer):
                layer.forward = partial(_twice, layer.forward, again)
                stack.callback(vars(layer).pop, "forward")
        yield


def _twice(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> Any:
    kwargs |= dict.fromkeys(kwargs.keys() & set(CACHES))
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # dropout follows from keys, not from a stream
        context_fn=lambda: (nullcontext(), again()),
        **kwargs,
    )


@contextmanager
def surrounded(
    module: nn.Module,
    replaced: Mapping[str, Tensor],
    attention: Sequence[tuple[Any, Any]],
    more: Sequence[Callable[[], AbstractContextManager[None]]],
) -> Generator[None]:
    """What was around a layer in its pass: replaced parameters, the attention that configurations named, and ``more``:
    prepacked layers, adapters."""
    now = [(config, config._attn_implementation) for config, _ in attention]
    try:
        for config, name in attention:
            config._attn_implementation = name
        with ExitStack() as stack:
            for one in more:
                stack.enter_context(one())
            stack.enter_context(_reparametrize_module(module, dict(replaced)))
            yield
    finally:
        for config, name in now:
            config._attn_implementation = name
