"""The ops that the served functions are made of: differentiable where the peers' are."""

from __future__ import annotations

from .. import causal_conv1d, gated_rms_norm, mamba2_scan, selective_scan, ssd_scan

__all__ = ["causal_conv1d", "gated_rms_norm", "mamba2_scan", "selective_scan", "ssd_scan"]
