"""mamba_ssm.ops.triton.selective_state_update: one decode step of the scans."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch as ops
from ..torch._op import wants_gradient
from ._arguments import as_input, as_parameter

__all__ = ["selective_state_update"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step, by :func:`statescan.selective_state_update`; state is updated in place.

    Args:
        state: [batch, dim, dstate] (Mamba-1), or [batch, nheads, dim, dstate].
        x, z: [batch, dim] or [batch, nheads, dim].
        dt: as x. A: [dim, dstate] or [nheads, dim, dstate]. D, dt_bias: [dim] or [nheads, dim]. Where dt, A and dt_bias are
            expanded from one value a head, the step is that of Mamba-2.
        B, C: [batch, dstate] or [batch, ngroups, dstate].
        state_batch_indices: [batch] integers, the row of state that each row of x uses; a negative index is padding, whose
            output is zero.

    Returns:
        out, shaped and typed as x.

    Differs from mamba-ssm: where an input requires a gradient it gets one, through this step (the state counts as a
    constant).
    """
    if B.dim() == 2:
        B, C = B[:, None], C[:, None]
    if not A.is_complex():
        B, C = as_input(B, x), as_input(C, x)
    z = as_input(z, x)
    states = state
    if state.dim() == 4:
        if _one_value_a_head(A, 2) and _one_value_a_head(dt, 1) and (dt_bias is None or _one_value_a_head(dt_bias, 1)):
            dt, A = dt[..., 0], A[:, 0, 0]
            dt_bias = None if dt_bias is None else dt_bias[:, 0]
            if D is not None and _one_value_a_head(D, 1):
                D = D[:, 0]
        else:  # a step of its own for each channel: Mamba-1 with nheads * dim channels
            shape = x.shape
            states = state.flatten(1, 2)
            x, dt, z = x.flatten(1), dt.flatten(1), None if z is None else z.flatten(1)
            A, D, dt_bias = A.flatten(0, 1), *(None if t is None else t.flatten() for t in (D, dt_bias))
            out = _step(states, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
            if states.data_ptr() != state.data_ptr():  # flattened by a copy
                state.copy_(states.view_as(state))
            return out.view(shape)
    return _step(states, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def _one_value_a_head(tensor: Tensor, axes: int) -> bool:
    return all(tensor.shape[axis] == 1 or tensor.stride(axis) == 0 for axis in range(-axes, 0))


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
) -> Tensor:
    A, D, dt_bias = A if A.is_complex() else as_parameter(A, x), as_parameter(D, x), as_parameter(dt_bias, x)
    options = dict(D=D, dt_bias=dt_bias, dt_softplus=bool(dt_softplus))
    if not wants_gradient(x, dt, A, B, C, D, z, dt_bias):
        if indices is None:
            state = state[: x.shape[0]]
        else:
            indices = indices.clamp(min=-1)
        return ops.selective_state_update(state, x, dt, A, B, C, z=z, state_indices=indices, **options)
    rows = torch.arange(x.shape[0], device=x.device) if indices is None else (indices >= 0).nonzero().flatten()
    slots = rows if indices is None else indices[rows].long()
    scan = ops.selective_scan if state.dim() == 3 else ops.ssd_scan
    tokens = [None if t is None else t[rows][:, None] for t in (x, dt, B, C, z)]
    y, after = scan(
        tokens[0], tokens[1], A, tokens[2], tokens[3], z=tokens[4], initial_state=state.detach()[slots],
        return_final_state=True, **options,
    )  # fmt: skip
    state[slots] = after.detach().to(state.dtype)
    return torch.zeros_like(x).index_copy(0, rows, y[:, 0])
