import numpy as np

from .common import discretise, silu, walks


def selective_scan(
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
    """h = exp(dt A) h + dt B x;  y = C.h (2 Re C.h with a complex A) + D x, times silu(z). Returns y and the last h."""
    batch, seqlen, dim = x.shape
    dstate = A.shape[1]
    dt = discretise(dt, dt_bias, dt_softplus, dt_limit)

    def at(projection, row, t):
        """B or C of a token, for every channel: a group serves consecutive channels."""
        if projection.ndim == 2:
            return projection
        return np.repeat(projection[row, t], dim // projection.shape[2], axis=0)

    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    y = np.zeros_like(x)
    final_state = np.zeros((len(sequences), dim, dstate), A.dtype)
    for s, (row, tokens) in enumerate(sequences):
        state = final_state[s] if initial_state is None else initial_state[s]
        for t in tokens:
            step = dt[row, t, :, None]
            state = np.exp(step * A) * state + step * at(B, row, t) * x[row, t, :, None]
            out = np.sum(at(C, row, t) * state, axis=1)
            y[row, t] = 2 * out.real if np.iscomplexobj(A) else out
            if D is not None:
                y[row, t] += D * x[row, t]
            if z is not None:
                y[row, t] *= silu(z[row, t])
        final_state[s] = state
    return y, final_state
