"""selective_state_update for torch: a scan on one or a few new tokens."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Results, Update


def _results(a: SimpleNamespace) -> Results:
    return {"y": (a.x.shape, a.x.dtype)}


_OP = Update(
    "selective_state_update",
    "Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, float[]? dt_limit, Tensor? state_indices, Tensor? out_state_indices",
    results=_results,
    narrow="x B C z",
    wide="A D dt_bias",
    constant="B C",
)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    state_indices: Tensor | None = None,
    out_state_indices: Tensor | None = None,
) -> Tensor:
    """One or a few steps of a scan: ``h = exp(dt A) h + dt B x``, ``y = C·h + D x``, then the gate; `state` changes in place.

    :func:`statescan.selective_state_update`, also under torch.compile and torch.export. No gradient. The rank of `state`
    tells the model: Mamba-1 as :func:`statescan.torch.selective_scan`, Mamba-2 as :func:`statescan.torch.ssd_scan`.

    Args:
        state: [slots, dim, dstate] or [slots, nheads, headdim, dstate], float32, float16 or bfloat16 (complex64 with a
            complex A).
        x: [batch, dim] or [batch, nheads, headdim], with an axis of tokens after batch for several; float32, float16 or
            bfloat16 (float64 on the CPU).
        dt: [batch, dim] or [batch, nheads], with the token axis of x.
        A: [dim, dstate] float32 or complex64, or [nheads] float32.
        B, C: [batch, ngroups, dstate] with the token axis of x, dtype of x; for Mamba-1 also [dim, dstate].
        D: [dim], or [nheads] or [nheads, headdim], float32.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [dim] or [nheads] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        state_indices, out_state_indices: [batch] int32 or int64, the slot that each row reads and the one that it writes, -1
            for none; None: row i is slot i, and what it read.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.selective_state_update`; TypeError for a tensor that
            requires grad while gradients are enabled.

    Source: Gu & Dao 2023 (arXiv:2312.00752), section 3; Dao & Gu 2024 (arXiv:2405.21060), equation 16.
    """
    return _OP.call((state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state_indices, out_state_indices))
