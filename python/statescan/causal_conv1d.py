"""causal_conv1d: the depthwise causal convolution before a Mamba scan."""

from __future__ import annotations

from typing import Any

from . import _C


def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    reverse: bool = False,
    out: Any = None,
    final_state_out: Any = None,
    stream: Any = None,
) -> Any:
    """Depthwise causal convolution: ``y[t,d] = act(bias[d] + sum_k weight[d,k] x[t-width+1+k, d])``.

    Args:
        x: [batch, seqlen, dim] float32, float16 or bfloat16 (float64 on the CPU). Any strides: a channels-first tensor is
            passed as its transposed view.
        weight: [dim, width] dtype of x or float32, width from 2 to 8.
        bias: [dim] dtype of weight.
        activation: "silu", or None.
        initial_state: [batch, dim, width - 1] dtype of x or float32: the inputs before the first token, oldest first; zero
            when None. With cu_seqlens its first axis counts sequences.
        return_final_state: also return the last width - 1 inputs, oldest first.
        cu_seqlens: [num_sequences + 1] int32 or int64: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1] of a batch of
            one. Rows past the last entry are zero.
        reverse: the mirrored convolution, from the last token to the first; states then hold the first inputs, farthest
            first.
        out, final_state_out: arrays to write the results to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x; with return_final_state (or final_state_out) the pair (y, final_state).

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.4.
    """
    return _C.causal_conv1d(
        x, weight, bias, activation, initial_state, return_final_state, cu_seqlens, reverse, out, final_state_out, stream
    )


def causal_conv1d_backward(
    x: Any,
    weight: Any,
    dy: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    reverse: bool = False,
    dfinal_state: Any = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`causal_conv1d`, given dy (shaped as y) and, if the final state was used, dfinal_state.

    Args:
        x, weight, bias, activation, initial_state, cu_seqlens, reverse, stream: as in the forward.
        dy: gradient of y, shaped and typed as x.
        dfinal_state: gradient of final_state, or None for zero.

    Returns:
        (dx, dweight, dbias, dinitial_state), each shaped and typed as what it differentiates, None for what was not given.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`causal_conv1d`.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.4.
    """
    return _C.causal_conv1d_backward(
        x, weight, dy, bias, activation, initial_state, cu_seqlens, reverse, dfinal_state, stream
    )
