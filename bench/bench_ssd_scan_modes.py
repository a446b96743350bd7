"""ssd_scan's three forms against the length of the sequences, beside causal attention of the same width, on a GPU.

``python -m statescan.bench.bench_ssd_scan_modes [--json FILE] [--plot FILE]``: 16,384 tokens cut into sequences, a Mamba-2 layer of
width 5120 (80 heads of 64, dstate 128), and 20 heads of 128 of attention through torch's SDPA; bfloat16. --plot needs matplotlib;
mamba-ssm is optional.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import statescan
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import harness

TOKENS = 16384
LENGTHS = tuple(2**i for i in range(6, 15))
NHEADS, HEADDIM, DSTATE = 80, 64, 128
ATTENTION_HEADS, ATTENTION_HEADDIM = 20, 128
LONGEST_QUADRATIC = 2048
BYTES = 2 * TOKENS * (2 * NHEADS * HEADDIM + NHEADS + 2 * DSTATE)  # x, y, dt, B and C

Maker = Callable[[], Callable[[], Any]]


def _scan_inputs(seqlen: int) -> tuple[torch.Tensor, ...]:
    batch = TOKENS // seqlen
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    A = -torch.exp(torch.rand(NHEADS, device="cuda") * 2.7)
    dt = torch.rand(batch, seqlen, NHEADS, device="cuda", dtype=torch.bfloat16) / 8
    return randn(batch, seqlen, NHEADS, HEADDIM), dt, A, randn(batch, seqlen, 1, DSTATE), randn(batch, seqlen, 1, DSTATE)


def _scan(seqlen: int, mode: str | None) -> Callable[[], Any]:
    inputs = _scan_inputs(seqlen)
    out = torch.empty_like(inputs[0])
    return lambda: statescan.ssd_scan(*inputs, ssd_mode=mode, out=out)


def _mamba_ssm(seqlen: int) -> Callable[[], Any]:
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    inputs = _scan_inputs(seqlen)
    return lambda: _mamba_chunk_scan_combined_fwd(*inputs, 256)


def _attention(seqlen: int, backend: SDPBackend) -> Callable[[], Any]:
    # The heads of a token side by side, as a projection leaves them.
    shape = (TOKENS // seqlen, seqlen, ATTENTION_HEADS, ATTENTION_HEADDIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))

    def call() -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def _columns(seqlen: int) -> dict[str, Maker]:
    modes: dict[str, Maker] = {"default": lambda: _scan(seqlen, None), "chunked": lambda: _scan(seqlen, "chunked")}
    modes["recurrent"] = lambda: _scan(seqlen, "recurrent")
    if seqlen <= LONGEST_QUADRATIC:
        modes["quadratic"] = lambda: _scan(seqlen, "quadratic")
    return modes | {
        "attention, flash": lambda: _attention(seqlen, SDPBackend.FLASH_ATTENTION),
        "attention, cuDNN": lambda: _attention(seqlen, SDPBackend.CUDNN_ATTENTION),
        "mamba-ssm": lambda: _mamba_ssm(seqlen),
    }


def _verify(seqlen: int) -> None:
    """The forms against each other: what they compute is checked against float64 elsewhere."""
    inputs = _scan_inputs(seqlen)
    exact = statescan.ssd_scan(*(v.float() for v in inputs), ssd_mode="chunked").double()
    for mode in (None, "chunked", "recurrent") + (("quadratic",) if seqlen <= LONGEST_QUADRATIC else ()):
        error = ((statescan.ssd_scan(*inputs, ssd_mode=mode).double() - exact).norm() / exact.norm()).item()
        if not error <= harness.GATES["bfloat16"]:
            raise harness.Disagreement(f"{mode} is off by {error:.2g} at seqlen {seqlen}")


def measure(seqlen: int, device: harness.Cuda, seconds: float) -> dict[str, Any]:
    _verify(seqlen)
    row: dict[str, Any] = {"seqlen": seqlen, "kernel": statescan.plan("ssd_scan", *_scan_inputs(seqlen)).kernel}
    for name, make_call in _columns(seqlen).items():
        torch.cuda.empty_cache()
        try:
            row[name] = harness.timed(device, make_call, BYTES, seconds)
        except (ImportError, NotImplementedError, RuntimeError) as missing:  # not installed, or not for this shape
            row[name] = {"status": str(missing).splitlines()[0]}
    return row


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in _columns(LENGTHS[0]):
        points = [(r["seqlen"], r[name]["median_us"]) for r in rows if "median_us" in r.get(name, {})]
        if points:
            axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="seqlen", ylabel=f"us for {TOKENS} tokens, bfloat16")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write what was measured, and on what")
    parser.add_argument("--plot", metavar="FILE", help="write the curves, as an image of the kind that the name ends in")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each measurement")
    args = parser.parse_args()
    device = harness.Cuda()
    rows = [measure(seqlen, device, args.seconds) for seqlen in LENGTHS]
    names = tuple(_columns(LENGTHS[0]))
    cell = lambda r, name: f"{r[name]['median_us']:.0f}" if "median_us" in r.get(name, {}) else "-"
    print(f"{device.label()}, torch {torch.__version__}; us, median")
    print(tabulate([(r["seqlen"], r["kernel"], *(cell(r, name) for name in names)) for r in rows],
                   ("seqlen", "row", *names), tablefmt="github", disable_numparse=True))  # fmt: skip
    if args.json:
        facts = {"machine": device.label(), "torch": torch.__version__, **harness.environment(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
