"""statescan.nn: published names, shapes and initial values; mixers against a plain recurrence; checkpoints; generation."""

import dataclasses
import json
import math
import sys
import types

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from statescan.nn import CausalLM, CausalLMConfig, Mamba, Mamba2, RMSNormGated, State

LAYERS = {"Mamba1": {"d_state": 5, "dt_rank": 3}, "Mamba2": {"headdim": 8, "d_state": 5, "ngroups": 2}}
every_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240531)


def config(layer, **changes):
    return CausalLMConfig(
        **{"d_model": 24, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"layer": layer, **LAYERS[layer]}, **changes}
    )


def tokens(*shape):
    return torch.randint(0, 29, shape)


# ---- names, shapes, initial values ---------------------------------------------------------------------------------------------
PUBLISHED = {  # of state-spaces/mamba-130m and mamba2-130m, one layer
    "Mamba1": {
        "norm.weight": (768,),
        "mixer.A_log": (1536, 16),
        "mixer.D": (1536,),
        "mixer.in_proj.weight": (3072, 768),
        "mixer.conv1d.weight": (1536, 1, 4),
        "mixer.conv1d.bias": (1536,),
        "mixer.x_proj.weight": (80, 1536),
        "mixer.dt_proj.weight": (1536, 48),
        "mixer.dt_proj.bias": (1536,),
        "mixer.out_proj.weight": (768, 1536),
    },
    "Mamba2": {
        "norm.weight": (768,),
        "mixer.A_log": (24,),
        "mixer.D": (24,),
        "mixer.dt_bias": (24,),
        "mixer.in_proj.weight": (3352, 768),
        "mixer.conv1d.weight": (1792, 1, 4),
        "mixer.conv1d.bias": (1792,),
        "mixer.norm.weight": (1536,),
        "mixer.out_proj.weight": (768, 1536),
    },
}


@every_layer
def test_parameters_have_the_published_names_and_shapes(layer):
    published = CausalLMConfig.from_published(
        {"d_model": 768, "n_layer": 1, "vocab_size": 50277, "ssm_cfg": {"layer": layer}, "rms_norm": True, "fused_add_norm": True}
    )
    with torch.device("meta"):
        model = CausalLM(published)
    expected = {
        "backbone.embedding.weight": (50280, 768),
        "backbone.norm_f.weight": (768,),
        "lm_head.weight": (50280, 768),
        **{f"backbone.layers.0.{name}": shape for name, shape in PUBLISHED[layer].items()},
    }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_initial_values_are_the_published_ones():
    mamba, mamba2 = Mamba(64), Mamba2(256, headdim=4)
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert mamba.dt_proj.weight.abs().max() <= 4**-0.5
    assert 1 <= mamba2.A_log.exp().min() < 2 and 15 < mamba2.A_log.exp().max() <= 16
    for bias in (mamba.dt_proj.bias, mamba2.dt_bias):
        dt = F.softplus(bias)
        assert 0.00099 < dt.min() < 0.002 and 0.05 < dt.max() < 0.101
    for mixer in (mamba, mamba2):
        assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    model = CausalLM(config("Mamba1", n_layer=4, ssm_cfg={"bias": True}))
    out = model.backbone.layers[0].mixer.out_proj
    assert out.weight.abs().max() <= 1 / math.sqrt(48) / math.sqrt(4) and out.bias.abs().max() == 0
    assert model.backbone.layers[0].mixer.dt_proj.bias.max() < -2
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 0.005


def test_matrices_alone_are_decayed():
    model = CausalLM(config("Mamba1"))
    decayed, others = (group["params"] for group in model.parameter_groups(0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed} == {"embedding", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in others} == {"A_log", "D", "bias", "weight"}
    assert len(decayed) + len(others) == len(names)


# ---- the mixers against their definition -----------------------------------------------------------------------------------------
def convolve(x, conv, before):
    """silu of the causal convolution of x [b,l,d] behind the inputs `before` [b,d,w-1]."""
    padded = torch.cat([before.transpose(1, 2), x], 1)
    width, length = conv.weight.shape[2], x.shape[1]
    y = sum(padded[:, k : k + length] * conv.weight[:, 0, k] for k in range(width))
    return F.silu(y if conv.bias is None else y + conv.bias), padded[:, length:].transpose(1, 2)


def recur(x, dt, A, B, C, D, state):
    """x, dt [b,l,d]; A [d,n]; B, C [b,l,d,n]; D [d]; state [b,d,n] -> y [b,l,d] and the last state."""
    outputs = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1), state


