import numpy as np

from .common import discretise, silu, walks


def ssd_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=None,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
):
    """h = exp(dt A) h + dt B x;  y = C.h + D x, times silu(z). Returns y and the last h of every sequence."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    dt = discretise(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (np.repeat(v, nheads // ngroups, axis=2) for v in (B, C))  # a group serves consecutive heads
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    y = np.zeros_like(x)
    final_state = np.zeros((len(sequences), nheads, headdim, dstate))
    for s, (row, tokens) in enumerate(sequences):
        state = final_state[s] if initial_state is None else initial_state[s]
        for t in tokens:
            decay = np.exp(dt[row, t] * A)
            step = dt[row, t, :, None] * x[row, t]
            state = decay[:, None, None] * state + step[:, :, None] * B[row, t, :, None, :]
            y[row, t] = np.einsum("hpn,hn->hp", state, C[row, t])
            if D is not None:
                y[row, t] += (D if D.ndim == 2 else D[:, None]) * x[row, t]
            if z is not None:
                y[row, t] *= silu(z[row, t])
        final_state[s] = state
    return y, final_state
