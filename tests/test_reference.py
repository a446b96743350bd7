"""The oracles against closed forms and differences, so that a kernel never has to vouch for them."""

import cases
import numpy as np
import pytest
from reference.causal_conv1d import causal_conv1d, causal_conv1d_backward
from reference.common import silu, softplus
from reference.gated_rms_norm import gated_rms_norm, gated_rms_norm_backward
from reference.mamba2_scan import mamba2_scan
from reference.selective_scan import selective_scan, selective_scan_backward
from reference.selective_state_update import selective_state_update
from reference.ssd_scan import ssd_scan
from reference.state_scan import state_scan, state_scan_backward
from support import exact


def inputs_of(make, rng, **sizes):
    return {name: exact(value) for name, value in make(rng, "float64", **sizes).items()}


def assert_gradients(rng, forward, given, names, gradients):
    """`gradients`, of the real function `forward` of arrays by name, against central differences along random directions."""
    for name, gradient in zip(names, gradients, strict=True):
        direction = rng.standard_normal(given[name].shape)
        if np.iscomplexobj(given[name]):
            direction = direction + 1j * rng.standard_normal(given[name].shape)
        ahead, behind = (forward(**{**given, name: given[name] + side * direction}) for side in (1e-5, -1e-5))
        along = np.sum((np.conj(gradient) * direction).real)
        np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-6, err_msg=name)


def test_softplus_and_silu():
    v = np.array([-800.0, -50.0, -1.0, 0.0, 1.0, 50.0, 800.0])
    np.testing.assert_allclose(
        softplus(v)[1:], [np.exp(-50.0), 0.31326168751822286, np.log(2), 1.3132616875182228, 50, 800], rtol=1e-15
    )
    assert softplus(v)[0] == 0
    np.testing.assert_allclose(silu(v), [0, -50 * np.exp(-50.0), -0.2689414213699951, 0, 0.7310585786300049, 50, 800], rtol=1e-15)


def test_ssd_scan_is_its_matrix_form(rng):
    """y[t] = sum over s <= t of (C[t].B[s]) exp(sum of dt A over s+1..t) dt[s] x[s], one head at a time."""
    given = inputs_of(cases.ssd_scan, rng, seqlen=9, omit=("D", "z", "dt_bias", "initial_state"))
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    y, final_state = ssd_scan(x, dt, A, B, C, dt_softplus=True)
    step = np.log1p(np.exp(dt))
    for b in range(2):
        for h in range(6):
            g = h // 2
            past = np.cumsum(step[b, :, h] * A[h])
            decay = np.tril(np.exp(np.minimum(past[:, None] - past[None], 0)))
            weights = (C[b, :, g] @ B[b, :, g].T) * decay * step[b, None, :, h]
            np.testing.assert_allclose(y[b, :, h], weights @ x[b, :, h], rtol=1e-11, atol=1e-12)
            last = np.exp(past[-1] - past) * step[b, :, h]
            np.testing.assert_allclose(
                final_state[b, h], np.einsum("t,tp,tn->pn", last, x[b, :, h], B[b, :, g]), rtol=1e-11, atol=1e-12
            )


def test_selective_scan_with_equal_rates_is_ssd_scan(rng):
    given = inputs_of(cases.ssd_scan, rng, seqlen=9, headdim=1)
    y, final_state = ssd_scan(**given, dt_softplus=True, dt_limit=(0.1, 0.5))
    as_channels = {
        **given,
        "x": given["x"][..., 0],
        "z": given["z"][..., 0],
        "initial_state": given["initial_state"][:, :, 0],
        "A": np.repeat(given["A"][:, None], 7, axis=1),
    }
    y1, final1 = selective_scan(**as_channels, dt_softplus=True, dt_limit=(0.1, 0.5))
    np.testing.assert_allclose(y1, y[..., 0], rtol=1e-12)
    np.testing.assert_allclose(final1, final_state[:, :, 0], rtol=1e-12)


def test_complex_selective_scan_is_a_pair_of_conjugates(rng):
    """2 Re C.h of a complex system is the sum over it and its conjugate."""
    given = inputs_of(cases.selective_scan, rng, seqlen=9, complex_A=True, omit=("D", "z"))
    y, _ = selective_scan(**given, dt_softplus=True)
    both = {
        name: np.concatenate([value, value.conj()], axis=-1) if np.iscomplexobj(value) else value for name, value in given.items()
    }
    doubled, _ = selective_scan(**both, dt_softplus=True)
    np.testing.assert_allclose(doubled, 2 * y, rtol=1e-12)


@pytest.mark.parametrize("width", (2, 5))
def test_causal_conv1d_is_numpys_convolution(rng, width):
    given = inputs_of(cases.causal_conv1d, rng, seqlen=11, width=width)
    y, final_state = causal_conv1d(**given)
    for b in range(2):
        for d in range(13):
            padded = np.concatenate([given["initial_state"][b, d], given["x"][b, :, d]])
            expected = np.convolve(padded, given["weight"][d, ::-1], mode="valid") + given["bias"][d]
            np.testing.assert_allclose(y[b, :, d], expected, rtol=1e-12, atol=1e-13)
            np.testing.assert_array_equal(final_state[b, d], padded[len(padded) - width + 1 :])


