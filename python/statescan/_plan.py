"""plan(): which kernel a call would take."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _C
from ._options import batch_invariant as _batch_invariant

OPS = (
    "state_scan",
    "ssd_scan",
    "selective_scan",
    "causal_conv1d",
    "gated_rms_norm",
    "mamba2_scan",
    "causal_conv1d_update",
    "selective_state_update",
    "mamba2_update",
)
BACKWARD_OPS = tuple(f"{op}_backward" for op in OPS if not op.endswith("_update"))


class Plan(NamedTuple):
    """The backend ("cpu" or "cuda"), the kernel (a row of the op's table) and the scratch memory of a call. On a GPU, where few
    sequences and heads would not fill it, sequences are cut into segments, of segment_tokens but for the first and the last,
    or of fewer the later they are, which changes how results round; 0: not cut, as always with batch_invariant. reads_kept_states: of ssd_scan_backward, whether
    it reads the chunk_states that a forward with save_states returns, or makes them again all the same.
    """

    backend: str
    kernel: str
    workspace_bytes: int
    segment_tokens: int = 0
    reads_kept_states: bool = False


def plan(op: str, *args: Any, **kwargs: Any) -> Plan:
    """The plan of a call, without running it: ``plan("ssd_scan", x, dt, A, B, C, z=z)``.

    Args:
        op: the name of an op, such as "ssd_scan" or "ssd_scan_backward".
        args, kwargs: what the op itself would be called with.

    Returns:
        Plan(backend, kernel, workspace_bytes, segment_tokens, reads_kept_states).

    Raises:
        ValueError: no op has that name, or the arguments do not fit it.
        TypeError, NotImplementedError: as the op itself would raise.
    """
    if op not in OPS + BACKWARD_OPS:
        raise ValueError(f"plan: no op is called {op!r}; expected one of {', '.join(OPS + BACKWARD_OPS)}")
    if "batch_invariant" in kwargs:
        kwargs["batch_invariant"] = _batch_invariant(kwargs["batch_invariant"])
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return Plan(*getattr(_C, op)(*args, **kwargs, plan_only=True))
