"""The Mamba-1 mixer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from . import _parts
from ._parts import wide
from .state import State


class Mamba(nn.Module):
    """Mamba-1 mixer: ``x, z = in_proj(u)``; ``x = silu(conv(x))``; ``dt, B, C = x_proj(x)``; ``out_proj(selective_scan(...))``.

    Args:
        d_model: channels in and out.
        d_state: states a channel.
        d_conv: width of the convolution, 2 to 8.
        expand: inner channels are expand * d_model.
        dt_rank: rank of the projection of dt; "auto" for ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: dt is log-uniform in [dt_min, dt_max] at first, and at least dt_init_floor.
        dt_init, dt_scale: "random" (uniform) or "constant" weights of dt_proj, of size dt_scale / sqrt(dt_rank).
        conv_bias, bias: whether the convolution, and the projections in and out, have a bias.
        device, dtype: of the parameters; A_log and D are float32.

    Parameters: in_proj, conv1d, x_proj, dt_proj, A_log [d_inner, d_state], D [d_inner], out_proj; A = -exp(A_log) starts at
    -1 .. -d_state in every channel (S4D-Real).

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        made = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = _parts.depthwise_conv1d(self.d_inner, d_conv, conv_bias, **made)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(A.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        size = dt_scale * self.dt_rank**-0.5
        with torch.no_grad():
            if dt_init == "random":
                self.dt_proj.weight.uniform_(-size, size)
            else:
                self.dt_proj.weight.fill_(size)
            self.dt_proj.bias.copy_(_parts.dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, device))
        self.dt_proj.bias._no_reinit = True

    def zero_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch, self.d_inner, self.d_conv - 1)
        return State(conv, weight.new_zeros(batch, self.d_inner, self.d_state, dtype=wide(weight).dtype))

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
        x, z = self.in_proj(u).chunk(2, dim=-1)
        conv = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=before.conv,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        x, conv_state = conv if return_final_state else (conv, None)
        dt, B, C = self._projections(x)
        scan = selective_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            z=z,
            **self._scan_options(),
            initial_state=before.ssm,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        y, ssm_state = scan if return_final_state else (scan, None)
        y = self.out_proj(y)
        return (y, State(conv_state, ssm_state)) if return_final_state else y

    @torch.no_grad()
    def step(self, u: Tensor, state: State) -> Tensor:
        """One or a few new tokens, without gradient; `state` is updated in place.

        Args:
            u: [batch, d_model] or [batch, ntokens, d_model].
            state: of zero_state, or what forward returned.

        Returns:
            shaped as u.
        """
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = causal_conv1d_update(x, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        dt, B, C = self._projections(x)
        return self.out_proj(selective_state_update(state.ssm, x, dt, self._A(), B, C, z=z, **self._scan_options()))

    def _A(self) -> Tensor:
        return -torch.exp(wide(self.A_log))

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its bias [..., d_inner], and B and C [..., 1, d_state]."""
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        return F.linear(dt, self.dt_proj.weight), B.unsqueeze(-2), C.unsqueeze(-2)

    def _scan_options(self) -> dict[str, Tensor | bool]:
        return {"D": wide(self.D), "dt_bias": wide(self.dt_proj.bias), "dt_softplus": True}
