"""The ops for torch, with gradients: ``import statescan.torch``.

Each function is the op of the same name in statescan, on torch tensors, with a backward (the decode ops, which update states in
place, have none). They work under torch.compile and torch.export (also with a dynamic sequence length), activation
checkpointing, autocast and CUDA graphs. ``out=`` and ``stream=`` are the plain ops' own; these run on torch's current stream.
statescan links to no torch: the same wheel serves every version from 2.4 on. Importing statescan never imports torch.
"""

from .causal_conv1d import causal_conv1d
from .causal_conv1d_update import causal_conv1d_update
from .gated_rms_norm import gated_rms_norm
from .mamba2_scan import mamba2_scan
from .mamba2_update import mamba2_update
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update
from .ssd_scan import ssd_scan
from .state_scan import state_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "mamba2_scan",
    "mamba2_update",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "state_scan",
]
