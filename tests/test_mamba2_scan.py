import cases
import numpy as np
import pytest
import statescan
from gradient_contract import GradientContract
from scan_contract import ScanContract, cumulative
from support import NARROW, Cpu, assert_accurate, assert_same_bits, poison

OP = cases.MAMBA2_SCAN


class TestMamba2Scan(ScanContract):
    op = OP
    optional = ("conv_bias", "dt_bias", "D", "norm_weight", "initial_conv_state", "initial_state")

    def test_missing_arguments(self, device, rng):
        inputs = self.make(rng)
        for name in ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A"):  # conv_bias and dt_bias may be None, not left out
            with pytest.raises(TypeError, match=name):
                self.op.run(device, {k: v for k, v in inputs.items() if k != name}, **self.op.options)
        for name in ("zxbcdt", "conv_weight", "A"):
            with pytest.raises(ValueError, match=f"mamba2_scan: {name} is required"):
                self.op.run(device, {**inputs, name: None}, **self.op.options)


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=2),
        dict(headdim=40),
        dict(headdim=64, dstate=128, nheads=2, ngroups=1),
        dict(headdim=80),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256),
        dict(width=2),
        dict(width=3),
        dict(width=8),
        dict(headdim=1),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    OP.check(device, cases.mamba2_scan(rng, dtype, **row), ngroups=row.get("ngroups", 3))


