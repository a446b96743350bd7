"""The command `statescan` (and `python -m statescan`): info, demo, bench, tasks, and the paths that native builds need."""

from __future__ import annotations

import argparse
import sys

import statescan
from statescan import bench
from statescan.bench import tasks
from statescan.demo import cli as demo_cli


def _info(_: argparse.Namespace) -> int:
    from tabulate import tabulate

    rows = []
    for key, value in statescan.info().items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", text) for name, text in value.items()]
        else:
            rows.append((key, value))
    print(tabulate(rows, tablefmt="plain"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="statescan", description=statescan.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"statescan {statescan.__version__}")
    parser.add_argument("--cmake-dir", action="store_true", help="print the folder of the CMake package")
    parser.add_argument("--include-dir", action="store_true", help="print the folder of the C++ headers")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("info", help="what this installation can do").set_defaults(run=_info)
    timing = commands.add_parser("bench", help="check and time the ops on this machine")
    bench.add_arguments(timing)
    timing.set_defaults(run=bench.main)
    learning = commands.add_parser("tasks", help="Mamba and Mamba-2 learn selective copying and associative recall (needs torch)")
    tasks.add_arguments(learning)
    learning.set_defaults(run=tasks.main)
    demo = commands.add_parser("demo", help="a trained Mamba-2 reads a file, scores it and continues it")
    demo_cli.add_arguments(demo)
    demo.set_defaults(run=demo_cli.main)
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(statescan.cmake_dir())
    if args.include_dir:
        print(statescan.include_dir())
    if hasattr(args, "run"):
        return args.run(args)
    if not (args.cmake_dir or args.include_dir):
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
