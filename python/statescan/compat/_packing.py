"""seq_idx, the peers' way to say that a row holds several sequences, as statescan's packed sequences."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The sequences of a batch, laid on one axis row after row."""

    cu_seqlens: Tensor  # [num_sequences + 1] int32
    first: Tensor  # [batch] the first sequence of each row
    last: Tensor  # [batch] the last
    padding: Tensor | None  # [batch, seqlen] bool: tokens with a negative index; None when there are none

    def pack(self, tensor: Tensor | None) -> Tensor | None:
        """[batch, seqlen, ...] as [1, batch * seqlen, ...]: a view where the strides allow one (as for a slice of the channels
        of a contiguous tensor), otherwise a copy."""
        return None if tensor is None else tensor.reshape(1, -1, *tensor.shape[2:])

    def initial(self, states: Tensor | None) -> Tensor | None:
        """The state of each row goes to its first sequence; the others start from zero."""
        if states is None:
            return None
        zeros = states.new_zeros(self.cu_seqlens.shape[0] - 1, *states.shape[1:])
        return zeros.index_copy(0, self.first, states)

    def final(self, states: Tensor) -> Tensor:
        """The state of each row is that of its last sequence."""
        return states.index_select(0, self.last)


_latest: tuple[weakref.ref, int, Packing] | None = None  # all layers of a model get the same seq_idx


def packing_of(seq_idx: Tensor | None, name: str, batch: int, seqlen: int) -> Packing | None:
    """The sequences that seq_idx [batch, seqlen] tells apart: each change of the index within a row starts one.

    On a GPU the host waits for their number; a call with the same tensor again does not.
    """
    global _latest
    if seq_idx is None:
        return None
    if seq_idx.shape != (batch, seqlen):
        raise ValueError(f"{name}: seq_idx has shape {tuple(seq_idx.shape)}; expected (batch, seqlen) = {(batch, seqlen)}")
    if batch == 0 or seqlen == 0:
        return None
    remembered = not (seq_idx.is_inference() or torch.compiler.is_compiling())
    version = seq_idx._version if remembered else -1
    if remembered and _latest is not None and _latest[0]() is seq_idx and _latest[1] == version:
        return _latest[2]
    with torch.no_grad():
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        torch.ne(seq_idx[:, 1:], seq_idx[:, :-1], out=starts[:, 1:])
        negative = seq_idx < 0
        bounds = torch.nn.functional.pad(starts.flatten(), (0, 1), value=True)
        count = starts.sum(1)
        last = count.cumsum(0) - 1
        packing = Packing(
            bounds.nonzero().flatten().to(torch.int32), last - count + 1, last, negative if bool(negative.any()) else None
        )
    if remembered:
        _latest = (weakref.ref(seq_idx), version, packing)
    return packing
