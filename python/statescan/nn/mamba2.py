"""The Mamba-2 mixer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import mamba2_scan, mamba2_update
from . import _parts
from ._parts import wide
from .norm import RMSNormGated
from .state import State


class Mamba2(nn.Module):
    """Mamba-2 mixer: ``z, x, B, C, dt = in_proj(u)``; convolution and SiLU of x, B, C; ``ssd_scan``; gated norm; ``out_proj``.

    All between the two projections is one op, statescan.torch.mamba2_scan.

    Args:
        d_model: channels in and out.
        d_state: states a channel.
        d_conv: width of the convolution, 2 to 8.
        conv_init: the convolution's weights are uniform in [-conv_init, conv_init] at first; None for torch's own.
        expand: inner channels are expand * d_model.
        headdim: channels a head.
        d_ssm: inner channels that go through the scan; the rest is a gated MLP. None for all.
        ngroups: groups of B and C.
        A_init_range: -A is uniform in it at first.
        D_has_hdim: a D for each channel instead of one for each head.
        rmsnorm: whether there is a norm behind the scan.
        norm_before_gate: whether the norm comes before the gate.
        norm_group_size: channels that are normalised together; None for d_ssm / ngroups.
        norm_eps: added to the norm's mean of squares.
        dt_min, dt_max, dt_init_floor: dt is log-uniform in [dt_min, dt_max] at first, and at least dt_init_floor.
        dt_limit: (low, high) that dt is limited to.
        bias, conv_bias: whether the projections, and the convolution, have a bias.
        chunk_size: tokens that the scan works on at a time; None lets the library pick. The result does not depend on it.
        device, dtype: of the parameters; D is float32.

    Parameters: in_proj, conv1d, dt_bias [nheads], A_log [nheads], D [nheads] or [d_ssm], norm, out_proj; A = -exp(A_log).

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_group_size: int | None = None,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim or (self.d_ssm // headdim) % ngroups or not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(
                f"Mamba2: headdim={headdim} must divide d_ssm={self.d_ssm}, ngroups={ngroups} the number of heads, and d_ssm "
                f"be at most expand * d_model = {self.d_inner}"
            )
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.norm_before_gate, self.norm_eps = D_has_hdim, norm_before_gate, norm_eps
        self.norm_group_size = norm_group_size or self.d_ssm // ngroups
        low, high = dt_limit
        self.dt_limit = None if low <= 0 and high == float("inf") else (float(low), float(high))
        self.chunk_size = chunk_size
        made = {"device": device, "dtype": dtype}
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        d_in_proj = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, d_in_proj, bias=bias, **made)
        self.conv1d = _parts.depthwise_conv1d(self.conv_dim, d_conv, conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(_parts.dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device).to(dtype))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device).uniform_(*A_init_range).log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = RMSNormGated(self.d_ssm, norm_eps, self.norm_group_size, norm_before_gate, **made)
        else:
            self.norm = None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def zero_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch, self.conv_dim, self.d_conv - 1)
        return State(conv, weight.new_zeros(batch, self.nheads, self.headdim, self.d_state, dtype=wide(weight).dtype))

    def forward(
        self,
        u: Tensor,
        *,
        initial_state: State | None = None,
        return_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """The mixer on whole sequences.

        Args:
            u: [batch, seqlen, d_model].
            initial_state: the state before the first token, of any of the two parts; gradients reach it.
            return_final_state: also return the state after the last token, for `step`, or for the rest of the sequence.
            cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one, each with its own states.

        Returns:
            [batch, seqlen, d_model]; with return_final_state the pair (output, State).
        """
        before = State(None, None) if initial_state is None else initial_state
        mlp, zxbcdt = self._split_mlp(self.in_proj(u))
        results = mamba2_scan(
            zxbcdt,
            *self._weights(),
            **self._options(),
            initial_conv_state=before.conv,
            initial_state=before.ssm,
            return_final_states=return_final_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
        )
        if not return_final_state:
            return self._project_out(mlp, results)
        y, conv_state, ssm_state = results
        return self._project_out(mlp, y), State(conv_state, ssm_state)

    @torch.no_grad()
    def step(self, u: Tensor, state: State) -> Tensor:
        """One or a few new tokens, without gradient; `state` is updated in place.

        Args:
            u: [batch, d_model] or [batch, ntokens, d_model].
            state: of zero_state, or what forward returned.

        Returns:
            shaped as u.
        """
        mlp, zxbcdt = self._split_mlp(self.in_proj(u))
        y = mamba2_update(zxbcdt, state.conv, state.ssm, *self._weights(), **self._options())
        return self._project_out(mlp, y)

    def _split_mlp(self, projected: Tensor) -> tuple[Tensor | None, Tensor]:
        """The output of the gated MLP on the channels that the scan leaves out, and what the scan's block takes."""
        d_mlp = self.d_inner - self.d_ssm
        if d_mlp == 0:
            return None, projected
        gate, x, zxbcdt = projected.split((d_mlp, d_mlp, projected.shape[-1] - 2 * d_mlp), dim=-1)
        return F.silu(gate) * x, zxbcdt

    def _project_out(self, mlp: Tensor | None, y: Tensor) -> Tensor:
        return self.out_proj(y if mlp is None else torch.cat([mlp, y], dim=-1))

    def _weights(self) -> tuple[Tensor | None, ...]:
        A = -torch.exp(wide(self.A_log))
        return self.conv1d.weight.squeeze(1), self.conv1d.bias, wide(self.dt_bias), A

    def _options(self) -> dict[str, Any]:
        D = wide(self.D)
        return {
            "D": D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else D,
            "norm_weight": None if self.norm is None else self.norm.weight,
            "ngroups": self.ngroups,
            "norm_group_size": self.norm_group_size,
            "eps": self.norm_eps,
            "norm_before_gate": self.norm_before_gate,
            "dt_limit": self.dt_limit,
        }
