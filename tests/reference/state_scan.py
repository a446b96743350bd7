import numpy as np

from .common import walks


def state_scan(log_decay, update, *, initial_state=None, cu_seqlens=None, reverse=False):
    """S[c] = exp(log_decay[c]) S[c-1] + update[c]. Returns S[c-1] for every c, and the last S of every sequence."""
    batch, nchunks, nheads, headdim, dstate = update.shape
    sequences = walks(batch, nchunks, cu_seqlens, reverse)
    states = np.zeros_like(update)
    final_state = np.zeros((len(sequences), nheads, headdim, dstate))
    for s, (row, chunks) in enumerate(sequences):
        state = final_state[s] if initial_state is None else initial_state[s]
        for c in chunks:
            states[row, c] = state
            state = np.exp(log_decay[row, c])[:, None, None] * state + update[row, c]
        final_state[s] = state
    return states, final_state


def state_scan_backward(log_decay, states, dstates, *, dfinal_state=None, initial_state=None, cu_seqlens=None, reverse=False):
    """With G[c] the adjoint of S[c]: G[last] = dfinal_state, G[c-1] = dstates[c] + exp(log_decay[c]) G[c].

    Returns dlog_decay[c] = exp(log_decay[c]) <G[c], S[c-1]>, dupdate[c] = G[c] and dinitial_state = G[-1].
    """
    batch, nchunks, nheads, headdim, dstate = states.shape
    sequences = walks(batch, nchunks, cu_seqlens, reverse)
    dlog_decay, dupdate = np.zeros_like(log_decay), np.zeros_like(states)
    dinitial_state = np.zeros((len(sequences), nheads, headdim, dstate))
    for s, (row, chunks) in enumerate(sequences):
        adjoint = dinitial_state[s] if dfinal_state is None else dfinal_state[s]
        for c in reversed(chunks):
            decay = np.exp(log_decay[row, c])
            dupdate[row, c] = adjoint
            dlog_decay[row, c] = decay * np.sum(adjoint * states[row, c], axis=(1, 2))
            adjoint = dstates[row, c] + decay[:, None, None] * adjoint
        dinitial_state[s] = adjoint
    return dlog_decay, dupdate, dinitial_state
