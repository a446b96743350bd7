"""state_scan for JAX: inside and outside jit, on the CPU and on CUDA, with gradient and vmap. Import it as ``statescan.jax``.

It is an XLA FFI call into the same library that the other frameworks use; importing statescan never imports jax. The other ops take
JAX arrays outside of jit, as ``statescan.<op>``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from . import _C

__all__ = ["state_scan"]

for (_target, _platform), _handler in _C.xla_handlers.items():
    jax.ffi.register_ffi_target(_target, _handler, platform=_platform)


def _call(op: str, operands: list[jax.Array], results: list[jax.ShapeDtypeStruct], **attributes: bool) -> list[jax.Array]:
    """The op on XLA's arrays. Raises for wrong shapes and dtypes while tracing; scratch memory is one result more."""
    workspace = getattr(_C, f"xla_check_{op}")([(a.dtype.name, list(a.shape)) for a in operands])
    scratch = jax.ShapeDtypeStruct((-(-workspace // 4),), jnp.int32)
    call = jax.ffi.ffi_call(f"statescan_{op}", [*results, scratch], vmap_method="broadcast_all")
    return call(*operands, **attributes)[:-1]


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _state_like(chunks: jax.Array) -> jax.ShapeDtypeStruct:
    """The state of [b,c,h,p,n] chunks: [b,h,p,n] in float32, or float64."""
    wide = jnp.float64 if chunks.dtype == jnp.float64 else jnp.float32
    return jax.ShapeDtypeStruct((*chunks.shape[:1], *chunks.shape[2:]), wide)


def state_scan(
    log_decay: jax.Array, update: jax.Array, *, initial_state: jax.Array | None = None, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scan chunk states: ``S[c] = exp(log_decay[c]) S[c-1] + update[c]``.

    Differentiable once in reverse mode, through initial_state and final_state as well; vmap and jit apply.

    Args:
        log_decay: [batch, nchunks, nheads] float32 (float64 with a float64 update): the sum of dt·A over each chunk.
        update: [batch, nchunks, nheads, headdim, dstate] float32, float16 or bfloat16 (float64 on the CPU).
        initial_state: [batch, nheads, headdim, dstate] float32 or narrower, S before the first chunk; zero when None.
        reverse: scan from the last chunk to the first.

    Returns:
        (states, final_state): the state before each chunk, shaped and typed as update, and the state after the last chunk,
        [batch, nheads, headdim, dstate] in float32.

    Raises:
        ValueError, TypeError: while tracing, a shape or dtype does not fit; the message names the argument.
        jax.errors.JaxRuntimeError: at run time, no kernel of this build serves the call, or a CUDA call failed.

    Source: Dao & Gu 2024, Transformers are SSMs, section 6 (arXiv:2405.21060).
    """
    return _state_scan(log_decay, update, initial_state, bool(reverse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _state_scan(log_decay, update, initial_state, reverse):
    operands = [log_decay, update] if initial_state is None else [log_decay, update, initial_state]
    states, final_state = _call("state_scan", operands, [_like(update), _state_like(update)], reverse=reverse)
    return states, final_state


def _state_scan_forward(log_decay, update, initial_state, reverse):
    states, final_state = _state_scan(log_decay, update, initial_state, reverse)
    # Of the initial state only its dtype is needed: a slice without elements carries it.
    return (states, final_state), (log_decay, states, None if initial_state is None else initial_state[:0])


def _state_scan_backward(reverse, saved, cotangents):
    log_decay, states, initial_state = saved
    dstates, dfinal_state = cotangents
    dlog_decay, dupdate, dinitial_state = _call(
        "state_scan_backward",
        [log_decay, states, dstates, dfinal_state],
        [_like(log_decay), _like(states), _state_like(states)],
        reverse=reverse,
    )
    return dlog_decay, dupdate, None if initial_state is None else dinitial_state.astype(initial_state.dtype)


_state_scan.defvjp(_state_scan_forward, _state_scan_backward)
