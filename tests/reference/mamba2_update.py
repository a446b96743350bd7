import numpy as np

from .mamba2_scan import mamba2_scan


def mamba2_update(
    zxbcdt,
    conv_state,
    state,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    *,
    D=None,
    norm_weight=None,
    ngroups=1,
    norm_group_size=None,
    eps=1e-5,
    norm_before_gate=False,
    dt_softplus=True,
    dt_limit=None,
    state_indices=None,
):
    """mamba2_scan on the new tokens of each row, from the row's slot. Returns y and every slot of both states afterwards."""
    tokens = zxbcdt if zxbcdt.ndim == 3 else zxbcdt[:, None]
    d_inner = zxbcdt.shape[-1] - conv_weight.shape[0] - A.shape[0]
    y = np.zeros((*tokens.shape[:2], d_inner))
    conv_after, after = conv_state.copy(), state.copy()
    for row, slot in enumerate(range(len(tokens)) if state_indices is None else state_indices):
        if slot < 0:
            continue
        mine = slice(row, row + 1)
        y[mine], conv_after[slot], after[slot] = mamba2_scan(
            tokens[mine],
            conv_weight,
            conv_bias,
            dt_bias,
            A,
            D=D,
            norm_weight=norm_weight,
            ngroups=ngroups,
            norm_group_size=norm_group_size,
            eps=eps,
            norm_before_gate=norm_before_gate,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_conv_state=conv_state[slot][None],
            initial_state=state[slot][None],
        )
    return y.reshape(*zxbcdt.shape[:-1], d_inner), conv_after, after
