"""The corpus of the demo model: the sources of the Python standard library, and the modules kept out of training.

A corpus is a folder of ``.py`` files. The same folder always gives the same files in the same order, and
:func:`digest` names what was read, so that a weight file can say what it was trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = 0
"""The byte before every document. No Python source may contain it, so it marks a start and nothing else."""

HELD_OUT = (
    "_pydecimal.py",
    "tarfile.py",
    "subprocess.py",
    "difflib.py",
    "xml/dom/minidom.py",
    "optparse.py",
    "dataclasses.py",
    "statistics.py",
    "fractions.py",
    "calendar.py",
    "heapq.py",
    "tomllib/_parser.py",
    "gettext.py",
    "http/cookies.py",
    "textwrap.py",
    "csv.py",
    "wsgiref/validate.py",
    "shlex.py",
    "graphlib.py",
    "getopt.py",
    "sched.py",
    "colorsys.py",
    "bisect.py",
)
"""Modules never trained on, from 229 KB down to 3 KB, relative to the standard library's folder.

Each was chosen because no training file is a near copy: of its lines of 30 characters or more (by length), at most 5 in
100 occur anywhere else in the library, and those are mostly licences, imports and single statements. Pairs such as
``bz2``/``lzma``, ``wave``/``sunau``, ``ntpath``/``posixpath`` or ``tokenize``/``lib2to3.pgen2.tokenize`` fail that.
"""

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_SKIPPED_PATHS = ("lib2to3/tests/data/",)  # deliberately malformed inputs
_SKIPPED_NAMES = ("_sysconfigdata", "bad")  # generated for one build; deliberately malformed


def default_root() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def sources(root: Path) -> Iterator[str]:
    """The ``.py`` files under `root` as sorted POSIX paths relative to it, without third-party and build-made files."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and not (
            name.startswith(_SKIPPED_PATHS) or path.name.startswith(_SKIPPED_NAMES)
        ):
            yield name


def split(root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Training files and held-out files of the library at `root`, each in sorted order.

    Empty files, files that are not UTF-8, files that contain the separator, and second copies of a file are left out.
    A name of `HELD_OUT` that this library lacks is left out too, and so is a training file equal to a held-out one.
    """
    root = default_root() if root is None else Path(root)
    names = list(sources(root))
    heldout = [root / name for name in names if name in HELD_OUT]
    seen = {path.read_bytes() for path in heldout}
    train = []
    for name in names:
        content = (root / name).read_bytes()
        if name not in HELD_OUT and content not in seen and _is_text(content):
            seen.add(content)
            train.append(root / name)
    if not train or not heldout:
        raise ValueError(
            f"corpus: {root} must hold a Python standard library; found {len(train)} training and {len(heldout)} "
            "held-out sources"
        )
    return train, heldout


def further(roots: Iterable[Path], train: Iterable[bytes], heldout: Iterable[bytes]) -> list[bytes]:
    """Other sources that teach something new, without anything of the held-out modules: of other versions of the library (so
    no module of a held-out name) or of other packages, some of which carry copies of its modules.

    A file joins when at least a quarter of its lines, by length, occur in no file before it, and at most a twentieth in a
    held-out one. Lines of fewer than 30 characters do not count: they are everywhere.
    """
    secret = {line for document in heldout for line in _long_lines(document)}
    known = {line for document in train for line in _long_lines(document)} | secret
    found = []
    for root in roots:
        for name in sources(root):
            content = (root / name).read_bytes()
            lines = _long_lines(content)
            size = sum(map(len, lines))
            new = sum(len(line) for line in lines if line not in known)
            if name in HELD_OUT or not _is_text(content) or new == 0 or 4 * new < size:
                continue
            if 20 * sum(len(line) for line in lines if line in secret) <= size:
                known.update(lines)
                found.append(content)
    return found


def _long_lines(content: bytes) -> list[bytes]:
    return [line for line in map(bytes.strip, content.split(b"\n")) if len(line) >= 30]


def load_bytes(files: Iterable[Path]) -> list[bytes]:
    """The content of each file, in order."""
    return [path.read_bytes() for path in files]


def digest(documents: Iterable[bytes]) -> str:
    """SHA-256 over the length (8 bytes, little endian) and content of each document, as hexadecimal."""
    total = hashlib.sha256()
    for document in documents:
        total.update(len(document).to_bytes(8, "little"))
        total.update(document)
    return total.hexdigest()


def _is_text(content: bytes) -> bool:
    """Whether `content` is non-empty UTF-8 without the separator."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(content) and SEPARATOR not in content
