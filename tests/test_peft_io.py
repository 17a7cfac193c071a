"""Posteriors as PEFT adapters, and PEFT adapters as starts: peft itself is the reference."""

import json
import sys

import peft
import pyro
import pytest
import torch
import transformers
from conftest import label, tiny_bert, token_batches
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file
from test_adapters import assert_same_state, state, tiny_gpt2, tiny_llama, tiny_roberta
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.adapters.targets import base_weight
from pyro_lrblora.guides.stock import build_guide

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
NETWORKS = [tiny_bert, tiny_gpt2, tiny_llama, tiny_roberta]
ADAPTERS = [lb.LoRAXS(2, targets="all-linear"), lb.LoRA(3, targets="all-linear"), lb.LoRA(2, alpha=16)]
BATCH = {name: value for name, value in token_batches(8)[0].items() if name != "labels"}


def posterior_of(model, spec=lb.guides.Diagonal(), head_shift=0.5):
    """A posterior far from the base and wide, without a fit."""
    with pyro.settings.context(module_local_params=True), torch.no_grad():
        guide = build_guide(spec, model)
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for parameter in model.point_head.parameters() if model.point_head is not None else ():
            parameter.add_(head_shift * torch.randn_like(parameter))
    return lb.Posterior(model, guide, spec)


def in_peft(network, folder, **inputs):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(network, str(folder))(**(inputs or BATCH)).logits


def predicted(posterior, **options):
    return lb.predict(posterior, [BATCH], antithetic=False, **options).logits


def check_mean(posterior, base, folder):
    posterior.export_peft(folder)
    expected = predicted(posterior, at="mean")[0]
    # PEFT adds the update to outputs, a prediction to weights: sums in float32 of another order.
    torch.testing.assert_close(in_peft(base, folder), expected, atol=3e-5, rtol=1e-5)
    with torch.no_grad():
        plain = posterior.model.outputs(BATCH, posterior.model.start(), posterior.head()).logits
    assert (plain - expected).abs().max() > 1e-2
    return json.loads((folder / "adapter_config.json").read_text())


# --- export


@pytest.mark.parametrize("adapter", ADAPTERS, ids=label)
@pytest.mark.parametrize("build", NETWORKS)
def test_peft_has_the_logits_of_the_mean(build, adapter, tmp_path):
    network = build().train()
    network.requires_grad_(True)
    network.get_input_embeddings().weight.requires_grad_(False)
    posterior = posterior_of(lb.BayesianLoRA(network, adapter))
    base = build()
    for parameter in lb.head.head_parameters(base).values():
        nn.init.normal_(parameter)  # a new head: the exported one must be used
    before, random = state(network), torch.get_rng_state()
    posterior.export_peft(tmp_path)
    assert_same_state(before, state(network))
    assert torch.equal(torch.get_rng_state(), random)
    settings = check_mean(posterior, base, tmp_path)
    assert len(pyro.get_param_store()) == 0
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["lora_alpha"] == settings["r"] == adapter.rank
    assert settings["fan_in_fan_out"] == (build is tiny_gpt2)


@pytest.mark.parametrize("head", ["point", "bayesian", "frozen", "fixed"])
def test_every_kind_of_head_goes_along(head, tmp_path):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    if head == "fixed":
        head = lb.FixedHead({name: torch.randn_like(value) for name, value in model.head_start.items()})
    posterior = posterior_of(model.with_head(head))
    base = tiny_bert()
    nn.init.normal_(base.classifier.weight)
    check_mean(posterior, base, tmp_path / "mean")
    posterior.export_peft(tmp_path, draws=2, seed=3)
    for number, expected in enumerate(predicted(posterior, draws=2, seed=3)):
        found = in_peft(tiny_bert(), tmp_path / f"draw_{number:03d}")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_part_of_peft_s_own_head_module(targets, tmp_path):
    """RoBERTa's head is two layers, which peft keeps whole by itself: here one is the head and one may be adapted."""
    model = lb.BayesianLoRA(tiny_roberta(), lb.LoRAXS(2, targets=targets), head_modules=["classifier.out_proj"])
    assert ("classifier.dense" in model.modules) == (targets == "all-linear")
    assert check_mean(posterior_of(model), tiny_roberta(), tmp_path)["modules_to_save"] == ["classifier.out_proj"]


