"""What stands beside the ops in a table: plain torch, and mamba-ssm where it is installed.

A peer is checked before it is timed: against the float64 sample of its benchmark, and against our own result on the same inputs
where we have a kernel for them. This module needs torch; nothing else in the package does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import harness
from .harness import Arrays, Benchmark, Case, Machine

# mamba-ssm runs float32 through TF32, and rounds more often than we do in bfloat16.
AGREEMENT = {"float32": 2e-3, "bfloat16": 1e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Peer:
    op: str
    name: str
    call: Callable[[Arrays], torch.Tensor]  # the inputs of the benchmark, as torch tensors, to its first output


# ---- plain torch -------------------------------------------------------------------------------------------------------
def chunked_ssd(a: Arrays, chunk: int) -> torch.Tensor:
    """The Mamba-2 scan as matrix products over chunks (Dao & Gu 2024, arXiv:2405.21060, section 6), vectorised over batch,
    chunks and heads; only the scan over chunk states is a loop."""
    x, B, C = (a[k].float() for k in ("x", "B", "C"))
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    dt = F.softplus(a["dt"].float() + a["dt_bias"])
    tail = -seqlen % chunk  # a step of zero changes no state
    if tail:
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, tail)) for v in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, tail))
    split = lambda v: v.unflatten(1, (-1, chunk)).movedim(3, 2)  # [b,l,h,...] -> [b,c,h,q,...]
    x_c, dt_c, B_c, C_c = split(x), split(dt), split(B), split(C)
    logs = torch.cumsum(dt_c * a["A"][:, None], dim=-1)
    dtx = x_c * dt_c[..., None]
    per_head = lambda v: v.repeat_interleave(nheads // ngroups, dim=2)
    # Inside a chunk: masked before the exponential, which overflows above the diagonal.
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = torch.exp((logs[..., :, None] - logs[..., None, :]).masked_fill(above, -torch.inf))
    y = (per_head(C_c @ B_c.transpose(-1, -2)) * decay) @ dtx
    # What each chunk adds to the state, the state before each chunk, and what that gives.
    ends = logs[..., -1:]
    added = per_head(B_c).transpose(-1, -2) @ (dtx * torch.exp(ends - logs)[..., None])  # [b,c,h,n,p]
    state = torch.zeros_like(added[:, 0])
    before = torch.empty_like(added)
    for c in range(added.shape[1]):
        before[:, c] = state
        state = torch.exp(ends[:, c])[..., None] * state + added[:, c]
    y = y + (per_head(C_c) @ before) * torch.exp(logs)[..., None]
    y = y.movedim(2, 3).flatten(1, 2)[:, :seqlen]
    return (y + a["D"][:, None] * x[:, :seqlen]).to(a["x"].dtype)


def selective_scan_loop(a: Arrays) -> torch.Tensor:
    """The Mamba-1 scan (Gu & Dao 2023, arXiv:2312.00752, equation 2) as a loop over tokens, vectorised over the rest."""
    x, z, B, C = (a[k].float() for k in ("x", "z", "B", "C"))
    batch, seqlen, dim = x.shape
    dt = F.softplus(a["dt"].float() + a["dt_bias"])
    dtx = dt * x
    state = torch.zeros(batch, dim, B.shape[-1], device=x.device)
    y = torch.empty_like(x)
    for t in range(seqlen):
        state = torch.exp(dt[:, t, :, None] * a["A"]) * state + dtx[:, t, :, None] * B[:, t]
        y[:, t] = (state @ C[:, t].transpose(-1, -2)).squeeze(-1)
    return ((y + a["D"] * x) * F.silu(z)).to(a["x"].dtype)


def selective_scan_discretised(a: Arrays) -> torch.Tensor:
    """The same loop in the form of the published reference: exp(dt A) and dt B x of all tokens are made first, as tensors of
    [batch, seqlen, dim, dstate]."""
    x, z, B, C = (a[k].float() for k in ("x", "z", "B", "C"))
    batch, seqlen, dim = x.shape
    B, C = (v.repeat_interleave(dim // v.shape[2], dim=2) for v in (B, C))
    dt = F.softplus(a["dt"].float() + a["dt_bias"])
    decay = torch.exp(torch.einsum("bld,dn->bldn", dt, a["A"]))
    update = torch.einsum("bld,bldn,bld->bldn", dt, B, x)
    state = torch.zeros_like(update[:, 0])
    outputs = []
    for t in range(seqlen):
        state = decay[:, t] * state + update[:, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[:, t]))
    y = torch.stack(outputs, dim=1)
    return ((y + a["D"] * x) * F.silu(z)).to(a["x"].dtype)


# ---- mamba-ssm and causal-conv1d, on a GPU -----------------------------------------------------------------------------
def _mamba_ssd(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        a["x"], a["dt"], a["A"], a["B"], a["C"], chunk_size=256, D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True
    )


def _mamba_ssd_backward(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd as backward

    out = a["dy"]  # without a gate the result of the forward is asked for its shape alone
    inputs = (a["dy"], a["x"], a["dt"], a["A"], a["B"], a["C"], out)
    return backward(*inputs, chunk_size=256, D=a["D"], dt_bias=a["dt_bias"], dt_softplus=True)[0]


def _mamba_selective(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    first = lambda v: v.transpose(1, 2)  # its layout is channels-first
    B, C = (a[k].permute(0, 2, 3, 1) for k in "BC")
    y = selective_scan_fn(first(a["x"]), first(a["dt"]), a["A"], B, C, a["D"], first(a["z"]), a["dt_bias"], delta_softplus=True)
    return first(y)


def _mamba_block(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"], a["D"], 256, rmsnorm_weight=a["norm_weight"],
        rmsnorm_eps=1e-5, headdim=a["norm_weight"].shape[0] // a["A"].shape[0], norm_before_gate=False,
    )  # fmt: skip


def _causal_conv1d(a: Arrays) -> torch.Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(a["x"].transpose(1, 2), a["weight"], a["bias"], activation="silu").transpose(1, 2)


def _mamba_norm(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(a["x"], a["weight"], None, z=a["z"], eps=1e-5, norm_before_gate=False)


def _mamba_update(a: Arrays) -> torch.Tensor:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    if a["state"].ndim == 3:
        names = ("A", "B", "C", "D", "z", "dt_bias")
        A, B, C, D, z, bias = (a[k].squeeze(1) if k in "BC" else a[k] for k in names)
        return selective_state_update(a["state"], a["x"], a["dt"], A, B, C, D, z, bias, dt_softplus=True)
    headdim, dstate = a["state"].shape[2:]
    wide = lambda v: v[..., None].expand(*v.shape, headdim)
    A = a["A"][:, None, None].expand(-1, headdim, dstate)
    dt, D, bias = (wide(a[k]) for k in ("dt", "D", "dt_bias"))
    return selective_state_update(a["state"], a["x"], dt, A, a["B"], a["C"], D, a["z"], bias, dt_softplus=True)


PLAIN = tuple(
    Peer("ssd_scan", f"torch, chunks of {chunk}", lambda a, chunk=chunk: chunked_ssd(a, chunk)) for chunk in (64, 128, 256)
) + (
    Peer("selective_scan", "torch, a loop", selective_scan_loop),
    Peer("selective_scan", "torch, a loop after discretising", selective_scan_discretised),
)

INSTALLED = {
    "mamba_ssm": (
        Peer("ssd_scan", "mamba-ssm", _mamba_ssd),
        Peer("ssd_scan_backward", "mamba-ssm", _mamba_ssd_backward),
        Peer("selective_scan", "mamba-ssm", _mamba_selective),
        Peer("gated_rms_norm", "mamba-ssm", _mamba_norm),
        Peer("selective_state_update", "mamba-ssm", _mamba_update),
    ),
    "causal_conv1d": (
        Peer("causal_conv1d", "causal-conv1d", _causal_conv1d),
        Peer("mamba2_scan", "mamba-ssm", _mamba_block),  # whose convolution is causal-conv1d's
    ),
}


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def peers_of(op: str, device: str) -> list[Peer]:
    """The peers of an op that can run here."""
    found = list(PLAIN)
    if device == "cuda":
        found += [peer for package, peers in INSTALLED.items() if _imports(package) for peer in peers]
    return [peer for peer in found if peer.op == op]


def _as_torch(arrays: Arrays) -> Arrays:
    return {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def disagreement(peer: Peer, benchmark: Benchmark, case: Case, dtype: str, machine: Machine, arrays: Arrays) -> float:
    """The larger of the peer's relative errors, against the float64 sample and against our op. Keeps `arrays` as is."""
    device = machine.device
    result = peer.call(harness.copy_of(_as_torch(arrays))).double().cpu().numpy()
    exact_inputs = {name: device.get(a) for name, a in arrays.items()}
    checks = [check for check in benchmark.expected(exact_inputs, case.sizes) if check.output == benchmark.outputs[0]]
    worst = max(harness.relative_error(check.pick(result), check.value) for check in checks)
    try:
        ours = harness.run_op(benchmark, harness.copy_of(arrays))[benchmark.outputs[0]]
    except NotImplementedError:
        return worst
    return max(worst, harness.relative_error(result, device.get(ours)))