def test_gated_rms_norm_has_unit_rows(rng):
    x, z = rng.standard_normal((2, 5, 12))
    y = gated_rms_norm(x, group_size=4, eps=0)
    np.testing.assert_allclose(np.mean(y.reshape(5, 3, 4) ** 2, axis=2), 1, rtol=1e-14)
    np.testing.assert_allclose(gated_rms_norm(x, z, norm_before_gate=True), gated_rms_norm(x) * silu(z), rtol=1e-14)
    np.testing.assert_allclose(gated_rms_norm(x, z), gated_rms_norm(x * silu(z)), rtol=1e-14)


def test_state_scan_backward_is_the_difference_of_the_forward(rng):
    given = inputs_of(cases.state_scan, rng, seqlen=5)
    dstates, dfinal_state = rng.standard_normal(given["update"].shape), rng.standard_normal(given["initial_state"].shape)

    def loss(**changed):
        states, final_state = state_scan(**changed, reverse=True)
        return np.sum(states * dstates) + np.sum(final_state * dfinal_state)

    states, _ = state_scan(**given, reverse=True)
    gradients = state_scan_backward(given["log_decay"], states, dstates, dfinal_state=dfinal_state, reverse=True)
    assert_gradients(rng, loss, given, ("log_decay", "update", "initial_state"), gradients)


@pytest.mark.parametrize("norm_before_gate", (False, True))
def test_gated_rms_norm_backward_is_the_difference_of_the_forward(rng, norm_before_gate):
    x, z, dy = rng.standard_normal((3, 4, 12))
    given, options = dict(x=x, z=z, weight=rng.standard_normal(12)), dict(group_size=4, norm_before_gate=norm_before_gate)
    gradients = gated_rms_norm_backward(**given, dy=dy, **options)
    assert_gradients(rng, lambda **v: np.sum(gated_rms_norm(**v, **options) * dy), given, ("x", "z", "weight"), gradients)


@pytest.mark.parametrize("seqlen", (2, 6))
def test_causal_conv1d_backward_is_the_difference_of_the_forward(rng, seqlen):
    given, options = inputs_of(cases.causal_conv1d, rng, seqlen=seqlen), dict(activation="silu", reverse=True)
    dy, dfinal_state = rng.standard_normal(given["x"].shape), rng.standard_normal(given["initial_state"].shape)

    def loss(**changed):
        y, final_state = causal_conv1d(**changed, **options)
        return np.sum(y * dy) + np.sum(final_state * dfinal_state)

    gradients = causal_conv1d_backward(**given, dy=dy, dfinal_state=dfinal_state, **options)
    assert_gradients(rng, loss, given, ("x", "weight", "bias", "initial_state"), gradients)


@pytest.mark.parametrize("sizes", (dict(), dict(complex_A=True), dict(complex_A=True, varying_B=False, varying_C=False)), ids=str)
def test_selective_scan_backward_is_the_difference_of_the_forward(rng, sizes):
    given = inputs_of(cases.selective_scan, rng, batch=1, seqlen=9, sequences=2, **sizes)
    options = dict(dt_softplus=True, dt_limit=(0.02, 0.5), cu_seqlens=np.array([0, 5, 9]), reverse=True)
    dy, dfinal_state = rng.standard_normal(given["x"].shape), exact(cases.normal(rng, given["A"].dtype.name, 2, 12, 7))

    def loss(**changed):
        y, final_state = selective_scan(**changed, **options)
        return np.sum(y * dy) + np.sum((final_state * np.conj(dfinal_state)).real)

    gradients = selective_scan_backward(**given, dy=dy, dfinal_state=dfinal_state, **options)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    assert_gradients(rng, loss, given, names, gradients)


def test_mamba2_scan_of_one_token_by_hand(rng):
    given = inputs_of(cases.mamba2_scan, rng, batch=1, seqlen=1, nheads=1, headdim=2, ngroups=1, dstate=3, width=2)
    y, final_conv_state, final_state = mamba2_scan(**given)
    row = given["zxbcdt"][0, 0]
    z, xBC, dt = row[:2], row[2:10], row[10]
    window = np.stack([given["initial_conv_state"][0, :, 0], xBC], axis=1)
    conv = silu((window * given["conv_weight"]).sum(1) + given["conv_bias"])
    x, B, C = conv[:2], conv[2:5], conv[5:]
    step = np.log1p(np.exp(dt + given["dt_bias"][0]))
    state = np.exp(step * given["A"][0]) * given["initial_state"][0, 0] + step * np.outer(x, B)
    gated = (state @ C + given["D"][0] * x) * silu(z)
    np.testing.assert_allclose(y[0, 0], gated / np.sqrt(np.mean(gated**2) + 1e-5) * given["norm_weight"], rtol=1e-13)
    np.testing.assert_array_equal(final_conv_state[0, :, 0], xBC)
    np.testing.assert_allclose(final_state[0, 0], state, rtol=1e-14)


def test_update_keeps_padding_and_moves_slots(rng):
    given = inputs_of(cases.ssd_scan, rng, seqlen=1, batch=3, omit=("initial_state",))
    tokens = {name: value[:, 0] if value.ndim > 2 else value for name, value in given.items()}
    state = rng.standard_normal((5, 6, 5, 7))
    y, after = selective_state_update(state, **tokens, state_indices=np.array([4, -1, 0]), out_state_indices=np.array([2, 1, -1]))
    assert not np.any(y[1]) and np.any(y[0]) and np.any(y[2])
    changed = [slot for slot in range(5) if not np.array_equal(after[slot], state[slot])]
    assert changed == [2]
