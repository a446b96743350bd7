"""state_scan: the scan over the chunk states of Mamba-2, chunks of 128 tokens."""

from __future__ import annotations

import numpy as np

from .harness import Benchmark, Case, Cost, Expected
from .shapes import MAMBA2


def _inputs(s, rng):
    shape = (s["batch"], s["nchunks"], s["nheads"])
    return {
        "log_decay": -rng.random(shape, np.float32),
        "update": rng.standard_normal((*shape, s["headdim"], s["dstate"]), np.float32),
    }


def _expected(a, s):
    heads = [0, s["nheads"] - 1]
    state = np.zeros((len(heads), s["headdim"], s["dstate"]))
    states = []
    for c in range(s["nchunks"]):
        states.append(state)
        state = np.exp(a["log_decay"][-1, c, heads])[:, None, None] * state + a["update"][-1, c, heads]
    return [
        Expected("states", lambda v: v[-1][:, heads], np.stack(states)),
        Expected("final_state", lambda v: v[-1][heads], state),
    ]


def _states(s):
    return s["batch"] * s["nchunks"] * s["nheads"] * s["headdim"] * s["dstate"]


BENCHMARK = Benchmark(
    op="state_scan",
    cases=tuple(Case(f"{name} b1 l2048", {"batch": 1, "nchunks": 16, **sizes}) for name, sizes in MAMBA2.items())
    + (Case("mamba2-130m b1 l256", {"batch": 1, "nchunks": 2, **MAMBA2["mamba2-130m"]}, quick=True),),
    inputs=_inputs,
    arguments=lambda a: ((a["log_decay"], a["update"]), {}),
    cost=lambda s, e: Cost(2 * 4 * _states(s), 2 * _states(s)),
    expected=_expected,
    outputs=("states", "final_state"),
    wide=frozenset({"log_decay", "update"}),
    updates=_states,
)