def test_modules_of_different_rank(tmp_path):
    adapter = lb.LoRAXS(6, lb.projections.Gradient(), "all-linear", budget=80)
    model = lb.BayesianLoRA(tiny_bert(), adapter).prepare(token_batches())
    settings = check_mean(posterior_of(model), tiny_bert(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {len(value) for name, value in tensors.items() if "lora_A" in name}
    assert len(ranks) > 1
    assert set(settings["rank_pattern"].values()) == ranks - {settings["r"]}
    assert settings["alpha_pattern"] == settings["rank_pattern"]


class Nested(nn.Module):
    """One adapted module's whole name is the end of another's."""

    def __init__(self):
        super().__init__()
        self.layer, self.inner = nn.Linear(7, 7), nn.Module()
        self.inner.layer, self.head = nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x):
        hidden = self.head(self.layer(x).tanh() + self.inner.layer(x).tanh())
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=hidden)


@pytest.mark.parametrize("targets", ["layer", ".*layer"])
def test_a_name_that_is_the_end_of_another(targets, tmp_path):
    torch.manual_seed(3)
    networks = [Nested(), Nested()]
    networks[1].load_state_dict(networks[0].state_dict())
    posterior = posterior_of(lb.BayesianLoRA(networks[0], lb.LoRAXS(2, targets=targets), head_modules=["head"]))
    posterior.export_peft(tmp_path)
    x = torch.randn(5, 7)
    found = in_peft(networks[1], tmp_path, x=x)
    torch.testing.assert_close(found, lb.predict(posterior, [{"x": x}], at="mean").logits[0], atol=1e-5, rtol=1e-5)


def test_such_names_with_different_ranks(tmp_path):
    torch.manual_seed(3)
    networks = [Nested(), Nested()]
    with torch.no_grad():
        networks[0].layer.weight.div_(50)  # so that the inner one gets the larger rank
        networks[0].layer.bias.zero_()
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(9, 7)
    adapter = lb.LoRAXS(5, lb.projections.Gradient(), ".*layer", budget=26)
    model = lb.BayesianLoRA(networks[0], adapter, head_modules=["head"])
    posterior = posterior_of(model.prepare([{"x": x, "labels": torch.arange(9) % 3}]))
    ranks = {name: len(basis.A) for name, basis in posterior.model.adapted.bases.items()}
    assert ranks["layer"] < ranks["inner.layer"]
    posterior.export_peft(tmp_path)
    found = in_peft(networks[1], tmp_path, x=x)
    torch.testing.assert_close(found, lb.predict(posterior, [{"x": x}], at="mean").logits[0], atol=1e-5, rtol=1e-5)


