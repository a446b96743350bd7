import numpy as np

from .causal_conv1d import causal_conv1d


def causal_conv1d_update(x, state, weight, bias=None, *, activation=None, state_indices=None):
    """causal_conv1d on the new tokens of each row, from the row's slot. Returns y and every slot afterwards."""
    tokens = x if x.ndim == 3 else x[:, None]
    y, after = np.zeros_like(tokens), state.copy()
    for row, slot in enumerate(range(len(x)) if state_indices is None else state_indices):
        if slot < 0:
            continue
        mine = slice(row, row + 1)
        y[mine], after[slot] = causal_conv1d(tokens[mine], weight, bias, activation=activation, initial_state=state[slot][None])
    return y.reshape(x.shape), after