def plain_mamba(m, u, before):
    x, z = m.in_proj(u).chunk(2, -1)
    x, conv = convolve(x, m.conv1d, before.conv)
    dt, B, C = m.x_proj(x).split((m.dt_rank, m.d_state, m.d_state), -1)
    spread = lambda v: v[:, :, None].expand(*x.shape, m.d_state)
    y, state = recur(x, F.softplus(m.dt_proj(dt)), -m.A_log.exp(), spread(B), spread(C), m.D, before.ssm)
    return m.out_proj(y * F.silu(z)), State(conv, state)


def plain_mamba2(m, u, before):
    d_mlp = m.d_inner - m.d_ssm
    z0, x0, z, xBC, dt = m.in_proj(u).split((d_mlp, d_mlp, m.d_ssm, m.conv_dim, m.nheads), -1)
    xBC, conv = convolve(xBC, m.conv1d, before.conv)
    x, B, C = xBC.split((m.d_ssm, m.ngroups * m.d_state, m.ngroups * m.d_state), -1)
    dt = F.softplus(dt + m.dt_bias)
    dt = dt if m.dt_limit is None else dt.clamp(*m.dt_limit)
    spread = lambda v: v.unflatten(-1, (m.ngroups, m.d_state)).repeat_interleave(m.d_ssm // m.ngroups, 2)
    per_head = lambda v: v.repeat_interleave(m.headdim, -1)
    A = per_head(-m.A_log.exp())[:, None].expand(-1, m.d_state)
    D = m.D if m.D_has_hdim else per_head(m.D)
    y, state = recur(x, per_head(dt), A, spread(B), spread(C), D, before.ssm.flatten(1, 2))
    if m.norm is None:
        y = y * F.silu(z)
    else:
        y = y if m.norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (-1, m.norm_group_size))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + m.norm_eps)).flatten(-2) * m.norm.weight
        y = y * F.silu(z) if m.norm_before_gate else y
    y = m.out_proj(torch.cat([F.silu(z0) * x0, y], -1))
    return y, State(conv, state.unflatten(1, (m.nheads, m.headdim)))


MIXERS = {
    "mamba": lambda: Mamba(24, d_state=5, dt_rank=3),
    "mamba, biases": lambda: Mamba(24, d_state=5, bias=True, conv_bias=False, d_conv=3, dt_init="constant"),
    "mamba2": lambda: Mamba2(24, headdim=8, d_state=5, ngroups=2),
    "mamba2, no norm": lambda: Mamba2(24, headdim=8, d_state=5, rmsnorm=False, bias=True, conv_init=0.5),
    "mamba2, norm first": lambda: Mamba2(24, headdim=8, d_state=5, norm_before_gate=True, D_has_hdim=True, norm_group_size=8),
    "mamba2, limits": lambda: Mamba2(24, headdim=8, d_state=5, dt_limit=(0.004, 0.02), chunk_size=16),
    "mamba2, mlp": lambda: Mamba2(24, headdim=8, d_state=5, d_ssm=32),
}
every_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def made(make):
    """A float64 mixer with every parameter away from its initial value, an input and a state."""
    mixer = make().double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    u = torch.randn(2, 19, 24, dtype=torch.float64)
    return mixer, u, State(*(torch.randn_like(part) for part in mixer.zero_state(2)))


@every_mixer
def test_a_mixer_is_its_definition(make):
    mixer, u, before = made(make)
    plain = plain_mamba if isinstance(mixer, Mamba) else plain_mamba2
    y, after = mixer(u, initial_state=before, return_final_state=True)
    expected = plain(mixer, u, before)
    for got, value in zip((y, *after), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got, value)
    torch.testing.assert_close(mixer(u), plain(mixer, u, mixer.zero_state(2))[0])


