"""statescan.nn and the demo's training on a GPU, beside the same on the CPU."""

import copy

import pytest
from support import DEVICES

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from statescan.demo import corpus, train
from statescan.demo.config import Config
from statescan.nn import CausalLM, CausalLMConfig, Mamba, Mamba2, State

pytestmark = pytest.mark.skipif(len(DEVICES) < 2, reason="needs a CUDA device")

MIXERS = {
    "mamba": lambda: Mamba(64, d_state=16),
    "mamba2": lambda: Mamba2(64, headdim=32, d_state=64, ngroups=2),
    "mamba2, no norm": lambda: Mamba2(64, headdim=32, d_state=64, rmsnorm=False, bias=True),
    "mamba2, norm first": lambda: Mamba2(64, headdim=16, d_state=32, norm_before_gate=True, D_has_hdim=True),
    "mamba2, mlp": lambda: Mamba2(64, headdim=32, d_state=24, d_ssm=96),
}
LAYERS = {"Mamba1": {"d_state": 8}, "Mamba2": {"headdim": 16, "d_state": 32, "ngroups": 2}}
every_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def close(got, expected, name="", limit=1e-4):
    """Both devices compute in float32, by other sums; in the root mean square."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    error = (got - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= limit, f"{name}: relative difference {error:.3g}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240531)


def model_of(layer):
    sizes = {"d_model": 48, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"layer": layer, **LAYERS[layer]}}
    return CausalLM(CausalLMConfig(**sizes))


def tokens(*shape):
    return torch.randint(0, 29, shape)


def on_gpu(value):
    return State(*(part.cuda() for part in value)) if isinstance(value, State) else value.cuda()


@every_mixer
def test_a_mixer_and_its_gradients(make):
    """From a state and to one; of every parameter, the input and the initial state."""
    mixer = make()
    u, before = torch.randn(2, 75, 64), State(*(torch.randn_like(part) for part in mixer.zero_state(2)))
    weights = [torch.randn(2, 75, 64), *(torch.randn_like(part) for part in before)]
    results = []
    for put in (lambda v: v, on_gpu):
        twin = copy.deepcopy(mixer).to(put(u).device)
        given, state = put(u).requires_grad_(), State(*(put(part).clone().requires_grad_() for part in before))
        y, after = twin(given, initial_state=state, return_final_state=True)
        outputs = (y, *after)
        loss = sum((put(w) * r).sum() for w, r in zip(weights, outputs))
        leaves = [given, *state, *twin.parameters()]
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    names = ["y", "conv", "ssm", "du", "dconv", "dssm", *(name for name, _ in mixer.named_parameters())]
    for name, one, other in zip(names, results[1], results[0], strict=True):
        close(one, other, name)


@every_mixer
def test_steps_continue_a_scan(make):
    mixer = make().cuda()
    u = torch.randn(2, 40, 64, device="cuda")
    with torch.no_grad():
        whole = mixer(u)
        y, state = mixer(u[:, :30], return_final_state=True)
        steps = [mixer.step(u[:, t], state) for t in range(30, 36)]
        rest = mixer(u[:, 36:], initial_state=state)
    close(torch.cat([y, torch.stack(steps, 1), rest], 1), whole)


@every_layer
def test_packed_sequences(layer):
    model = model_of(layer).cuda()
    ids = tokens(1, 90).cuda()
    bounds = [0, 31, 31, 90]
    logits, states = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32).cuda(), return_final_states=True)
    for i in (0, 2):
        alone, after = model(ids[:, bounds[i] : bounds[i + 1]], return_final_states=True)
        close(logits[:, bounds[i] : bounds[i + 1]], alone)
        close(states[0].ssm[i], after[0].ssm[0])


@every_layer
def test_generation(layer):
    model = model_of(layer)
    ids = tokens(3, 21)
    expected = model.generate(ids, 12, temperature=0)
    assert torch.equal(copy.deepcopy(model).cuda().generate(ids.cuda(), 12, temperature=0).cpu(), expected)


def gradients(model, run, ids, autocast):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


@every_layer
@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "autocast"))
def test_compiled_training_step(layer, autocast):
    """Compiled whole: the loss and gradients of the eager step, on any length."""
    import torch._dynamo

    torch._dynamo.reset()
    model = model_of(layer).cuda()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (40, 71):
        ids = tokens(2, seqlen).cuda()
        eager = gradients(model, model, ids, autocast)
        for name, value in gradients(model, compiled, ids, autocast).items():
            close(value, eager[name], name, 2e-2 if autocast else 1e-5)


@every_layer
def test_training_step_in_a_cuda_graph(layer):
    model = model_of(layer).cuda()
    static, fresh = tokens(2, 70).cuda(), tokens(2, 70).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(model, model, static, True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, model, static, True)
    static.copy_(fresh)
    graph.replay()
    got = {name: value.clone() for name, value in captured.items()}
    for name, value in gradients(model, model, fresh, True).items():
        close(got[name], value, name, 1e-5)


MUON = [{"muon_learning_rate": 1e-2}] if hasattr(torch.optim, "Muon") else []  # torch 2.9 and newer


@pytest.mark.parametrize("options", ({}, {"dropout": 0.2}, *MUON), ids=str)
def test_demo_training(tmp_path, options):
    """Step for step the losses of the CPU, and a resumed run those of the uninterrupted one."""
    settings = train.Settings(
        steps=20, rows=2, window=128, learning_rate=1e-2, warmup=0.1, evaluations=2, fake_quantise_from=0.8, **options
    )
    config = Config(d_model=32, n_layer=2, headdim=16, dstate=16, ngroups=2)
    documents = corpus.load_bytes(corpus.default_root() / name for name in ("bisect.py", "colorsys.py", "sched.py"))

    def make(device):
        return train.Trainer(config, settings, documents, torch.device(device))

    def losses(trainer, steps=20):
        return [trainer.train_step().item() for _ in range(steps)]

    interrupted = make("cuda")
    got = losses(interrupted, 12)
    interrupted.save_checkpoint(tmp_path / "run.pt")
    resumed = make("cuda")
    resumed.load_checkpoint(tmp_path / "run.pt")
    got += losses(resumed, 8)
    assert got == losses(make("cuda"))  # the same bits
    if "dropout" not in options:  # whose random numbers are the device's
        assert got == pytest.approx(losses(make("cpu")), rel=2e-2)
    assert sum(got[-5:]) < 0.75 * sum(got[:5])
