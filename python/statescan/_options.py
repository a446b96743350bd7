"""Options that hold for the whole process."""

from __future__ import annotations

_batch_invariant = False


def set_batch_invariant(enabled: bool) -> None:
    """Make every op that takes `batch_invariant` use True where the call says None.

    A row's bits are then the same at any batch size and packing, at some cost on a GPU. The CPU backend always is so.
    """
    global _batch_invariant
    _batch_invariant = bool(enabled)


def batch_invariant(asked: bool | None) -> bool:
    """What a call's `batch_invariant` argument means: itself, or the setting of the process when it is None."""
    return _batch_invariant if asked is None else asked
