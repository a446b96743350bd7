"""causal_conv1d_update for torch: the convolution on one or a few new tokens."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Results, Update


def _results(a: SimpleNamespace) -> Results:
    return {"y": (a.x.shape, a.x.dtype)}


_OP = Update(
    "causal_conv1d_update",
    "Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, str? activation, Tensor? state_indices",
    results=_results,
    narrow="x",
    wide="weight bias",
)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One or a few steps of :func:`statescan.torch.causal_conv1d`; `state` is updated in place.

    :func:`statescan.causal_conv1d_update`, also under torch.compile and torch.export. No gradient.

    Args:
        x: [batch, dim] or [batch, ntokens, dim] float32, float16 or bfloat16 (float64 on the CPU), the new tokens.
        state: [slots, dim, width - 1] dtype of x or float32: the last inputs of each sequence, oldest first.
        weight: [dim, width] dtype of x or float32, width from 2 to 8.
        bias: [dim] dtype of weight.
        activation: "silu", or None.
        state_indices: [batch] int32 or int64, the slot of each row, -1 for padding; None: row i is slot i.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.causal_conv1d_update`; TypeError for a tensor that
            requires grad while gradients are enabled.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.4.
    """
    return _OP.call((x, state, weight, bias, activation, state_indices))