@pytest.mark.parametrize(
    "options",
    (
        dict(norm_before_gate=True),
        dict(norm_group_size=60),
        dict(norm_group_size=5),
        dict(norm_group_size=10, norm_before_gate=True),
        dict(eps=0.1),
        dict(dt_softplus=False),
        dict(dt_limit=(0.05, 0.2)),
        dict(reverse=True, norm_before_gate=True),
        dict(chunk_size=40),
        dict(chunk_size=1),
        dict(chunk_size=256),
        dict(batch_invariant=True),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_options(device, rng, options, dtype):
    inputs = cases.mamba2_scan(rng, dtype)
    if "dt_softplus" in options:
        inputs["dt_bias"] = np.abs(inputs["dt_bias"])
        inputs["zxbcdt"][:, :, -6:] = np.abs(inputs["zxbcdt"][:, :, -6:]) / 8
    OP.check(device, inputs, ngroups=3, **options)


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_of_weights(device, rng, dtype, weight_dtype):
    OP.check(device, cases.mamba2_scan(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32"), ngroups=3)


@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
def test_dtypes_of_states(device, rng, state_dtype):
    inputs = cases.mamba2_scan(rng, "bfloat16", state_dtype=state_dtype)
    inputs["initial_conv_state"] = inputs["initial_conv_state"].astype(np.float32)
    out = {
        "final_state": poison(inputs["initial_state"].shape, inputs["initial_state"].dtype),
        "final_conv_state": poison(inputs["initial_conv_state"].shape, np.float32),
    }
    OP.check(device, inputs, out, ngroups=3)


def test_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 10))):
        OP.check(device, {**cases.mamba2_scan(rng), "D": D.astype(np.float32)}, ngroups=3)


def test_is_its_parts(device, rng):
    """The fused block beside the same block from our other ops, in float32."""
    given = cases.mamba2_scan(rng)
    put = {name: device.put(value) for name, value in given.items()}
    z, xBC, dt = (np.ascontiguousarray(v) for v in np.split(given["zxbcdt"], [60, 162], axis=2))
    xBC = device.get(
        device.call(
            statescan.causal_conv1d,
            device.put(xBC),
            put["conv_weight"],
            put["conv_bias"],
            activation="silu",
            initial_state=put["initial_conv_state"],
        )
    )
    x, B, C = np.split(xBC, [60, 81], axis=2)
    views = [np.ascontiguousarray(v) for v in (x.reshape(2, 67, 6, 10), B.reshape(2, 67, 3, 7), C.reshape(2, 67, 3, 7))]
    x, B, C = (device.put(v) for v in views)
    y = device.get(
        device.call(
            statescan.ssd_scan,
            x,
            device.put(dt),
            put["A"],
            B,
            C,
            D=put["D"],
            dt_bias=put["dt_bias"],
            dt_softplus=True,
            initial_state=put["initial_state"],
        )
    )
    y = device.call(statescan.gated_rms_norm, device.put(y.reshape(2, 67, 60)), device.put(z), put["norm_weight"], group_size=20)
    fused = OP.run(device, given, ngroups=3)["y"]
    assert_accurate(fused, device.get(y).astype(np.float64), "y")


@pytest.mark.parametrize("omit", ((), ("norm_weight",)))
def test_float64(rng, omit):
    for options in (dict(), dict(norm_before_gate=True, norm_group_size=30), dict(reverse=True)):
        OP.check(Cpu(), cases.mamba2_scan(rng, "float64", omit=omit), ngroups=3, **options)


def test_final_states_only_when_asked_for(device, rng):
    inputs = {name: device.put(value) for name, value in cases.mamba2_scan(rng).items()}
    y = device.call(statescan.mamba2_scan, **inputs, ngroups=3)
    every = device.call(statescan.mamba2_scan, **inputs, ngroups=3, return_final_states=True)
    assert not isinstance(y, tuple) and isinstance(every, tuple) and len(every) == 3
    assert_same_bits(device.get(y), device.get(every[0]), "y")


def test_bad_z_stays_in_its_token(device, rng):
    clean = cases.mamba2_scan(rng)
    expected = OP.run(device, clean, ngroups=3)
    spoiled = {**clean, "zxbcdt": clean["zxbcdt"].copy()}
    spoiled["zxbcdt"][0, 20, 5] = np.nan
    got = OP.run(device, spoiled, ngroups=3)
    good = np.ones(67, bool)
    good[20] = False
    assert_same_bits(got["y"][0, good], expected["y"][0, good], "y")
    assert np.isnan(got["y"][0, 20, 5])
    assert_same_bits(got["final_state"], expected["final_state"], "final_state")


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (dict(ngroups=4), ValueError, "mamba2_scan: ngroups=4 (from A, shape (6,)) must divide nheads=6"),
        (dict(ngroups=0), ValueError, "mamba2_scan: ngroups=0 (from A, shape (6,)) must divide nheads=6"),
        (dict(ngroups=2), ValueError, "mamba2_scan: conv_dim=102 (from conv_weight) must be d_inner + 2 ngroups dstate"),
        (
            dict(zxbcdt=np.zeros((2, 67, 167), np.float32)),
            ValueError,
            "must be d_inner + conv_dim + nheads with d_inner a positive multiple of nheads",
        ),
        (dict(zxbcdt=np.zeros((2, 67, 90), np.float32)), ValueError, "must be d_inner + conv_dim + nheads"),
        (dict(norm_group_size=7), ValueError, "mamba2_scan: norm_group_size=7 must divide d_inner=60"),
        (dict(eps=-1.0), ValueError, "mamba2_scan: eps=-1 must not be negative"),
        (
            dict(conv_weight=np.zeros((102, 9), np.float32)),
            ValueError,
            "mamba2_scan: width=9 (from conv_weight, shape (102, 9)) must be between 2 and 8",
        ),
        (dict(dt_bias=np.zeros(5, np.float32)), ValueError, "mamba2_scan: dt_bias has shape (5,); expected (nheads=6)"),
        (dict(norm_weight=np.zeros(6, np.float32)), ValueError, "mamba2_scan: norm_weight has shape (6,); expected (d_inner=60)"),
        (dict(chunk_size=-1), ValueError, "mamba2_scan: chunk_size=-1 must be positive"),
        (dict(A=np.zeros(6, np.float64)), TypeError, "mamba2_scan: A is float64; expected float32"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    with pytest.raises(error) as raised:
        OP.run(device, {**cases.mamba2_scan(rng), "ngroups": 3, **change})
    assert text in str(raised.value)


# ---- backward ----------------------------------------------------------------------------------------------------------
BACKWARD = cases.MAMBA2_SCAN_BACKWARD


class TestBackward(GradientContract):
    op = BACKWARD
    optional = ("conv_bias", "dt_bias", "D", "norm_weight", "initial_conv_state", "initial_state")
    lengths = (0, 1, 2, 3, 4, 63, 64, 65, 129)

    def torch_forward(
        self, zxbcdt, conv_weight, A, conv_bias=None, dt_bias=None, D=None, norm_weight=None, initial_conv_state=None,
        initial_state=None, ngroups=1, reverse=False,
    ):  # fmt: skip
        import torch
        import torch.nn.functional as F

        (batch, seqlen, total), nheads, (conv_dim, width) = zxbcdt.shape, A.shape[0], conv_weight.shape
        d_inner = total - conv_dim - nheads
        z, xBC, dt = (zxbcdt.flip(1) if reverse else zxbcdt).split([d_inner, conv_dim, nheads], dim=2)
        before = xBC.new_zeros(batch, conv_dim, width - 1) if initial_conv_state is None else initial_conv_state
        window = torch.cat([before, xBC.transpose(1, 2)], 2)
        xBC = F.silu(F.conv1d(window, conv_weight[:, None], conv_bias, groups=conv_dim)).transpose(1, 2)
        x, B, C = xBC.split([d_inner, (conv_dim - d_inner) // 2, (conv_dim - d_inner) // 2], dim=2)
        x = x.unflatten(2, (nheads, -1))
        B, C = (v.unflatten(2, (ngroups, -1)).repeat_interleave(nheads // ngroups, dim=2) for v in (B, C))
        dt = F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=50)
        state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state
        y = []
        for t in range(seqlen):
            added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
            y.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + (0 if D is None else D[:, None] * x[:, t]))
        y = torch.stack(y, 1).flatten(2) * F.silu(z)
        if norm_weight is not None:
            groups = y.unflatten(2, (ngroups, -1))
            y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)).flatten(2) * norm_weight
        return y.flip(1) if reverse else y, window[..., seqlen:], state


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=2),
        dict(nheads=8, headdim=64, dstate=128, ngroups=1, seqlen=70),
        dict(dstate=1),
        dict(dstate=96),
        dict(headdim=1),
        dict(width=2),
        dict(width=8),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_sizes(device, rng, row, dtype):
    BACKWARD.check(device, BACKWARD.inputs(rng, dtype, **row), ngroups=row.get("ngroups", 3))


@pytest.mark.parametrize(
    "options",
    (
        dict(norm_before_gate=True),
        dict(norm_group_size=60),
        dict(norm_group_size=5),
        dict(norm_group_size=10, norm_before_gate=True),
        dict(eps=0.1),
        dict(dt_softplus=False),
        dict(dt_limit=(0.05, 0.2)),
        dict(reverse=True, norm_before_gate=True),
        dict(chunk_size=96),
        dict(batch_invariant=True),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_options(device, rng, options, dtype):
    inputs = BACKWARD.inputs(rng, dtype)
    if "dt_softplus" in options:
        inputs["dt_bias"] = np.abs(inputs["dt_bias"])
        inputs["zxbcdt"][:, :, -6:] = np.abs(inputs["zxbcdt"][:, :, -6:]) / 8
    BACKWARD.check(device, inputs, ngroups=3, **options)


@pytest.mark.parametrize("dtype", NARROW)
def test_backward_dtypes_of_weights_and_states(device, rng, dtype):
    inputs = BACKWARD.inputs(rng, dtype, weight_dtype=dtype, state_dtype=dtype)
    for name in ("initial_conv_state", "dfinal_conv_state"):
        inputs[name] = inputs[name].astype(np.float32)
    BACKWARD.check(device, inputs, ngroups=3)


def test_backward_of_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 10))):
        BACKWARD.check(device, {**BACKWARD.inputs(rng), "D": D.astype(np.float32)}, ngroups=3)


@pytest.mark.parametrize("omit", ((), ("norm_weight",)))
def test_backward_past_the_last_packed_token_without_a_norm(device, rng, omit):
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=40, sequences=3)
    for name in ("zxbcdt", "dy"):
        inputs[name][:, 29:] = np.nan
    inputs |= dict.fromkeys(omit)
    got = BACKWARD.check(device, inputs, ngroups=3, cu_seqlens=cumulative([11, 0, 18]))
    assert not np.any(got["dzxbcdt"][:, 29:])