@every_mixer
def test_gradients_of_a_mixer(make):
    """Of every parameter, the input and the initial state, through the output and the final state."""
    mixer, u, before = made(make)
    leaves = [u.requires_grad_(), *(part.requires_grad_() for part in before), *mixer.parameters()]
    weights = [torch.randn_like(u), *(torch.randn_like(part) for part in before)]

    def grads(y, after):
        return torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, (y, *after))), leaves)

    plain = plain_mamba if isinstance(mixer, Mamba) else plain_mamba2
    got = grads(*mixer(u, initial_state=before, return_final_state=True))
    for one, other in zip(got, grads(*plain(mixer, u, before)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@every_mixer
def test_steps_continue_a_scan(make):
    mixer, u, before = made(make)
    whole = mixer(u, initial_state=before)
    y, state = mixer(u[:, :7], initial_state=before, return_final_state=True)
    one = mixer.step(u[:, 7], state)
    several = mixer.step(u[:, 8:12], state)
    rest = mixer(u[:, 12:], initial_state=state)
    torch.testing.assert_close(torch.cat([y, one[:, None], several, rest], 1), whole)
    state = mixer.zero_state(2)
    first = torch.stack([mixer.step(u[:, t], state) for t in range(3)], 1)
    torch.testing.assert_close(first, mixer(u[:, :3]))


@every_layer
def test_packed_sequences(layer):
    model = CausalLM(config(layer))
    ids = tokens(1, 30)
    cu_seqlens = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    logits, states = model(ids, cu_seqlens=cu_seqlens, return_final_states=True)
    for i, (start, stop) in enumerate(((0, 11), (11, 30))):
        alone, after = model(ids[:, start:stop], return_final_states=True)
        torch.testing.assert_close(logits[:, start:stop], alone)
        torch.testing.assert_close(states[0].ssm[[0, 2][i]], after[0].ssm[0])


def test_gated_norm_module():
    norm = RMSNormGated(24, group_size=8, eps=1e-3)
    x, z = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    gated = (x * F.silu(z)).unflatten(-1, (3, 8))
    expected = (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-3)).flatten(-2)
    torch.testing.assert_close(norm(x, z), expected)
    with pytest.raises(ValueError, match="gated_rms_norm: group_size"):
        RMSNormGated(24, group_size=7)(x)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="Mamba2: headdim=7 must divide"):
        Mamba2(24, headdim=7)
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(24, dt_init="ones")
    with pytest.raises(ValueError, match="'Mamba3'"):
        CausalLMConfig(ssm_cfg={"layer": "Mamba3"})
    model = CausalLM(config("Mamba2"))
    with pytest.raises(ValueError, match="initial_states has 1 entries; expected one for each of 2 layers"):
        model(tokens(1, 3), initial_states=model.zero_states(1)[:1])


# ---- the model -------------------------------------------------------------------------------------------------------------------
@every_layer
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_generation_takes_the_likeliest_tokens(layer, dtype):
    model = CausalLM(config(layer), dtype=dtype)
    ids = tokens(3, 5)
    out = model.generate(ids, 6, temperature=0)
    assert torch.equal(out[:, :5], ids) and out.shape == (3, 11)
    if dtype == torch.float32:
        logits = model(out)[:, 4:-1, :29]
        assert torch.equal(logits.argmax(-1), out[:, 5:])


@every_layer
def test_generation_by_chance(layer):
    model = CausalLM(config(layer))
    draw = lambda seed, **options: model.generate(tokens(1, 1) * 0, 40, generator=torch.Generator().manual_seed(seed), **options)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    likeliest = model.generate(torch.zeros(1, 1, dtype=torch.long), 40, temperature=0)
    assert torch.equal(draw(1, top_k=1), likeliest)
    assert torch.equal(draw(1, top_p=1e-6), likeliest)
    drawn = draw(1, top_k=3)
    ranks = (model(drawn)[0, :-1, :29] > model(drawn)[0, :-1].gather(1, drawn[0, 1:, None])).sum(-1)
    assert ranks.unique().tolist() == [0, 1, 2]
    assert draw(3).max() < 29  # never one of the padded rows


def test_generation_ends_at_eos():
    model = CausalLM(config("Mamba2"))
    ids = tokens(2, 4)
    free = model.generate(ids, 8, temperature=0)
    eos = int(free[0, 6])
    out = model.generate(ids, 8, temperature=0, eos_token_id=eos)
    end = (free[0, 4:] == eos).nonzero()[0, 0] + 4
    assert torch.equal(out[0, : end + 1], free[0, : end + 1]) and bool((out[0, end:] == eos).all())
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(ids[:, :0], 3)


