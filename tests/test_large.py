"""Large models: half precision, checkpointing, several devices, quantised weights, cached subspaces."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from conftest import tiny_bert, token_batches
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.adapters.rows import mixing_modules
from pyro_lrblora.adapters.targets import base_weight, find_targets, stored_parameters, weight_shape
from pyro_lrblora.head import FixedHead, head_parameters
from pyro_lrblora.infer.step import gradient_scaler, step
from pyro_lrblora.projections import DCT, SVD, Gradient, Random

DATA = token_batches(32)
QUICK = {"guide": lb.guides.Diagonal(), "epochs": 2, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def state(network):
    values = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    return values, flags, [m.training for m in network.modules()]


# --- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_fit_in_half_precision_is_near_that_in_single(precision):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(DATA)
    single, half = (lb.fit(model, DATA, precision=which, **QUICK) for which in ("fp32", precision))
    elbo = [[row["elbo"] for row in posterior.history] for posterior in (single, half)]
    assert elbo[0] != elbo[1]
    assert elbo[0] == pytest.approx(elbo[1], rel=0.02)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.guide.parameters())
    # The means move the same way, not only the loss.
    moved = [posterior.mean()["R"].flatten() for posterior in (single, half)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.95
    near = [lb.predict(half, DATA, precision=which).probs for which in ("fp32", precision)]
    assert (near[0] - near[1]).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [lb.LoRAXS(2, Gradient()), lb.LoRA(2)], ids=repr)
def test_a_base_stored_in_half_precision(dtype, adapter):
    losses = []
    for stored in (torch.float32, dtype):
        network = tiny_bert().to(stored)
        before = state(network)
        posterior = lb.fit(lb.BayesianLoRA(network, adapter), DATA, **QUICK)
        assert all(torch.equal(a, b) for a, b in zip(before[0].values(), network.state_dict().values(), strict=True))
        assert all(p.dtype == torch.float32 for p in posterior.guide.parameters())
        assert posterior.model.adapted.factors(next(iter(posterior.model.modules)), torch.zeros((), dtype=stored))
        losses.append(posterior.history[-1]["elbo"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def tiny_gradient(scaled: bool) -> torch.Tensor:
    """The gradient of a latent that reaches it through an fp16 network smaller than fp16 can hold."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    network.requires_grad_(False)[1].weight.mul_(1e-6)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, Random(), targets=["0"]), head="frozen", size=1)
    latents = torch.zeros(1, 2, 2, requires_grad=True)
    scaler = gradient_scaler(model, "fp16" if scaled else "fp32")
    with model.attached("fp16"):
        network_input = {"input": torch.ones(1, 4)}
        loss = 1e-3 * model.outputs(network_input, {"R": latents}, {}).float().sum()
        scaler.scale(loss).backward()
    optimiser = torch.optim.SGD([latents], lr=0.0)
    scaler.unscale_(optimiser)
    return latents.grad


def test_small_gradients_survive_fp16_by_loss_scaling():
    assert (tiny_gradient(scaled=False) == 0).any()
    assert (tiny_gradient(scaled=True) != 0).all()


def test_gradients_that_overflow_at_every_scale_are_an_error():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    scaler, parameter = gradient_scaler(model, "fp16"), nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)

    def overflowing_step():
        scaler.scale(parameter.sum()).backward()
        parameter.grad.fill_(torch.inf)
        step(optimiser, None, scaler)

    for _ in range(12):
        overflowing_step()
    with pytest.raises(FloatingPointError, match="bf16"):
        overflowing_step()
    assert parameter.item() == 0  # no such step is taken
    assert scaler.is_enabled()
    assert not gradient_scaler(model, "bf16").is_enabled()
    assert gradient_scaler(lb.BayesianLoRA(tiny_bert().half()), "fp32").is_enabled()


def test_an_unknown_precision_is_refused_before_any_work():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    with pytest.raises(ValueError, match="fp16"):
        lb.fit(model, DATA, precision="int4")
    with pytest.raises(ValueError, match="fp16"), model.attached("int4"):
        pass


# --- gradient checkpointing


