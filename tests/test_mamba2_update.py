import cases
import numpy as np
import pytest
import statescan
from support import NARROW, Cpu
from update_contract import UpdateContract

OP = cases.MAMBA2_UPDATE


class TestMamba2Update(UpdateContract):
    op = OP
    optional = ("conv_bias", "dt_bias", "D", "norm_weight")


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(headdim=1),
        dict(headdim=40),
        dict(headdim=64, dstate=128, nheads=2, ngroups=1),
        dict(headdim=80),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256),
        dict(width=2),
        dict(width=8),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    for ntokens in (None, 3):
        OP.check(device, cases.mamba2_update(rng, dtype, ntokens=ntokens, **row), ngroups=row.get("ngroups", 2))


@pytest.mark.parametrize(
    "options",
    (
        dict(norm_before_gate=True),
        dict(norm_group_size=60),
        dict(norm_group_size=10),
        dict(eps=0.1),
        dict(dt_softplus=False),
        dict(dt_limit=(0.05, 0.2)),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_options(device, rng, options, dtype):
    inputs = cases.mamba2_update(rng, dtype, ntokens=2)
    if "dt_softplus" in options:
        inputs["dt_bias"] = np.abs(inputs["dt_bias"])
        inputs["zxbcdt"][..., -6:] = np.abs(inputs["zxbcdt"][..., -6:]) / 8
    OP.check(device, inputs, ngroups=2, **options)


@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("conv_state_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_dtypes_of_states(device, rng, dtype, conv_state_dtype, state_dtype):
    inputs = cases.mamba2_update(
        rng, dtype, ntokens=3, state_dtype=state_dtype, conv_state_dtype=dtype if conv_state_dtype == "same" else "float32"
    )
    OP.check(device, inputs, ngroups=2)


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_of_weights(device, rng, dtype, weight_dtype):
    OP.check(device, cases.mamba2_update(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32"), ngroups=2)


def test_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 10))):
        OP.check(device, {**cases.mamba2_update(rng), "D": D.astype(np.float32)}, ngroups=2)


def test_float64_options(rng):
    for options in (dict(norm_before_gate=True), dict(norm_group_size=30), dict(dt_limit=(0.05, 0.2))):
        OP.check(Cpu(), cases.mamba2_update(rng, "float64", ntokens=3), ngroups=2, **options)


@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(zxbcdt=np.zeros(154, np.float32)),
            ValueError,
            "zxbcdt has shape (154,); expected (batch, d_inner + conv_dim + nheads) or",
        ),
        (dict(ngroups=4), ValueError, "ngroups=4 (from A, shape (6,)) must divide nheads=6"),
        (
            dict(zxbcdt=np.zeros((3, 155), np.float32)),
            ValueError,
            "must be d_inner + conv_dim + nheads with d_inner a positive multiple of nheads",
        ),
        (dict(norm_group_size=7), ValueError, "norm_group_size=7 must divide d_inner=60"),
        (
            dict(state=np.zeros((3, 6, 10, 8), np.float32)),
            ValueError,
            "state has shape (3, 6, 10, 8); expected (slots=3, nheads=6, headdim=10, dstate=7)",
        ),
        (
            dict(conv_state=np.zeros((3, 88, 4), np.float32)),
            ValueError,
            "conv_state has shape (3, 88, 4); expected (slots=3, conv_dim=88, width - 1=3)",
        ),
        (dict(conv_state=None), ValueError, "conv_state is required"),
        (dict(state=None), ValueError, "state is required"),
        (dict(zxbcdt=None), ValueError, "zxbcdt is required"),
        (dict(eps=-1.0), ValueError, "eps=-1 must not be negative"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(rng, change, error, text):
    with pytest.raises(error) as raised:
        statescan.mamba2_update(**{**cases.mamba2_update(rng), "ngroups": 2, **change})
    assert str(raised.value).startswith("mamba2_update: ") and text in str(raised.value)