@every_layer
def test_states_can_be_learnt(layer):
    """State tuning: with the model frozen, gradients reach the initial states and lower the loss."""
    model = CausalLM(config(layer)).requires_grad_(False)
    ids = tokens(4, 12)
    learnt = [torch.nn.Parameter(torch.zeros_like(state.ssm)) for state in model.zero_states(1)]
    optimizer = torch.optim.Adam(learnt, lr=0.1)
    losses = []
    for _ in range(8):
        states = [State(None, ssm.expand(4, *ssm.shape[1:])) for ssm in learnt]
        logits = model(ids[:, :-1], initial_states=states)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3


@every_layer
def test_compiled_training_step(layer):
    """Compiled whole, under autocast: the loss and gradients of the eager step."""
    import torch._dynamo

    torch._dynamo.reset()
    model = CausalLM(config(layer))
    ids = tokens(2, 20)

    def loss_of(run):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    eager, compiled = loss_of(model), loss_of(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, eager)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------
@every_layer
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_saved_and_loaded(layer, tied, tmp_path):
    model = CausalLM(config(layer, tie_embeddings=tied))
    model.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids), model(ids))
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
    narrow = CausalLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


@every_layer
def test_mamba_ssm_checkpoint(layer, tmp_path):
    """As published: a config.json with fields of its own, and pytorch_model.bin with the output projection in it."""
    model = CausalLM(config(layer))
    published = {
        **dataclasses.asdict(model.config),
        "fused_add_norm": True,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "d_intermediate": 0,
    }
    del published["norm_epsilon"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    ids = tokens(2, 9)
    assert torch.equal(CausalLM.from_pretrained(tmp_path)(ids), model(ids))


HUGGING_FACE = {
    "Mamba1": {"model_type": "mamba", "time_step_rank": 3},
    "Mamba2": {
        "model_type": "mamba2", "num_heads": 6, "head_dim": 8, "n_groups": 2, "tie_word_embeddings": False,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    },
}  # fmt: skip


@every_layer
def test_hugging_face_checkpoint(layer, tmp_path):
    """Its names of sizes, its name of the embedding, and shards."""
    from safetensors.torch import save_file

    tied = layer == "Mamba1"
    model = CausalLM(config(layer, vocab_size=32, tie_embeddings=tied))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 5, "conv_kernel": 4, "expand": 2}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "hidden_act": "silu", **HUGGING_FACE[layer]}))
    weights = {name.replace(".embedding.", ".embeddings."): value for name, value in model.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name].contiguous() for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ids = tokens(2, 9)
    assert torch.equal(CausalLM.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("layer, ngroups", (("Mamba1", 1), ("Mamba2", 1), ("Mamba2", 2)))
def test_beside_transformers(layer, ngroups, tmp_path):
    """The logits of Hugging Face's own model, from the files that it writes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 2}
    if layer == "Mamba1":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=3))
    else:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**sizes, num_heads=6, head_dim=8, n_groups=ngroups, chunk_size=8)
        )
        if ngroups > 1 and not hasattr(theirs.backbone.layers[0].mixer.norm, "group_size"):
            pytest.skip("this transformers normalises all groups together, where mamba-ssm and later ones do so group by group")
    theirs.eval().save_pretrained(tmp_path)
    ids = torch.randint(0, 32, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(CausalLM.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = CausalLM(config("Mamba2"))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**written, **changes}))
        return CausalLM.from_pretrained(tmp_path)

    for change in ({"n_layer": 3}, {"n_layer": 1}, {"d_model": 32}, {"tie_embeddings": False}):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
            load(**change)
    with pytest.raises(NotImplementedError, match="attn_layer_idx=\\[1\\]: attention"):
        load(attn_layer_idx=[1])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon_mamba"}))
    with pytest.raises(NotImplementedError, match="model_type is 'falcon_mamba'"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors"):
        load()


def test_published_names_go_through_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"some/model is no folder.*pip install 'statescan\[hub\]'"):
        CausalLM.from_pretrained("some/model")
    model = CausalLM(config("Mamba1"))
    model.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    loaded = CausalLM.from_pretrained("some/model", revision="main")
    assert asked == [("some/model", "main")]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
