"""statescan: the kernels of Mamba-family state-space models, on arrays of any framework.

Ops take NumPy arrays, torch and CuPy tensors, or anything with ``__dlpack__``, on the CPU or on CUDA, and return arrays of the
same framework. ``statescan.info()`` says what this installation can do.
"""

from ._C import cpu_isa, num_threads, set_num_threads
from ._info import cmake_dir, include_dir, info, library
from ._options import set_batch_invariant
from ._plan import Plan, plan
from .causal_conv1d import causal_conv1d, causal_conv1d_backward
from .causal_conv1d_update import causal_conv1d_update
from .gated_rms_norm import gated_rms_norm, gated_rms_norm_backward
from .mamba2_scan import mamba2_scan, mamba2_scan_backward
from .mamba2_update import mamba2_update
from .selective_scan import selective_scan, selective_scan_backward
from .selective_state_update import selective_state_update
from .ssd_scan import ssd_scan, ssd_scan_backward
from .state_scan import state_scan, state_scan_backward

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "cmake_dir",
    "cpu_isa",
    "gated_rms_norm",
    "gated_rms_norm_backward",
    "include_dir",
    "info",
    "library",
    "mamba2_scan",
    "mamba2_scan_backward",
    "mamba2_update",
    "num_threads",
    "plan",
    "selective_scan",
    "selective_scan_backward",
    "selective_state_update",
    "set_batch_invariant",
    "set_num_threads",
    "ssd_scan",
    "ssd_scan_backward",
    "state_scan",
    "state_scan_backward",
]