def test_a_language_model_has_no_head_to_save(tmp_path):
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    network = transformers.GPT2LMHeadModel(config).eval()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    text = lb.likelihoods.NextToken()
    posterior = posterior_of(lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"), likelihood=text))
    posterior.export_peft(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("CAUSAL_LM", None)
    expected = posterior.model.outputs(BATCH, posterior.mean(), {}).logits
    base = transformers.GPT2LMHeadModel(config).eval()
    base.load_state_dict(weights)
    torch.testing.assert_close(in_peft(base, tmp_path), expected, atol=1e-5, rtol=1e-5)


FAMILIES = [
    lb.guides.Diagonal(),
    lb.guides.LowRankPrecision(2),
    lb.guides.Flow(hidden=4),
    lb.guides.Mixture(2),
    lb.guides.Dropout(0.3),
    AutoNormal,
    "ensemble",
    "chains",
]


def of_family(family):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    if family == "chains":
        draws = {name: 0.5 * torch.randn(2, 6, *shape) for name, shape in model.sites.shapes.items()}
        return lb.Posterior(model, lb.guides.DrawsGuide(draws), lb.guides.Draws(2, 6))
    if family == "ensemble":
        rates = lb.Rates(loc=0.1, head=0.1)
        return lb.infer.ensemble(
            model, token_batches(16), members=2, guide=lb.guides.Delta(), rates=rates, epochs=2, progress=False
        )
    return posterior_of(model, family)


@pytest.mark.parametrize("family", FAMILIES, ids=label)
def test_each_draw_is_an_adapter(family, tmp_path):
    posterior = of_family(family)
    posterior.export_peft(tmp_path, draws=3, seed=5)
    expected = predicted(posterior, draws=3, seed=5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw_000", "draw_001", "draw_002"]
    for number in range(3):
        found = in_peft(tiny_bert(), tmp_path / f"draw_{number:03d}")
        torch.testing.assert_close(found, expected[number], atol=1e-5, rtol=1e-5)
    if family in ("ensemble", lb.guides.Mixture(2)):
        with pytest.raises(ValueError, match=r"mean of several modes.*draws=10"):
            posterior.export_peft(tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
    else:
        check_mean(posterior, tiny_bert(), tmp_path / "mean")


def test_what_cannot_be_exported_leaves_nothing(tmp_path, monkeypatch):
    posterior = posterior_of(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)))
    with pytest.raises(ValueError, match="draws to be an integer >= 1"):
        posterior.export_peft(tmp_path / "none", draws=0)
    posterior.export_peft(tmp_path, draws=3)
    with pytest.raises(ValueError, match="other draws, got .*draw_000"):
        posterior.export_peft(tmp_path)
    with pytest.raises(ValueError, match="other draws, got .*draw_002"):
        posterior.export_peft(tmp_path, draws=2)
    changed = peft.get_peft_model(posterior.model.network, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="without peft layers"):
        posterior.export_peft(tmp_path / "none")
    changed.unload()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyro_lrblora\[peft\]'"):
        posterior.export_peft(tmp_path / "none")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyro_lrblora\[peft\]'"):
        lb.import_peft(posterior.model, tmp_path / "draw_000")
    assert not (tmp_path / "none").exists()


# --- import


def trained(build=tiny_bert, seed=4, head=True, **settings):
    """A PeftModel with a large update in every adapted module, and a head of its own."""
    torch.manual_seed(seed)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value", "dense"]} | settings
    options |= {"task_type": "SEQ_CLS"} if head else {}
    adapted = peft.get_peft_model(build(), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


def updates_of(adapted):
    """Each module's dense update, as peft itself adds it."""
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    stored = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    return {name: value.T if layers[name].fan_in_fan_out else value for name, value in stored.items()}


def made(posterior):
    """Each module's dense update in a point posterior."""
    latents = posterior.model.adapted.per_module(posterior.mean())
    factors = {name: posterior.model.adapted.low_rank_factors(name, latent) for name, latent in latents.items()}
    return {name: left @ right for name, (left, right) in factors.items()}


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 7}},
    "gpt2": {"build": tiny_gpt2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "no head": {"head": False},
}


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_lora_of_enough_rank_keeps_everything(settings, as_folder, tmp_path):
    adapted = trained(**settings)
    adapted.save_pretrained(tmp_path)
    network = settings.get("build", tiny_bert)()
    before, random = state(network), torch.get_rng_state()
    model = lb.BayesianLoRA(network, lb.LoRA(4, targets="all-linear", alpha=12))
    posterior, lost = lb.import_peft(model, tmp_path if as_folder else adapted)
    assert_same_state(before, state(network))
    assert torch.equal(torch.get_rng_state(), random)
    expected = adapted(**BATCH).logits.detach()
    assert (expected - network(**BATCH).logits).abs().max() > 1e-2
    torch.testing.assert_close(predicted(posterior, at="mean")[0], expected, atol=1e-5, rtol=1e-5)
    dense = updates_of(adapted)
    assert set(lost.index) == set(model.modules) >= set(dense)
    for name, row in lost.iterrows():
        if name in dense:
            assert row["norm"] == pytest.approx(float(dense[name].norm()), rel=1e-5)
            assert row["error"] < 1e-6
            assert row["kept"] == pytest.approx(1)
        else:
            assert row["norm"] == 0
            assert row[["kept", "error"]].isna().all()


@pytest.mark.parametrize("absorb", [False, True])
def test_lora_xs_is_the_least_squares_solution(absorb):
    adapted, svd = trained(), lb.projections.SVD(absorb_singular_values=absorb)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(4, svd, targets=["query", "value"]))
    posterior, lost = lb.import_peft(model, adapted)
    cores = model.adapted.per_module(posterior.mean())
    for name, update in updates_of(adapted).items():
        if name not in model.modules:
            assert lost.loc[name, "kept"] == 0
            assert lost.loc[name, "error"] == 1
            continue
        basis = model.adapted.bases[name]
        design = torch.kron(basis.B.contiguous(), basis.A.T.contiguous()).double()
        solution = torch.linalg.lstsq(design, update.double().reshape(-1, 1)).solution
        torch.testing.assert_close(cores[name][0].double(), solution.reshape(4, 4), atol=1e-4, rtol=1e-4)
        kept, norm = made(posterior)[name], update.norm()
        error = float((update - kept).norm() / norm)
        assert 0.1 < error < 1
        assert lost.loc[name, "error"] == pytest.approx(error, rel=1e-5)
        assert lost.loc[name, "kept"] == pytest.approx(float(kept.norm() / norm) ** 2, rel=1e-4)


def test_an_export_comes_back(tmp_path):
    """What was made in a subspace is kept whole in it."""
    posterior = posterior_of(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(3)))
    posterior.export_peft(tmp_path)
    back, lost = lb.import_peft(posterior.model, tmp_path)
    torch.testing.assert_close(back.mean()["R"], posterior.mean()["R"], atol=1e-5, rtol=1e-5)
    assert lost["error"].max() < 1e-6
    assert torch.equal(back.head()["classifier.weight"], posterior.head()["classifier.weight"])


