"""Random shapes, layouts, packings and splits, each held against the oracle. Derandomised: every run tries the same."""

import cases
import numpy as np
import reference.gated_rms_norm
import statescan
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, Cpu, assert_accurate, exact, laid_out

CPU = Cpu()
few = settings(deadline=None, derandomize=True, max_examples=60, database=None)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(("float32", "float16", "bfloat16", "float64"))
packings = st.lists(st.integers(0, 70), min_size=0, max_size=6)


@st.composite
def head_counts(draw, most=4):
    """(how many heads, how many groups they share)."""
    ngroups = draw(st.integers(1, most))
    return ngroups * draw(st.integers(1, most)), ngroups


@st.composite
def scans(draw):
    """An op with sizes of its own; packed or a batch."""
    op = draw(st.sampled_from((cases.STATE_SCAN, cases.SSD_SCAN, cases.SELECTIVE_SCAN, cases.CAUSAL_CONV1D, cases.MAMBA2_SCAN)))
    heads, ngroups = draw(head_counts())
    dstate = draw(st.integers(1, 40))
    headdim = draw(st.integers(1, 24))
    sizes, options = {}, dict(op.options)
    if op is cases.CAUSAL_CONV1D:
        sizes = dict(dim=draw(st.integers(1, 70)), width=draw(st.integers(2, 8)))
        options["activation"] = draw(st.sampled_from((None, "silu")))
    elif op is cases.SELECTIVE_SCAN:
        sizes = dict(
            dim=heads * draw(st.integers(1, 5)),
            ngroups=ngroups,
            dstate=dstate,
            complex_A=draw(st.booleans()),
            varying_B=draw(st.booleans()),
            varying_C=draw(st.booleans()),
        )
    else:
        sizes = dict(nheads=heads, headdim=headdim, dstate=dstate)
        if op is not cases.STATE_SCAN:
            sizes["ngroups"] = ngroups
            options["chunk_size"] = draw(st.one_of(st.none(), st.integers(1, 300)))
        if op is cases.MAMBA2_SCAN:
            sizes["width"] = draw(st.integers(2, 5))
            options["ngroups"] = ngroups
    if op is cases.SSD_SCAN or op is cases.SELECTIVE_SCAN:
        options["dt_limit"] = draw(st.sampled_from((None, (0.0, 0.5), (0.01, 1.0))))
    options["reverse"] = draw(st.booleans())
    return op, sizes, options


@few
@given(scans(), dtypes, seeds, st.integers(1, 3), st.integers(0, 150))
def test_batches(case, dtype, seed, batch, seqlen):
    op, sizes, options = case
    op.check(CPU, op.inputs(np.random.default_rng(seed), dtype, batch=batch, seqlen=seqlen, **sizes), **options)


@few
@given(scans(), dtypes, seeds, packings, st.integers(0, 9))
def test_packings(case, dtype, seed, lengths, slack):
    op, sizes, options = case
    inputs = op.inputs(np.random.default_rng(seed), dtype, batch=1, seqlen=sum(lengths) + slack, sequences=len(lengths), **sizes)
    op.check(CPU, inputs, cu_seqlens=np.cumsum([0, *lengths]), **options)


@few
@given(scans(), seeds, st.integers(0, 100), st.data())
def test_splits(case, seed, seqlen, data):
    """Any number of cuts, the states carried over each: the same as one pass."""
    op, sizes, options = case
    inputs = op.inputs(np.random.default_rng(seed), batch=2, seqlen=seqlen, **sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, seqlen), max_size=4), label="cuts"))
    pieces = [slice(first, last) for first, last in zip([0, *cuts], [*cuts, seqlen])]
    whole = op.expected(inputs, **options)
    results, now = [], inputs
    for piece in reversed(pieces) if options["reverse"] else pieces:
        results.append(op.run(CPU, op.tokens(now, piece), **options))
        now = {**inputs, **{taken: results[-1][given_] for given_, taken in op.carried.items()}}
    for name in op.out:
        if name in op.carried:
            got = results[-1][name]
        else:
            got = np.concatenate([r[name] for r in (results[::-1] if options["reverse"] else results)], axis=1)
        assert_accurate(got, whole[name], name)


@few
@given(scans(), seeds, st.data())
def test_layouts(case, seed, data):
    op, sizes, options = case
    inputs = op.inputs(np.random.default_rng(seed), batch=2, seqlen=41, **sizes)
    views = {name: laid_out(value, data.draw(st.sampled_from(LAYOUTS), label=name)) for name, value in inputs.items()}
    op.check(CPU, views, **options)


