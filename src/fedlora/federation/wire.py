"""Plain values (nested mappings and lists of tensors, numbers, text and None) to bytes and back; never pickle.

A frame is a valid safetensors file: the tensors are named "0", "1", ... in the order of a walk, and the metadata has
one key, "plain", with the value's skeleton as JSON: a mapping is ``{"m": {...}}``, a tensor ``{"t": index}``,
everything else itself. Equal values in equal order have equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode(plain: Any) -> bytes:
    """The frame of a plain value; anything else is a TypeError."""
    header, found = _layout(plain)
    return b"".join([header, *(_raw(value) for value in found)])


def frame_size(plain: Any) -> int:
    """``len(encode(plain))``, without touching the tensors' data."""
    tree: Mapping[str, Any] = cast(Mapping[str, Any], plain) if isinstance(plain, Mapping) else {}
    if tree and all(type(value) is Tensor for value in tree.values()):
        return _tree_size(tuple((key, value.dtype, value.shape) for key, value in tree.items()))
    header, found = _layout(plain)
    return len(header) + sum(value.numel() * value.element_size() for value in found)


@lru_cache(maxsize=256)
def _tree_size(entries: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> int:
    """The same of a flat tree: all clients' are alike, and writing a header takes longer than comparing it."""
    header, found = _layout({key: torch.empty(shape, dtype=dtype, device="meta") for key, dtype, shape in entries})
    return len(header) + sum(value.numel() * value.element_size() for value in found)


def decode(frame: bytes) -> Any:
    """The inverse of ``encode`` (tuples come back as lists); bytes that are no frame are a ValueError.

    >>> decode(encode({"x": [torch.ones(2), 3, None]}))
    {'x': [tensor([1., 1.]), 3, None]}
    """
    try:
        found = safetensors.torch.load(frame)
        header = json.loads(frame[8 : 8 + int.from_bytes(frame[:8], "little")])
        skeleton = json.loads(header["__metadata__"]["plain"])
        value = _build(skeleton, found)
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as problem:
        raise ValueError(f"not a frame of plain values: {problem}") from problem
    if found:
        raise ValueError(f"not a frame of plain values: nothing refers to the tensors {sorted(found)}")
    return value


def canonical(plain: Any) -> Any:
    """The value as ``decode(encode(plain))`` gives it, but sharing the tensors that lie flat in memory already.

    Kernels round differently on a transposed view: what a peer or a resumed run would get from bytes is what everybody
    computes with.
    """
    if isinstance(plain, Tensor):
        return plain.contiguous()
    if isinstance(plain, Mapping):
        children = cast(Mapping[str, Any], plain).items()  # mostly tensors, and many
        return {key: child.contiguous() if type(child) is Tensor else canonical(child) for key, child in children}
    if isinstance(plain, (list, tuple)):
        return [canonical(child) for child in cast(list[Any], plain)]
    return plain


def tensors(plain: Any) -> Iterator[Tensor]:
    """Every tensor in a plain value, in the order of the frame."""
    if isinstance(plain, Tensor):
        yield plain
    elif isinstance(plain, Mapping):
        for child in cast(Mapping[str, Any], plain).values():
            yield from tensors(child)
    elif isinstance(plain, (list, tuple)):
        for child in cast(list[Any], plain):
            yield from tensors(child)


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Equal structure, types and values: bit for bit, or within an absolute tolerance. Mappings have no order."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool((a - b).abs().le(tolerance).all()) if tolerance else torch.equal(_bits(a), _bits(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        one, two = cast(Mapping[str, Any], a), cast(Mapping[str, Any], b)
        return one.keys() == two.keys() and all(same(value, two[key], tolerance) for key, value in one.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        xs, ys = cast(list[Any], a), cast(list[Any], b)
        return len(xs) == len(ys) and all(same(x, y, tolerance) for x, y in zip(xs, ys))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= tolerance or (a != a and b != b)
    return cast(Any, a).__class__ is type(b) and bool(a == b)


def _bits(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _raw(value: Tensor) -> Any:
    """The data as a buffer; not copied where it lies flat in memory."""
    return _bits(value).numpy() if value.numel() else b""


def _layout(plain: Any) -> tuple[bytes, list[Tensor]]:
    """The header with its length, padded to 8 bytes, and the tensors that follow it."""
    found: list[Tensor] = []
    skeleton = _skeleton(plain, found)
    header: dict[str, Any] = {"__metadata__": {"plain": json.dumps(skeleton, separators=(",", ":"))}}
    start = 0
    for index, value in enumerate(found):
        end = start + value.numel() * value.element_size()
        header[str(index)] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, found


def _skeleton(node: Any, found: list[Tensor]) -> Any:
    if isinstance(node, Tensor):
        if node.dtype not in TYPES:
            raise TypeError(f"tensors of type {node.dtype} do not travel")
        found.append(node)
        return {"t": len(found) - 1}
    if isinstance(node, Mapping):
        children = cast(Mapping[Any, Any], node)
        if wrong := [key for key in children if not isinstance(key, str)]:
            raise TypeError(f"a plain mapping has text keys, not {wrong[0]!r}")
        return {"m": {key: _skeleton(child, found) for key, child in children.items()}}
    if isinstance(node, (list, tuple)):
        return [_skeleton(child, found) for child in cast(list[Any], node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{type(node).__name__} is not a plain value: use mappings, lists, tensors, numbers and text")


def _build(node: Any, found: dict[str, Tensor]) -> Any:
    """The value of a skeleton; takes its tensors out of ``found``, each once."""
    if isinstance(node, list):
        return [_build(child, found) for child in cast(list[Any], node)]
    if not isinstance(node, dict):
        return node
    content = cast(dict[str, Any], node)
    if content.keys() == {"t"}:
        return found.pop(str(content["t"]))
    if content.keys() == {"m"}:
        return {key: _build(child, found) for key, child in content["m"].items()}
    raise KeyError(f"unknown node {sorted(content)}")
