"""The command ``statescan bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from typing import Any

import statescan

OPS = (
    "ssd_scan",
    "ssd_scan_backward",
    "selective_scan",
    "state_scan",
    "causal_conv1d",
    "causal_conv1d_backward",
    "gated_rms_norm",
    "gated_rms_norm_backward",
    "mamba2_scan",
    "mamba2_scan_backward",
    "causal_conv1d_update",
    "selective_state_update",
    "mamba2_update",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="OP", help=f"only these ops: {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all that there are")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds in all")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for each row: 0.5, or 0.05 with --quick")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, and on what")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the times beside their floors (needs matplotlib)")
    parser.add_argument("--peers", action="store_true", help="plain torch beside us, and mamba-ssm if installed (needs torch)")
    parser.add_argument("--host", action="store_true", help="only the host time of the decode ops, on tiny tensors")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU ops")


class Unavailable(Exception):
    """The command cannot do what was asked for; the message says what would help."""


def _require(package: str, option: str, install: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{option} needs {package}, which does not import ({error}): pip install {install}") from None


def _devices(args: argparse.Namespace) -> list[Any]:
    from .harness import Cpu, Cuda

    devices: list[Any] = []
    if args.device in ("cpu", "all"):
        devices.append(Cpu(args.threads))
    if args.device in ("cuda", "all"):
        why = None if statescan.info()["cuda_devices"] else statescan.info()["backends"]["cuda"]
        if why is None and importlib.util.find_spec("torch") is None:
            why = "torch, which makes the tensors and records the CUDA graphs, is not installed: pip install torch"
        if why is None:
            devices.append(Cuda())
        elif args.device == "cuda":
            raise Unavailable(f"--device cuda: {why}")
    return devices


def _measure(args: argparse.Namespace, machines: list[Any]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from . import harness

    seconds = args.seconds or (0.05 if args.quick else 0.5)
    work = []
    for machine in machines:
        for op in args.op or OPS:
            benchmark = importlib.import_module(f".bench_{op}", __package__).BENCHMARK
            for case in benchmark.cases:
                if case.quick == args.quick and machine.device.name in case.devices:
                    work += [(machine, benchmark, case, dtype) for dtype in machine.device.dtypes()]
    rows = []
    with tqdm(work, disable=None, leave=False) as progress:
        for machine, benchmark, case, dtype in progress:
            progress.set_description(f"{benchmark.op} {case.name} {dtype}")
            rows.append(harness.measure(benchmark, case, dtype, machine, seconds))
            if args.peers:
                from . import peers

                rows += peers.measure(benchmark, case, dtype, machine, seconds)
    return rows


def main(args: argparse.Namespace) -> int:
    """Run what :func:`add_arguments` parsed. Returns 0; 1 when a result was wrong; 2 when something needed is missing."""
    from . import harness, host_time, report

    if args.host:
        return host_time.main()
    before = statescan.num_threads()
    try:
        if args.plot:
            _require("matplotlib", "--plot", "'statescan[plot]'")
        if args.peers:
            _require("torch", "--peers", "torch")
        machines = [harness.Machine(device) for device in _devices(args)]
        rows = _measure(args, machines)
    except Unavailable as missing:
        print(f"statescan bench: {missing}", file=sys.stderr)
        return 2
    finally:
        statescan.set_num_threads(before)
    environment = harness.environment()
    facts = [machine.facts() for machine in machines]
    for fact in facts:
        matmul = ", ".join(f"{rate:.0f} GFLOP/s {dtype}" for dtype, rate in fact["matmul_gflops"].items())
        print(f"{fact['device']}: {fact['name']}; copy {fact['copy_gbps']:.1f} GB/s, matmul {matmul}")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{versions}; {environment['isa']}; commit {environment['commit'] or 'unknown'}; {environment['date']}")
    print(report.table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment, "machines": facts, "rows": rows}, file, indent=1)
            file.write("\n")
    if args.plot:
        report.plot(rows, "; ".join(fact["name"] for fact in facts), args.plot)
    return 1 if any(row["status"].startswith("wrong") for row in rows) else 0