def test_a_lora_of_less_rank_is_the_truncated_svd():
    adapted = trained(target_modules=["query"])
    posterior, lost = lb.import_peft(lb.BayesianLoRA(tiny_bert(), lb.LoRA(2, ["query"])), adapted)
    for name, update in updates_of(adapted).items():
        u, s, vh = torch.linalg.svd(update)
        torch.testing.assert_close(made(posterior)[name], u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-4)
        assert lost.loc[name, "kept"] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-5)


def test_rank_that_an_update_leaves_over_can_still_be_trained():
    """Both factors zero would be a saddle: A keeps its start where B is zero."""
    adapted = trained(target_modules=["query"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "layer.1" in name and "lora_B" in name:
                parameter.zero_()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(5, ["query"]))
    values = lb.import_peft(model, adapted)[0].mean()
    assert (values["A"].norm(dim=-1) > 0.1).all()
    assert torch.equal(values["B"].norm(dim=-2) > 0, torch.tensor([[True] * 3 + [False] * 2, [False] * 5]))
    assert torch.equal(values["A"][1], model.start()["A"][1])


@pytest.mark.parametrize("head", ["point", "bayesian"])
@pytest.mark.parametrize("adapter", [lb.LoRAXS(4, targets="all-linear"), lb.LoRA(3, "all-linear")], ids=label)
def test_a_fit_starts_where_the_import_ends(adapter, head):
    model = lb.BayesianLoRA(tiny_bert(), adapter, head=head).prepare(token_batches(16))
    start, _ = lb.import_peft(model, trained())
    standing = lb.Rates(0, 0, 0, 0)
    fitted = lb.fit(model, token_batches(16), init=start, rates=standing, epochs=1, warm_start=False, progress=False)
    for name, value in start.mean().items():
        torch.testing.assert_close(fitted.mean()[name], value)
    torch.testing.assert_close(predicted(fitted, at="mean"), predicted(start, at="mean"))
    assert not torch.equal(predicted(start, at="mean")[0], tiny_bert()(**BATCH).logits)


def as_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def reshape(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: value[:1].clone() for name, value in load_file(path).items()}, path)


BROKEN = {
    "pickle": (as_pickle, "a pickle, which can run any code"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "without adapter_config.json"),
    "settings cut short": (lambda folder: (folder / "adapter_config.json").write_text('{"r": 3'), "settings of a PEFT"),
    "truncated": (truncate, "expected an adapter for BertForSequenceClassification"),
    "other shapes": (reshape, "expected an adapter for BertForSequenceClassification"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_are_no_adapter(how, tmp_path, monkeypatch):
    trained().save_pretrained(tmp_path)
    spoil, message = BROKEN[how]
    spoil(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    network = tiny_bert()
    before = state(network)
    with pytest.raises(ValueError, match=message):
        lb.import_peft(lb.BayesianLoRA(network, lb.LoRA(3)), tmp_path)
    assert_same_state(before, state(network))


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "lora_only"}, "with bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "embedding saved": ({"modules_to_save": ["word_embeddings"]}, "word_embeddings"),
    "embedding adapted": ({"target_modules": ["query", "word_embeddings"]}, "on the embedding"),
    "other network": ({"build": tiny_llama, "target_modules": ["q_proj"]}, "for BertFor.* in"),
    "other classes": ({"build": lambda: tiny_bert(4)}, "size mismatch"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_adapters_that_cannot_be_imported(how, tmp_path):
    settings, message = REFUSED[how]
    trained(**settings).save_pretrained(tmp_path)
    network = tiny_bert()
    before = state(network)
    with pytest.raises(ValueError, match=message):
        lb.import_peft(lb.BayesianLoRA(network, lb.LoRA(3)), tmp_path)
    assert_same_state(before, state(network))


def test_other_kinds_of_adapters_and_heads_that_cannot_change():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(3))
    scaled = peft.get_peft_model(tiny_bert(), peft.IA3Config(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="expected a LoRA adapter, got one of type IA3"):
        lb.import_peft(model, scaled)
    with pytest.raises(ValueError, match="head that can change"):
        lb.import_peft(model.with_head("frozen"), trained())
    with pytest.raises(ValueError, match="prepared model"):
        lb.import_peft(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient())), trained())
    adapted = trained()
    with pytest.raises(ValueError, match="without peft layers"):
        lb.import_peft(lb.BayesianLoRA(adapted.get_base_model(), lb.LoRA(3, ["query.base_layer"])), adapted)
    assert base_weight(model.modules["bert.encoder.layer.0.attention.self.query"]).shape == (16, 16)


def test_a_network_that_peft_has_changed_is_refused():
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(ValueError, match="without peft layers"):
        lb.BayesianLoRA(peft.get_peft_model(tiny_bert(), config))
