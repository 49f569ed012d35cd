"""Frames: what goes in comes out, bit for bit; what is no frame is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.federation.wire import TYPES, canonical, decode, encode, frame_size, same, tensors

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(TYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=g, dtype=torch.uint8)
    value = raw.view(dtype).reshape(shape)  # any bits, NaNs too
    return value.mT if len(shape) > 1 and draw(st.booleans()) else value


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=True) | st.text(max_size=8)
plain = st.recursive(
    scalars | tensor(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@quick
@given(plain)
def test_round_trip(value: Any) -> None:
    frame = encode(value)
    assert frame_size(value) == len(frame)
    assert same(decode(frame), value)
    assert encode(decode(frame)) == frame
    assert encode(canonical(value)) == frame
    assert all(t.is_contiguous() for t in tensors(canonical(value)))


@quick
@given(plain, st.data())
def test_damaged_frames_are_refused_or_read_as_something_else(value: Any, data: st.DataObject) -> None:
    """Never another error than ValueError, whatever arrives."""
    frame = bytearray(encode(value))
    cut = data.draw(st.integers(0, len(frame)))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (bytes(frame), bytes(frame[:cut]), bytes(frame) + b"x"):
        with contextlib.suppress(ValueError):
            decode(damaged)


@quick
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ValueError, match="not a frame"):
        decode(noise)


def framed(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


@pytest.mark.parametrize(
    "frame",
    [
        framed({}),  # no skeleton
        framed({"__metadata__": {"other": "1"}}),
        framed({"__metadata__": {"plain": "{"}}),
        framed({"__metadata__": {"plain": '{"t": 0}'}}),  # no such tensor
        framed({"__metadata__": {"plain": "[]"}, "0": ONE}, b"x"),  # nobody asks for it
        framed({"__metadata__": {"plain": '[{"t": 0}, {"t": 0}]'}, "0": ONE}, b"x"),  # twice
        framed({"__metadata__": {"plain": '{"m": 3}'}}),
        framed({"__metadata__": {"plain": '{"x": 3}'}}),
        framed({"__metadata__": {"plain": "[" * 100_000 + "]" * 100_000}}),
        framed({"__metadata__": {"plain": '{"t": 0}'}, "0": {**ONE, "shape": [2]}}, b"x"),
        framed({"__metadata__": {"plain": '{"t": 0}'}, "0": {**ONE, "dtype": "pickle"}}, b"x"),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_well_meant_nonsense_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match="not a frame"):
        decode(frame)


def test_a_frame_is_a_safetensors_file_with_aligned_data(tmp_path: Any) -> None:
    value = {"x": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "y": [torch.tensor(True), "text"]}
    frame = encode(value)
    assert (8 + int.from_bytes(frame[:8], "little")) % 8 == 0
    (tmp_path / "frame.safetensors").write_bytes(frame)
    with safetensors.safe_open(tmp_path / "frame.safetensors", "pt") as file:
        assert file.keys() == ["0", "1"]
        assert torch.equal(file.get_tensor("0"), value["x"])
        assert set(file.metadata()) == {"plain"}


def test_what_is_not_plain_does_not_travel() -> None:
    for value, reason in (
        ({1: "x"}, "text keys"),
        ({"x": {3}}, "set is not a plain value"),
        (len, "not a plain value"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
    ):
        with pytest.raises(TypeError, match=reason):
            encode(value)


def test_same() -> None:
    one = {"x": torch.tensor([1.0, float("nan")]), "y": [1, 2.0, None]}
    assert same(one, {"y": (1, 2.0, None), "x": one["x"].clone()})
    assert not same(one, {**one, "x": one["x"].double()})
    assert not same(1, 1.0)
    assert not same(True, 1)
    assert not same(torch.tensor(0.0), torch.tensor(-0.0))  # bit for bit
    assert same(torch.tensor(0.0), torch.tensor(1e-7), 1e-6)
    assert not same({"x": 1}, {"x": 1, "y": 1})


def test_decoded_tensors_are_private_and_canonical_ones_shared() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    decode(encode(value)).zero_()
    assert value.sum() == 15
    assert canonical({"x": value})["x"] is value
    assert canonical([value.T])[0].stride() == (2, 1)
