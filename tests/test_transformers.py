"""Models of Hugging Face transformers on statescan.compat, against their own torch code."""

import inspect
import sys

import pytest
import statescan.compat
import support

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.15")

from statescan.bench.bench_transformers import (
    MODELS,
    TRAINED_OTHERWISE,
    both_ways,
    build,
    cache_name,
    difference,
    gradients,
    largest_difference,
)

# Both sides compute in float32, by other sums: several layers of rounding lie between them.
SAME = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quiet():
    verbosity, tf32 = transformers.logging.get_verbosity(), torch.backends.cudnn.allow_tf32
    transformers.logging.set_verbosity_error()
    torch.backends.cudnn.allow_tf32 = False  # the models' own convolutions
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="module", params=[(device.name, name) for device in support.DEVICES for name in MODELS], ids="-".join)
def model(request):
    device, name = request.param
    return build(name).to(device)


@pytest.fixture
def ids(request):
    tokens = torch.randint(3, 512, (2, 37), generator=torch.Generator().manual_seed(1))
    return tokens.to(request.getfixturevalue("model").device) if "model" in request.fixturenames else tokens


@pytest.fixture
def padded(ids):
    """A mask that hides the first tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


def served(model):
    """The functions of the two packages in the module of a model: by name, those that are called now."""
    found = {}
    for name, function in vars(sys.modules[type(model).__module__]).items():
        if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            decorated = inspect.getclosurevars(function).nonlocals
            if decorated.get("package") in ("mamba_ssm", "causal_conv1d"):
                found[name] = decorated["implementation"]
    return found


def test_the_models_find_the_functions(model):
    ours, theirs = both_ways(lambda: served(model))
    assert len(ours) >= 4
    assert all(function.__module__.startswith("statescan.compat.") for function in ours.values())
    assert all(function.__module__ == type(model).__module__ for function in theirs.values())


@torch.no_grad()
def test_logits(model, ids, padded):
    for mask in (torch.ones_like(ids), padded):
        ours, theirs = both_ways(lambda mask=mask: model(input_ids=ids, attention_mask=mask).logits)
        assert difference(ours[mask.bool()], theirs[mask.bool()]) < SAME


def compare_gradients(model, ids):
    ours, theirs = both_ways(lambda: gradients(model, ids))
    assert largest_difference(ours, theirs) < 10 * SAME


def test_gradients(model, ids):
    compare_gradients(model, ids)


def test_gradients_of_the_fused_block(model, ids):
    """In training mode most models call one function for a whole block."""
    if model.config.model_type in TRAINED_OTHERWISE:
        pytest.skip("in training mode transformers and mamba-ssm normalise dt in another place than the model itself")
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNormGated")]
    if any(not hasattr(norm, "group_size") and not hasattr(norm, "n_groups") for norm in norms):
        pytest.skip("this transformers' own code normalises all groups together")
    model.train()
    try:
        compare_gradients(model, ids)
    finally:
        model.eval()


def test_generation(model, ids, padded):
    def generate():
        out = model.generate(
            ids, attention_mask=padded, max_new_tokens=10, min_new_tokens=10, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences, torch.stack(out.logits)

    (our_tokens, ours), (their_tokens, theirs) = both_ways(generate)
    assert difference(ours, theirs) < SAME
    assert torch.equal(our_tokens, their_tokens)


def test_decode_steps_with_gradients_enabled(model, ids):
    def decode():
        out = model(input_ids=ids[:, :-3], use_cache=True)
        cache = {cache_name(model): getattr(out, cache_name(model))}
        return torch.cat([model(input_ids=ids[:, t : t + 1], use_cache=True, **cache).logits for t in (34, 35, 36)])

    ours, theirs = both_ways(decode)
    assert difference(ours.detach(), theirs.detach()) < SAME


@torch.no_grad()
def test_bfloat16(model, ids):
    """Both sides round to bfloat16; ours must not lie further from float32 than theirs by much."""

    def forward():
        out = model(input_ids=ids, use_cache=True)
        cache = {cache_name(model): getattr(out, cache_name(model))}
        return torch.cat([out.logits, model(input_ids=ids[:, :1], use_cache=True, **cache).logits], dim=1).float()

    _, exact = both_ways(forward)
    try:
        model.to(torch.bfloat16)
        ours, theirs = both_ways(forward)
    finally:
        model.to(torch.float32)
    assert difference(ours, exact) < 1.5 * difference(theirs, exact) + SAME


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_compiled_without_a_graph_break(name, ids):
    model = build(name)
    statescan.compat.install(force=True)
    try:
        eager = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = compiled(input_ids=ids, use_cache=False).logits  # some versions of transformers take their own path when compiled
        assert difference(got, eager) < SAME
    finally:
        statescan.compat.uninstall()
        torch.compiler.reset()


@torch.no_grad()
def test_autocast(model, ids):
    def forward():
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            return model(input_ids=ids, use_cache=True).logits.float()

    exact = model(input_ids=ids, use_cache=False).logits
    ours, theirs = both_ways(forward)
    assert difference(ours, exact) < 1.5 * difference(theirs, exact) + SAME


def test_a_model_imported_before_install_and_after_uninstall(ids):
    model = build("mamba2")
    with torch.no_grad():
        before = model(input_ids=ids).logits
        both_ways(lambda: None)
        assert torch.equal(model(input_ids=ids).logits, before)


@torch.no_grad()
def test_packed_sequences(ids):
    """seq_idx keeps the sequences of a row apart, which the models' own code can't."""
    from transformers.integrations import hub_kernels

    backbone = build("mamba2").backbone
    lengths = [9, 20, 8]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).to(torch.int32)[None]
    refusal = "can't keep packed sequences apart"
    if refusal in inspect.getsource(hub_kernels):  # versions before it mix them up
        with pytest.raises(ValueError, match=refusal):
            backbone(input_ids=ids[:1], seq_idx=seq_idx, use_cache=False)

    def run(*rows, **options):
        return torch.cat([backbone(input_ids=row, use_cache=False, **options).last_hidden_state for row in rows], 1)

    statescan.compat.install(force=True)
    try:
        packed, alone = run(ids[:1], seq_idx=seq_idx), run(*ids[:1].split(lengths, 1))
    finally:
        statescan.compat.uninstall()
    assert difference(packed, alone) < SAME


def test_falcon_mamba_in_training_mode_is_what_mamba_ssm_makes_of_it(ids):
    """mamba_inner_fn normalises dt after dt_proj, the model before it: with mamba-ssm too it then is another function."""
    model = build("falcon_mamba")
    with torch.no_grad():
        ours, theirs = both_ways(lambda: model.train()(input_ids=ids, use_cache=False).logits)
    assert difference(ours, theirs) > 0.01
