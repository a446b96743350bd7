"""mamba2_scan_backward: the gradients of a whole Mamba-2 block from zxbcdt, recomputing the convolution and y."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import bench_mamba2_scan as forward
from . import bench_ssd_scan, exact
from .harness import Cost, Expected

EPS = 1e-5


def _inputs(s, rng):
    dy = rng.standard_normal((s["batch"], s["seqlen"], s["nheads"] * s["headdim"]), np.float32)
    return forward._inputs(s, rng) | {"dy": dy}


def _expected(a, s):
    """The gradient of z at the first tokens of the last sequence: it depends on no later one, but on y before the norm."""
    tokens, inner = min(forward.CHECKED_TOKENS, s["seqlen"]), s["nheads"] * s["headdim"]
    z, dy = a["zxbcdt"][-1, :tokens, :inner], a["dy"][-1, :tokens]
    y = exact.mamba2_scanned(a, a["zxbcdt"][-1, :tokens], s)[0]
    sigmoid = 1 / (1 + np.exp(-z))
    gated, dnormed = y * z * sigmoid, dy * a["norm_weight"]
    scale = 1 / np.sqrt((gated**2).mean(1, keepdims=True) + EPS)
    normed = gated * scale
    dgated = scale * (dnormed - normed * (dnormed * normed).mean(1, keepdims=True))
    dz = dgated * y * sigmoid * (1 + z * (1 - sigmoid))
    return [Expected("dzxbcdt", lambda v: v[-1, :tokens, :inner], dz)]


def _cost(s, e):
    """zxbcdt and dy read, dzxbcdt written; both directions of the scan, three passes of the convolution."""
    tokens, inner = s["batch"] * s["seqlen"], s["nheads"] * s["headdim"]
    scan = bench_ssd_scan.BENCHMARK.cost({**s, "ngroups": 1}, e).flops
    conv = 3 * (2 * forward.WIDTH + 4) * tokens * (inner + 2 * s["dstate"])
    return Cost(e * tokens * (2 * forward.projected(s) + inner), 3 * scan + conv + 24 * tokens * inner)


BENCHMARK = dataclasses.replace(
    forward.BENCHMARK,
    op="mamba2_scan_backward",
    inputs=_inputs,
    arguments=lambda a: (
        (a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"], a["dy"]),
        {"D": a["D"], "norm_weight": a["norm_weight"]},
    ),
    cost=_cost,
    expected=_expected,
    outputs=("dzxbcdt", "dconv_weight", "dconv_bias", "ddt_bias", "dA", "dD", "dnorm_weight", "dconv_state", "dstate"),
    updates=None,
    takes_outputs=False,
)