def checkpointed(network, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network.gradient_checkpointing_enable(**kwargs)
    return network


def counted(network) -> list:
    """Every forward of the first layer from now on, as whether its dropout was on."""
    calls = []
    layer = network.bert.encoder.layer[0]
    layer.output.dense.register_forward_pre_hook(lambda module, args: calls.append(layer.training))
    return calls


@pytest.mark.parametrize("dropout", [False, True])
def test_a_fit_with_gradient_checkpointing_is_the_same_fit(dropout):
    posteriors, calls = [], []
    for network in (tiny_bert(), checkpointed(tiny_bert())):
        before = state(network)
        model = lb.BayesianLoRA(network, lb.LoRAXS(2), dropout=dropout).prepare(DATA, probe=False)
        mixing_modules(model, DATA[0])  # which runs the network too, once per model
        calls.append(counted(network))
        posteriors.append(lb.fit(model, DATA, warm_start=False, **QUICK))
        assert state(network)[1:] == before[1:]
        assert "_gradient_checkpointing_func" not in network.bert.encoder.layer[0].__dict__ or (
            "_checkpoint" not in repr(network.bert.encoder.layer[0]._gradient_checkpointing_func)
        )
    # Run again in backward, and in the mode that was asked for.
    assert len(calls[1]) == 2 * len(calls[0])
    assert set(calls[1]) == {dropout}
    torch.testing.assert_close(posteriors[0].mean()["R"], posteriors[1].mean()["R"])
    assert posteriors[0].history[-1]["elbo"] == pytest.approx(posteriors[1].history[-1]["elbo"])
    # Predictions have no backward.
    calls[1].clear()
    lb.predict(posteriors[1], DATA[:1], draws=1)
    assert calls[1] == [False]


def test_reentrant_checkpointing_is_refused():
    network = checkpointed(tiny_bert(), gradient_checkpointing_kwargs={"use_reentrant": True})
    before = state(network)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        lb.fit(lb.BayesianLoRA(network, lb.LoRAXS(2)), DATA, **QUICK)
    assert state(network)[1:] == before[1:]


# --- several devices


def spread(network, folder, head="cpu"):
    """Layer 1 on disk, fetched for every forward."""
    accelerate = pytest.importorskip("accelerate")
    devices = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    devices |= {"bert.pooler": "cpu", "classifier": head}
    return accelerate.dispatch_model(network, devices, offload_dir=folder, force_hooks=True)


def test_an_offloaded_network_is_fitted_like_any_other(tmp_path):
    adapter = lb.LoRAXS(2, SVD(), targets="all-linear")
    plain, network = tiny_bert(), spread(tiny_bert(), tmp_path / "weights")
    assert network.bert.encoder.layer[1].output.dense.weight.is_meta
    before = state(network)[1:]
    posteriors = [lb.fit(lb.BayesianLoRA(n, adapter), DATA, **QUICK) for n in (plain, network)]
    assert state(network)[1:] == before
    assert network.bert.encoder.layer[1].output.dense.weight.is_meta
    torch.testing.assert_close(posteriors[0].mean()["R"], posteriors[1].mean()["R"])
    torch.testing.assert_close(lb.predict(posteriors[0], DATA).logits, lb.predict(posteriors[1], DATA).logits)
    # What was fitted on one is loaded on the other.
    posteriors[1].save(tmp_path / "posterior")
    for base in (plain, network):
        loaded = lb.Posterior.load(tmp_path / "posterior", base)
        torch.testing.assert_close(lb.predict(loaded, DATA).logits, lb.predict(posteriors[1], DATA).logits)


def test_a_spread_network_is_not_moved_and_its_head_stays_in_memory(tmp_path):
    network = spread(tiny_bert(), tmp_path)
    with pytest.raises(ValueError, match="device=None"):
        lb.fit(lb.BayesianLoRA(network, lb.LoRAXS(2)), DATA, device="cpu", **QUICK)
    with pytest.raises(ValueError, match=r"expected the head in memory.*'classifier.weight' on device 'meta'"):
        lb.BayesianLoRA(spread(tiny_bert(), tmp_path, head="disk"))


class TwoDevices(nn.Module):
    """A layer on the CPU and one on the device "meta", which has shapes, no values, and no truck with the CPU."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3, device="meta")

    def forward(self, x):
        return self.second(self.first(x).tanh().to("meta"))


@pytest.mark.parametrize("adapter", [lb.LoRAXS(2, DCT(), "all-linear"), lb.LoRA(2, "all-linear")], ids=repr)
@pytest.mark.parametrize("rows", [(), (4,)], ids=["shared", "per row"])
def test_latents_and_factors_follow_their_layer(adapter, rows):
    model = lb.BayesianLoRA(TwoDevices(), adapter, size=4)
    assert model.device.type == "cpu"
    model._mixing = []  # "meta" has no values that could tell
    latents = {name: torch.zeros(*rows, *shape) for name, shape in model.sites.shapes.items()}
    outputs = model.outputs({"x": torch.zeros(4, 6)}, latents, {})
    assert (outputs.device.type, outputs.shape) == ("meta", (4, 3))


# --- quantised weights


def wide_bert():
    """Rows are whole blocks of 64: on CPUs with AVX-512 bitsandbytes 0.50 dequantises others wrongly."""
    return tiny_bert(width=64, intermediate=128)


def quantised_by_bitsandbytes(bits: int):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    network = wide_bert()
    for name, linear in find_targets(network, "all-linear", exclude=["classifier"]).items():
        m, n = weight_shape(linear)
        kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
        new = kind(n, m, **({"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}))
        new.load_state_dict(linear.state_dict())
        network.set_submodule(name, new.to("cpu"))
    return network.eval().requires_grad_(False)


def quantised_by_torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    network = wide_bert()
    inside = lambda module, name: isinstance(module, nn.Linear) and "classifier" not in name
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig(), inside)
    return network


@pytest.mark.chosen_head_scale
@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: quantised_by_bitsandbytes(4), 0.15),
        (lambda: quantised_by_bitsandbytes(8), 0.02),
        (quantised_by_torchao, 0.02),
    ],
    ids=["bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao 8 bit"],
)
def test_a_quantised_base(build, error, tmp_path):
    network, plain = build(), wide_bert()
    for name, module in find_targets(plain, "all-linear", exclude=["classifier"]).items():
        stored = network.get_submodule(name)
        assert weight_shape(stored) == module.weight.shape
        found, true = base_weight(stored), module.weight
        assert 0 < (found - true).norm() < error * true.norm()
    before = {name: value.clone() for name, value in stored_parameters(network)}
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, Gradient(), targets="all-linear"))
    posterior = lb.fit(model, DATA, **QUICK)
    assert all(torch.equal(before[name], value) for name, value in stored_parameters(network))
    single = lb.fit(lb.BayesianLoRA(plain, model.adapter), DATA, **QUICK)
    assert posterior.history[-1]["elbo"] == pytest.approx(single.history[-1]["elbo"], rel=0.1)
    base_after = base_weight(next(iter(model.modules.values())))  # a forward moves the scales of 8 bit weights
    assert base_after.shape == next(iter(plain.bert.encoder.layer[0].attention.self.children())).weight.shape
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, network)
    assert torch.equal(lb.predict(loaded, DATA).logits, lb.predict(posterior, DATA).logits)
    if error > 0.1:  # what is nearer than 2% is the same base
        with pytest.raises(ValueError, match="expected the base this posterior was fitted on"):
            lb.Posterior.load(tmp_path, plain)


def test_weights_packed_for_inference_are_refused():
    network = quantised_by_bitsandbytes(4)
    layer = network.bert.encoder.layer[0].output.dense
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on CPUs with AVX-512 BF16 only")
    for adapter in (lb.LoRAXS(2, DCT(), "all-linear"), lb.LoRA(2, "all-linear")):
        lb.fit(lb.BayesianLoRA(network, adapter), DATA, **QUICK)
        assert layer.support_avx512bf16_for_cpu
    with torch.no_grad():
        layer(torch.zeros(1, 128))
    for adapter in (lb.LoRAXS(2, Gradient(), "all-linear"), lb.LoRA(2, "all-linear")):
        with pytest.raises(ValueError, match="packed for inference"):
            lb.fit(lb.BayesianLoRA(network, adapter), DATA, **QUICK)


def test_a_quantised_head_is_refused():
    network = tiny_bert()
    network.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="llm_int8_skip_modules"):
        lb.BayesianLoRA(network)


@dataclass(frozen=True)
class Watched:
    """A projection that notes how many of the weights it was given before are still in memory."""

    alive: list

    statistics = None

    def __call__(self, weight, rank, statistics, generator):
        import weakref

        self.alive.append(sum(seen() is not None for seen in self.alive if callable(seen)))
        self.alive.append(weakref.ref(weight))
        return DCT()(weight, rank, statistics, generator)


def test_one_weight_at_a_time_is_dequantised(monkeypatch):
    copy = lambda weight: weight.detach().clone()  # what dequantising does
    monkeypatch.setattr("pyro_lrblora.adapters.targets.plain_tensor", copy)
    alive: list = []
    network = tiny_bert()
    lb.BayesianLoRA(network, lb.LoRAXS(2, Watched(alive), targets="all-linear")).prepare(DATA, probe=False)
    assert [count for count in alive if not callable(count)] == [0] * 13


# --- subspaces on disk


class Counting:
    """How often a projection was computed."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for kind in (SVD, Gradient):
            monkeypatch.setattr(kind, "__call__", self.counted(kind.__call__))

    def counted(self, original):
        def call(*args):
            self.calls += 1
            return original(*args)

        return call


@pytest.mark.parametrize("projection", [SVD(), Gradient(), Gradient(label_free=True)], ids=repr)
def test_a_cached_subspace_is_found_again_and_nothing_else_is(projection, tmp_path, monkeypatch):
    count = Counting(monkeypatch)

    def tensors(network=None, data=DATA, rank=2, seed=0, **options):
        model = lb.BayesianLoRA(network or tiny_bert(), lb.LoRAXS(rank, projection), **options)
        return model.prepare(data, seed=seed, cache=tmp_path).adapted.tensors()

    computed = tensors()
    assert count.calls == 8
    found = tensors()
    assert count.calls == 8
    assert all(torch.equal(computed[name], found[name]) for name in computed)
    for other in ({"rank": 3}, {"seed": 1}, {"network": tiny_bert(seed=2)}):
        calls = count.calls
        tensors(**other)
        assert count.calls == calls + 8
    # Other data are another subspace only where the projection looks at them.
    calls = count.calls
    tensors(data=token_batches(32, seed=5))
    assert count.calls == calls + (0 if projection.statistics is None else 8)
    # So are another head and another likelihood.
    own = {name: value.detach() for name, value in head_parameters(tiny_bert()).items()}
    named = lb.likelihoods.Categorical(class_names=("a", "b", "c"))
    heads = [FixedHead({name: value + shift for name, value in own.items()}) for shift in (0.1, 0.2)]
    for other in ({"head": heads[0]}, {"head": heads[1]}, {"likelihood": named}):
        calls = count.calls
        tensors(**other)
        assert count.calls == calls + (0 if projection.statistics is None else 8)
    # A weight that is not adapted changes gradients, and not the weights.
    network, calls = tiny_bert(), count.calls
    with torch.no_grad():
        network.bert.pooler.dense.weight[0, 0] += 0.1
    tensors(network)
    assert count.calls == calls + (0 if projection.statistics is None else 8)


def test_what_is_no_tensor_in_a_batch_has_no_say_in_a_cached_subspace(tmp_path):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, Gradient()))
    model.prepare([batch | {"idx": ["a row"]} for batch in DATA], cache=tmp_path)
    model.prepare(DATA, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_file_is_computed_again_with_a_warning(damage, tmp_path):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    whole = model.prepare(DATA, cache=tmp_path).adapted.tensors()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    with pytest.warns(UserWarning, match="is written again"):
        again = model.prepare(DATA, cache=tmp_path).adapted.tensors()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_projection_that_cannot_be_told_from_others_is_refused(tmp_path):
    own = lambda weight, rank, statistics, generator: SVD()(weight, rank, statistics, generator)
    own.statistics = None
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, own))
    with pytest.raises(ValueError, match="cache=None"):
        model.prepare(DATA, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    model.prepare(DATA)


def test_a_base_in_many_files_needs_nothing_from_us(tmp_path):
    tiny_bert().save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    posteriors = [lb.fit(lb.BayesianLoRA(n, lb.LoRAXS(2)), DATA, **QUICK) for n in (tiny_bert(), network)]
    assert torch.equal(posteriors[0].mean()["R"], posteriors[1].mean()["R"])
