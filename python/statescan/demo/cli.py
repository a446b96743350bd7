"""The command `statescan demo [FILE]`."""

from __future__ import annotations

import argparse
import gzip
import lzma
import sys
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

import statescan

from . import corpus
from .model import LanguageModel, State, bits

BLOCK = 1 << 16
"""Tokens that one scan takes; a longer file goes on from the states of the block before, so that memory stays bounded."""
CHECKED = 512
"""Tokens over which the recurrent path is compared with the parallel one."""
AGREEMENT = 1e-3
"""The largest relative RMS difference of their logits: float32 round-off through all layers, with room."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="text to read (default: a held-out Python module)")
    parser.add_argument("--bytes", type=_count, default=400, metavar="N", help="how many bytes to write (default: 400)")
    parser.add_argument("--temperature", type=_temperature, default=0.7, metavar="T", help="0 takes the likeliest (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of the continuation (default: 0)")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


class InputError(Exception):
    """The file cannot be read as text; the message says why."""


def load(path: Path | None) -> tuple[Path, bytes]:
    """The file to read and its content.

    Raises:
        InputError: it is missing, a folder, unreadable, empty or binary.
    """
    if path is None:
        root = corpus.default_root()
        path = next((root / name for name in ("textwrap.py", *corpus.HELD_OUT) if (root / name).is_file()), None)
        if path is None:
            raise InputError(f"no held-out module of the standard library in {root}; name a FILE")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a text file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise InputError(f"{path} is empty; there is nothing to read")
    if corpus.SEPARATOR in content:
        raise InputError(f"{path} is binary (byte 0 at offset {content.index(corpus.SEPARATOR)}); the model reads text")
    return path, content


def read(model: LanguageModel, content: bytes) -> tuple[float, list[State], np.ndarray]:
    """Code length of `content` in bits, the states before its last byte is fed, and the first logits (for the check)."""
    tokens = np.frombuffer(bytes([corpus.SEPARATOR]) + content, np.uint8)
    states, total, first = model.initial_states(), 0.0, None
    starts = range(0, len(content), BLOCK)
    with tqdm(total=len(starts) * len(model.layers), desc="reading", unit="layer", leave=False, file=sys.stderr) as bar:
        for start in starts:
            inputs = tokens[start : min(start + BLOCK, len(content))]
            hidden, states = model.read(inputs, states, bar.update)
            logits = model.logits(hidden)
            total += bits(logits, tokens[start + 1 : start + 1 + len(inputs)])
            first = logits[:CHECKED].copy() if first is None else first
    return total, states, first


def disagreement(model: LanguageModel, content: bytes, parallel: np.ndarray) -> float:
    """Relative RMS difference between the logits of the decode ops and `parallel` on the same first tokens."""
    states = model.initial_states()
    tokens = (bytes([corpus.SEPARATOR]) + content)[: len(parallel)]
    recurrent = np.stack([model.logits(model.step(token, states)) for token in tokens])
    return float(np.sqrt(((recurrent - parallel) ** 2).mean() / (parallel**2).mean()))


def write(model: LanguageModel, token: int, states: list[State], count: int, temperature: float, seed: int) -> bytes:
    """Continue from `states` and the last token, one step a byte. The separator, an end of file, is never drawn."""
    generator = np.random.default_rng(seed)
    written = bytearray()
    for _ in range(count):
        logits = model.logits(model.step(token, states)).astype(np.float64)
        logits[corpus.SEPARATOR] = -np.inf
        if temperature > 0:
            logits = logits / temperature + generator.gumbel(size=logits.shape)
        token = int(logits.argmax())
        written.append(token)
    return bytes(written)


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code: 0, 1 when the two paths disagree, 2 for bad input."""
    try:
        path, content = load(args.file)
    except InputError as error:
        print(f"statescan demo: {error}", file=sys.stderr)
        return 2
    model = LanguageModel()
    c = model.config
    backend = statescan.info()["backends"]["cpu"]
    print(
        f"Mamba-2, {model.parameters / 1e6:.1f} M parameters ({c.n_layer} layers of {c.nheads} heads, {c.dstate} states a channel), "
        f"on {backend}"
    )

    started = time.perf_counter()
    total, states, first = read(model, content)
    seconds = time.perf_counter() - started
    sizes = {
        "gzip -9": len(gzip.compress(content, 9)),
        "xz -9e": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
        "this model": total / 8,
    }
    print(f"read {path}: {len(content):,} bytes in {seconds:.2f} s, {len(content) / seconds:,.0f} bytes/s\n")
    rows = [(name, round(size), 8 * size / len(content)) for name, size in sizes.items()]
    print(tabulate(rows, headers=("coder", "bytes", "bits per byte"), floatfmt=("", ",.0f", ".3f"), intfmt=","))

    difference = disagreement(model, content, first)
    agree = difference <= AGREEMENT
    print(
        f"\nparallel scan and recurrent steps {'agree' if agree else 'DISAGREE'} on {len(first)} tokens: "
        f"logits differ by {difference:.1e} (relative RMS; at most {AGREEMENT:g} is accepted)"
    )

    if args.bytes:
        started = time.perf_counter()
        written = write(model, content[-1], states, args.bytes, args.temperature, args.seed)
        seconds = time.perf_counter() - started
        print(f"\ncontinued, {len(written)} bytes at {len(written) / seconds:,.0f} bytes/s, from the end of the file:\n")
        tail = content[-200:].decode("utf-8", "replace")
        print(f"{tail}\N{BLACK RIGHT-POINTING TRIANGLE}{written.decode('utf-8', 'replace')}")
    return 0 if agree else 1
