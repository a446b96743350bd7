"""causal_conv1d for torch: the depthwise causal convolution and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Op, Results


def _results(a: SimpleNamespace) -> Results:
    sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    return {
        "y": (a.x.shape, a.x.dtype),
        "final_state": ((sequences, a.x.shape[2], a.weight.shape[1] - 1), a.x.dtype),
    }


_OP = Op(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? initial_state, bool return_final_state, "
    "Tensor? cu_seqlens, bool reverse",
    results=_results,
    asked={"y": None, "final_state": "return_final_state"},
    backward="x weight dy bias activation initial_state cu_seqlens reverse dfinal_state",
    gradients="x weight bias initial_state",
    narrow="x",
    wide="weight bias initial_state",
    laid_out="x",
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution: ``y[t,d] = act(bias[d] + sum_k weight[d,k] x[t-width+1+k, d])``.

    :func:`statescan.causal_conv1d` with a gradient for every tensor but cu_seqlens, through y and the final state.

    Args:
        x: [batch, seqlen, dim] float32, float16 or bfloat16 (float64 on the CPU), any strides.
        weight: [dim, width] dtype of x or float32, width from 2 to 8.
        bias: [dim] dtype of weight.
        activation: "silu", or None.
        initial_state: [batch or num_sequences, dim, width - 1] dtype of x or float32, oldest first; zero when None.
        return_final_state: also return the last width - 1 inputs.
        cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one.
        reverse: the mirrored convolution, from the last token to the first.

    Returns:
        y, shaped and typed as x; with return_final_state the pair (y, final_state), the state in the dtype of x.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.causal_conv1d`; a second derivative is not implemented.

    Under autocast x takes its dtype; weight, bias and initial_state are float32.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.4.
    """
    return _OP.call((x, weight, bias, activation, initial_state, return_final_state, cu_seqlens, reverse))
