"""Which layers of a model are adapted, and putting the adapted layers in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fedlora.adapters.lora import LaneLinear, sizes
from fedlora.errors import UserError

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "value", "q_proj", "v_proj")  # vision models changed their spelling between versions
AUTO: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "vit", "deit", "beit", "dinov2", "data2vec-text"),
        _BERT,
    ),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
    "modernbert": ("Wqkv", "Wo"),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo",
            "olmo2",
            "stablelm",
        ),
        _LLAMA,
    ),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    **dict.fromkeys(("clip", "clip_vision_model", "siglip", "siglip_vision_model"), ("q_proj", "v_proj")),
    "swinv2": ("query", "value"),
}
"""What ``targets = "auto"`` means, by the model's type; any other type: every linear layer but the head."""
_HEADS = ("lm_head", "classifier", "score", "head", "embed_out", "pre_classifier", "out_head")


def candidates(model: nn.Module, head: str | None = None) -> dict[str, nn.Module]:
    """Linear-like layers by path, without the head (the layers under ``head``, or of a head's usual name)."""
    found: dict[str, nn.Module] = {}
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in _modules(model):
        first = path.split(".", 1)[0]
        excluded = first in _HEADS or module is output or (head is not None and f"{path}.".startswith(f"{head}."))
        if not excluded and _linear_like(module):
            found[path] = module
    return found


def select(
    model: nn.Module,
    targets: str | Sequence[str] = "auto",
    layers: Sequence[int] | None = None,
    head: str | None = None,
) -> dict[str, nn.Module]:
    """The layers to adapt, by path.

    ``targets``: "auto", or patterns (none: no layer); a pattern is a path, its last part(s), a glob or a regular
    expression of the whole path. ``layers``: block numbers, negative ones from the end. A pattern or a block that
    matches nothing is a ``UserError`` that lists what there is.
    """
    if not targets:
        return {}
    found = candidates(model, head)
    patterns = auto(model) if targets == "auto" else (targets,) if isinstance(targets, str) else tuple(targets)
    if patterns is None or (targets == "auto" and not any(matches(p, path) for p in patterns for path in found)):
        chosen = dict(found)
    else:
        unmatched = [p for p in patterns if targets != "auto" and not any(matches(p, path) for path in found)]
        if unmatched:
            raise UserError(
                f"[adapter] targets: {unmatched[0]!r} matches no linear layer of this {type(model).__name__}",
                f"choose among {', '.join(sorted({path.rsplit('.', 1)[-1] for path in found}))} (or full paths, globs)",
            )
        chosen = {path: module for path, module in found.items() if any(matches(p, path) for p in patterns)}
    if layers is not None:
        chosen = _restricted(chosen, layers)
    if not chosen:
        raise UserError(f"this {type(model).__name__} has no linear layer to adapt", "name [adapter] targets")
    return chosen


def auto(model: nn.Module) -> tuple[str, ...] | None:
    """The default patterns of the model's architecture; None: all linear layers.

    A wrapper answers for the encoder that it wraps.
    """
    config: Any = getattr(model, "config", None)
    inner: Any = getattr(config, "encoder", None)
    if getattr(inner, "model_type", None):
        config = inner
    kind = str(getattr(config, "model_type", ""))
    if kind == "deberta-v2" and getattr(config, "share_att_key", False):
        return ("value_proj",)  # queries and keys read the table of positions too, which is no example's
    return AUTO.get(kind)


def matches(pattern: str, path: str) -> bool:
    """A path, its ending, a glob, or a regular expression of the whole path.

    >>> path = "encoder.layer.3.attention.self.query"
    >>> [matches(p, path) for p in ("query", "self.query", "*.3.*query", r".*layer\\.[0-3]\\..*", "uery", "key")]
    [True, True, True, True, False, False]
    """
    if path == pattern or path.endswith(f".{pattern}") or fnmatchcase(path, pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False


def inject(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, LaneLinear]:
    """Puts a LaneLinear in the place of every target; site names are the paths."""
    wrapped: dict[str, LaneLinear] = {}
    for path, base in targets.items():
        parent, _, name = path.rpartition(".")
        wrapped[path] = LaneLinear(base, path)
        setattr(model.get_submodule(parent), name, wrapped[path])
    return wrapped


def remove(model: nn.Module) -> None:
    """The inverse of ``inject``: the bases return to their places."""
    for path, module in _modules(model):
        if isinstance(module, LaneLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base)


def norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of normalisation layers by their path (LayerNorm, RMSNorm, BatchNorm, ...)."""
    return _owned(model, _is_norm)


def embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of embedding tables by their path."""
    return _owned(model, _is_embedding)


def _owned(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, module in _modules(model)
        if wanted(module)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    untyped: Any = model  # torch's annotation says less
    return list(untyped.named_modules())


def _linear_like(module: nn.Module) -> bool:
    if isinstance(module, LaneLinear) or not hasattr(module, "weight"):
        return False
    if "router" in type(module).__name__.lower():  # of experts: some are nn.Linear by type, and return a choice
        return False
    try:
        sizes(module)
    except TypeError:
        return False
    return True


def _restricted(chosen: Mapping[str, nn.Module], layers: Sequence[int]) -> dict[str, nn.Module]:
    numbers = {path: int(m.group(1)) for path in chosen if (m := re.search(r"(?:^|\.)(\d+)(?:\.|$)", path))}
    count = max(numbers.values(), default=-1) + 1
    wanted = {layer + count if layer < 0 else layer for layer in layers}
    if missing := sorted(wanted - set(numbers.values())):
        raise UserError(
            f"[adapter] layers: no adapted layer in block {missing[0]}",
            f"the model's blocks are {sorted(set(numbers.values()))}",
        )
    return {path: module for path, module in chosen.items() if numbers.get(path) in wanted}
