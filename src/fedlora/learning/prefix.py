"""Layers below the first adapter, computed once for each text: what they say of it never changes.

    hidden states before layer d, the lowest that has an adapter = a function of the text alone

A text is computed by itself, whatever batch it is in: so a run gives the same bits whichever texts were known before,
and a resumed run goes on as if it had not stopped. What has no room is computed each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Alone = Callable[[int], Tensor]
"""Row of a batch -> its hidden states (tokens, width)."""


@dataclass(eq=False)
class Prefix:
    """Hidden states before layer ``depth`` by the text's tokens and segments, in at most ``limit`` bytes; the oldest
    stay.

    >>> import torch
    >>> prefix = Prefix(depth=1, limit=16)
    >>> prefix.rows([b"a", b"b", b"a"], lambda row: torch.full((1, 2), float(row)))
    [tensor([[0., 0.]]), tensor([[1., 1.]]), tensor([[0., 0.]])]
    >>> prefix.size, prefix.rows([b"b", b"c"], lambda row: torch.full((1, 2), 7.0))
    (16, [tensor([[1., 1.]]), tensor([[7., 7.]])])
    >>> sorted(prefix.held)
    [b'a', b'b']
    """

    depth: int
    limit: int
    held: dict[bytes, Tensor] = field(default_factory=dict[bytes, Tensor])
    size: int = 0

    def rows(self, texts: Sequence[bytes], alone: Alone) -> list[Tensor]:
        """What is known of each text, or what ``alone`` says of it now, once for each."""
        found: dict[bytes, Tensor] = {}
        for row, text in enumerate(texts):
            if text not in found:
                found[text] = self.held[text] if text in self.held else self.keep(text, alone(row))
        return [found[text] for text in texts]

    def keep(self, text: bytes, value: Tensor) -> Tensor:
        """The value, kept where there is room."""
        bytes_ = value.numel() * value.element_size()
        if self.size + bytes_ <= self.limit:
            self.held[text] = value
            self.size += bytes_
        return value