@st.composite
def updates(draw):
    op = draw(
        st.sampled_from((cases.CAUSAL_CONV1D_UPDATE, cases.MAMBA1_STATE_UPDATE, cases.MAMBA2_STATE_UPDATE, cases.MAMBA2_UPDATE))
    )
    heads, ngroups = draw(head_counts())
    options = dict(op.options)
    if op is cases.CAUSAL_CONV1D_UPDATE:
        sizes = dict(dim=draw(st.integers(1, 70)), width=draw(st.integers(2, 8)))
    elif op is cases.MAMBA1_STATE_UPDATE:
        sizes = dict(
            dim=heads * draw(st.integers(1, 5)),
            ngroups=ngroups,
            dstate=draw(st.integers(1, 40)),
            complex_A=draw(st.booleans()),
            varying_B=draw(st.booleans()),
            varying_C=draw(st.booleans()),
        )
    else:
        sizes = dict(nheads=heads, ngroups=ngroups, headdim=draw(st.integers(1, 24)), dstate=draw(st.integers(1, 40)))
        if op is cases.MAMBA2_UPDATE:
            sizes["width"] = draw(st.integers(2, 5))
            options["ngroups"] = ngroups
    return op, sizes, options


@few
@given(updates(), dtypes, seeds, st.data())
def test_updates(case, dtype, seed, data):
    op, sizes, options = case
    slots = data.draw(st.integers(1, 7), label="slots")
    table = data.draw(st.permutations(range(slots)), label="table")[: data.draw(st.integers(1, slots), label="rows")]
    table = [-1 if data.draw(st.integers(0, 3), label="padding") == 0 else slot for slot in table]
    ntokens = data.draw(st.one_of(st.none(), st.integers(1, 6)), label="ntokens")
    inputs = op.inputs(np.random.default_rng(seed), dtype, batch=len(table), ntokens=ntokens, slots=slots, **sizes)
    op.check(CPU, inputs, state_indices=np.array(table), **options)


@few
@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 6), st.integers(1, 40), dtypes, seeds, st.data())
def test_gated_rms_norm(leading, groups, group_size, dtype, seed, data):
    rng, dim = np.random.default_rng(seed), groups * group_size
    inputs = dict(
        x=cases.normal(rng, dtype, *leading, dim),
        z=cases.normal(rng, dtype, *leading, dim),
        weight=cases.normal(rng, cases.parameter_dtype(dtype), dim),
    )
    for name in ("z", "weight"):
        if data.draw(st.booleans(), label=f"without {name}"):
            inputs[name] = None
    options = dict(group_size=group_size, norm_before_gate=data.draw(st.booleans(), label="norm_before_gate"))
    y = statescan.gated_rms_norm(**inputs, **options)
    assert_accurate(y, reference.gated_rms_norm.gated_rms_norm(**{k: exact(v) for k, v in inputs.items()}, **options), "y")


@few
@given(
    st.booleans(),
    dtypes,
    seeds,
    st.integers(1, 200),
    st.floats(-8, 4),
    st.floats(0, 8),
    st.floats(-6, 5),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_steps_and_rates_of_any_size(is_ssd, dtype, seed, seqlen, low, decades, rate, dt_softplus, chunk_size):
    """dt over some decades between 1e-8 and 1e4 in one sequence, A down to -1e5: no NaN, and every digit of the gate."""
    op = cases.SSD_SCAN if is_ssd else cases.SELECTIVE_SCAN
    rng = np.random.default_rng(seed)
    inputs = op.inputs(
        rng, dtype, batch=1, seqlen=seqlen, omit=("dt_bias",), dt_dtype="float64" if dtype == "float64" else "float32"
    )
    inputs["dt"] = (10 ** rng.uniform(low, min(low + decades, 4), inputs["dt"].shape)).astype(inputs["dt"].dtype)
    inputs["A"] = (inputs["A"] / 16 * 10**rate).astype(inputs["A"].dtype)
    if dtype == "float16":  # keep y within its range
        inputs["x"] = (inputs["x"] / 1024 / max(1, float(inputs["dt"].max()))).astype(np.float16)
    op.check(CPU, inputs, dt_softplus=dt_softplus, **({"chunk_size": chunk_size} if is_ssd else {}))
