"""causal_conv1d_update: causal_conv1d on one or a few new tokens."""

from __future__ import annotations

from typing import Any

from . import _C


def causal_conv1d_update(
    x: Any,
    state: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    state_indices: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """One or a few steps of :func:`statescan.causal_conv1d`; `state` is updated in place.

    Args:
        x: [batch, dim] or [batch, ntokens, dim] float32, float16 or bfloat16 (float64 on the CPU), the new tokens.
        state: [slots, dim, width - 1] dtype of x or float32: the last inputs of each sequence, oldest first.
        weight: [dim, width] dtype of x or float32, width from 2 to 8.
        bias: [dim] dtype of weight.
        activation: "silu", or None.
        state_indices: [batch] int32 or int64, the slot of each row; -1 marks padding: y is zero and no state is touched.
            None: row i is slot i, and slots = batch. No slot may occur twice.
        out: array to write y to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.4.
    """
    return _C.causal_conv1d_update(x, state, weight, bias, activation, state_indices, out, stream)
