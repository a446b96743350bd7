import numpy as np

from .selective_scan import selective_scan
from .ssd_scan import ssd_scan


def selective_state_update(
    state,
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
    state_indices=None,
    out_state_indices=None,
):
    """selective_scan or ssd_scan on the new tokens of each row, from the row's slot. Returns y and every slot afterwards."""
    scan = selective_scan if state.ndim == 3 else ssd_scan
    has_token_axis = x.ndim == state.ndim
    reads = range(len(x)) if state_indices is None else state_indices
    writes = reads if out_state_indices is None else out_state_indices

    def tokens_of(v, row):
        """[b,...] or [b,t,...] -> [1,t,...] of this row."""
        return v[row][None] if has_token_axis else v[row][None, None]

    def projection_of(v, row):
        return v if v.ndim == 2 else tokens_of(v, row)  # [d,n]: time-invariant

    y, after = np.zeros_like(x), state.copy()
    for row, (read, write) in enumerate(zip(reads, writes)):
        if read < 0:
            continue
        out, last = scan(
            tokens_of(x, row),
            tokens_of(dt, row),
            A,
            projection_of(B, row),
            projection_of(C, row),
            D=D,
            z=None if z is None else tokens_of(z, row),
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_state=state[read][None],
        )
        y[row] = out[0] if has_token_axis else out[0, 0]
        if write >= 0:
            after[write] = last[0]
    return y, after