@torch.no_grad()
def measure(benchmark: Benchmark, case: Case, dtype: str, machine: Machine, seconds: float = 0.5) -> list[dict[str, Any]]:
    """A row for each peer of the op."""
    rows = []
    arrays = harness.prepare(benchmark, case, dtype, machine.device)
    if machine.device.name == "cpu":
        torch.set_num_threads(machine.device.threads)
    for peer in peers_of(benchmark.op, machine.device.name):
        row = harness.blank_row(benchmark, case, dtype, machine, peer.name)
        row["error"] = disagreement(peer, benchmark, case, dtype, machine, arrays)
        if row["error"] > AGREEMENT[dtype]:
            rows.append(row | {"status": f"wrong: off by {row['error']:.2g}, more than {AGREEMENT[dtype]:.2g}"})
            continue

        def make_call(peer: Peer = peer) -> Callable[[], Any]:
            own = harness.copy_of(_as_torch(arrays))
            return lambda: peer.call(own)

        cost = benchmark.cost(case.sizes, 4 if dtype == "float32" else 2)
        row |= harness.timed(machine.device, make_call, cost.bytes, seconds)
        row |= harness.rates(row, cost, machine.floor(cost, dtype))
        if benchmark.updates is not None:
            row["updates_per_s"] = benchmark.updates(case.sizes) / (row["median_us"] * 1e-6)
        rows.append(row)
    return rows
