"""state_scan on a GPU, forward and backward, beside a copy of as many bytes and beside mamba-ssm's Triton kernels.

``python -m statescan.bench.bench_state_scan_cuda [--json FILE]``; mamba-ssm is optional.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import statescan
import torch
from tabulate import tabulate

from . import harness

# Chunk states of Mamba-2: batch, chunks, heads, headdim, dstate.
SHAPES = ((8, 16, 80, 64, 128), (1, 128, 80, 64, 128), (1, 32, 24, 64, 128))
FLOOR_BANDWIDTH = 3.0e12  # what a large copy reaches on an H100


def _close(got: torch.Tensor, exact: torch.Tensor, dtype: str, name: str) -> None:
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error <= harness.GATES[dtype]:
        raise harness.Disagreement(f"{name} is off by {error:.2g}, more than {harness.GATES[dtype]:.2g}")


def _verify(log_decay: torch.Tensor, update: torch.Tensor, dstates: torch.Tensor, dtype: str) -> None:
    """The last (batch, head) of every result against the recurrence in float64."""
    states, final = statescan.state_scan(log_decay, update)
    gradients = statescan.state_scan_backward(log_decay, states, dstates)
    decays = log_decay[-1, :, -1].double().exp()
    state = torch.zeros_like(update[-1, 0, -1], dtype=torch.float64)
    before = []
    for c, decay in enumerate(decays):
        before.append(state)
        state = decay * state + update[-1, c, -1].double()
    _close(states[-1, :, -1], torch.stack(before), dtype, "states")
    _close(final[-1, -1], state, "float32", "final_state")
    adjoint = torch.zeros_like(state)
    dupdate, dlog_decay = [], []
    for c in reversed(range(len(decays))):
        dupdate.append(adjoint)
        dlog_decay.append(decays[c] * (adjoint * states[-1, c, -1].double()).sum())
        adjoint = dstates[-1, c, -1].double() + decays[c] * adjoint
    _close(gradients[1][-1, :, -1], torch.stack(dupdate[::-1]), dtype, "dupdate")
    _close(gradients[0][-1, :, -1], torch.stack(dlog_decay[::-1]), "float32", "dlog_decay")
    _close(gradients[2][-1, -1], adjoint, "float32", "dinitial_state")


def _mamba_ssm() -> Any:
    try:
        from mamba_ssm.ops.triton import ssd_state_passing
    except ImportError:
        return None
    return ssd_state_passing


def _calls(shape: tuple[int, ...], dtype: str) -> list[tuple[str, str, int, Callable[[], Callable[[], Any]]]]:
    """(direction, who, bytes, a maker of calls on fresh memory)."""
    batch, nchunks, nheads, headdim, dstate = shape
    kind = getattr(torch, dtype)

    def chunks() -> torch.Tensor:
        return torch.randn(shape, dtype=kind, device="cuda")

    def decays() -> torch.Tensor:
        return -torch.rand(shape[:3], device="cuda")

    def ends() -> torch.Tensor:
        return torch.randn(batch, nheads, headdim, dstate, device="cuda")

    def forward() -> Callable[[], Any]:
        log_decay, update = decays(), chunks()
        states, final = statescan.state_scan(log_decay, update)
        return lambda: statescan.state_scan(log_decay, update, out=states, final_state_out=final)

    def backward() -> Callable[[], Any]:
        log_decay, states, dstates, dfinal = decays(), chunks(), chunks(), ends()
        kept: list[Any] = []  # outputs stay alive, so that each captured call writes memory of its own
        return lambda: kept.append(statescan.state_scan_backward(log_decay, states, dstates, dfinal_state=dfinal))

    def copy() -> Callable[[], Any]:
        source = chunks()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def peer_forward() -> Callable[[], Any]:
        log_decay, update = decays().transpose(1, 2).contiguous(), chunks().flatten(3)
        kept: list[Any] = []
        return lambda: kept.append(peer._state_passing_fwd(update, log_decay))

    def peer_backward() -> Callable[[], Any]:
        log_decay, states, dstates = decays().transpose(1, 2).contiguous(), chunks().flatten(3), chunks().flatten(3)
        dfinal = ends().flatten(2)
        kept: list[Any] = []
        options = {"dfinal_states": dfinal, "has_initial_states": True}
        return lambda: kept.append(peer._state_passing_bwd(states, log_decay, dstates, **options))

    size, end = batch * nchunks * nheads * headdim * dstate * kind.itemsize, 4 * batch * nheads * headdim * dstate
    calls = [
        ("copy", "torch", 2 * size, copy),
        ("forward", "statescan", 2 * size + end, forward),
        ("backward", "statescan", 3 * size + 2 * end, backward),
    ]
    peer = _mamba_ssm()
    if peer is not None:  # its gradient of the initial state has the dtype of the states
        calls += [("forward", "mamba-ssm", 2 * size + end, peer_forward),
                  ("backward", "mamba-ssm", 3 * size + end + size // nchunks, peer_backward)]  # fmt: skip
    return calls


def measure(shape: tuple[int, ...], dtype: str, device: harness.Cuda, seconds: float) -> list[dict[str, Any]]:
    batch, nchunks, nheads, headdim, dstate = shape
    log_decay = -torch.rand(shape[:3], device="cuda")
    update, dstates = (torch.randn(shape, dtype=getattr(torch, dtype), device="cuda") for _ in range(2))
    _verify(log_decay, update, dstates, dtype)
    kernels = {
        "forward": statescan.plan("state_scan", log_decay, update).kernel,
        "backward": statescan.plan("state_scan_backward", log_decay, update, dstates).kernel,
    }
    del log_decay, update, dstates
    rows = []
    for direction, who, nbytes, make_call in _calls(shape, dtype):
        torch.cuda.empty_cache()
        row = {"shape": f"b{batch} c{nchunks} h{nheads} p{headdim} n{dstate}", "dtype": dtype, "what": direction, "by": who}
        if who == "statescan":
            row["kernel"] = kernels[direction]
        row |= harness.timed(device, make_call, nbytes, seconds)
        seconds_each = row["median_us"] * 1e-6
        row |= {"bytes": nbytes, "gbps": nbytes / seconds_each / 1e9, "floor_us": nbytes / FLOOR_BANDWIDTH * 1e6}
        row["share_of_floor"] = nbytes / FLOOR_BANDWIDTH / seconds_each
        rows.append(row)
    copy = rows[0]
    for row in rows:
        row["of_copy"] = row["gbps"] / copy["gbps"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write what was measured, and on what")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    args = parser.parse_args()
    device = harness.Cuda()
    rows = [row for shape in SHAPES for dtype in ("bfloat16", "float32") for row in measure(shape, dtype, device, args.seconds)]
    headers = ("shape", "dtype", "what", "by", "us", "+-", "GB/s", "floor us", "share", "of copy")
    print(f"{device.label()}, torch {torch.__version__}")
    print(tabulate([(
        r["shape"], r["dtype"], r["what"], f"{r['by']} {r.get('kernel', '')}".strip(),
        f"{r['median_us']:.1f}", f"{r['spread_us']:.1f}", f"{r['gbps']:.0f}", f"{r['floor_us']:.1f}",
        f"{r['share_of_floor']:.0%}", f"{r['of_copy']:.0%}",
    ) for r in rows], headers, tablefmt="github", disable_numparse=True))  # fmt: skip
    if args.json:
        facts = {"machine": device.label(), "torch": torch.__version__, **harness.environment(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
