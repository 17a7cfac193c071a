"""The Pyro model by hand (SVI, Predictive, NUTS, poutine), its head and its priors."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, label, tiny_bert, tiny_tokenizer, token_batches
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from test_tasks import tiny_llama

import pyro_lrblora as lb
from pyro_lrblora.networks import MeanPoolClassifier
from pyro_lrblora.probe import choose_scale

GUIDES = [lb.guides.Delta(), lb.guides.Diagonal(), lb.guides.LowRank(2), lb.guides.LowRankPrecision(2)]
PRIORS = [
    lb.priors.Normal(0.1),
    lb.priors.Laplace(0.1),
    lb.priors.StudentT(0.1, df=2.0),
    lb.priors.Horseshoe(0.1),
    lb.priors.LayerScale(0.1),
    lb.priors.RegularisedHorseshoe(0.1),
    lb.priors.SpikeSlab(0.1),
    lb.priors.MatrixNormal(0.1, row_correlation=0.3, column_correlation=0.2),
    lb.priors.Learned(lb.priors.Normal(0.1)),
    lb.priors.Learned(lb.priors.LayerScale(0.1), per_module=True),
]


def users_prior(shapes):
    return {name: pyro.sample(name, dist.Cauchy(0.0, 0.1).expand(shape).to_event()) for name, shape in shapes.items()}


def loss_by_hand(model, guide, batch, steps=60, **options):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), Trace_ELBO(**options))
    losses = [svi.step(batch) for _ in range(steps)]
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


@pytest.mark.parametrize(
    "spec", [*GUIDES, AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal], ids=label
)
def test_svi_by_hand_trains(spec):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=16)
    batch = token_batches(16, 16)[0]
    before, after = loss_by_hand(model, spec(model), batch)
    assert after < before - 0.5


@pytest.mark.parametrize("spec", GUIDES[1:], ids=label)
def test_rowwise_svi_by_hand_trains(spec):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=16)
    guide = spec(model)
    before, after = loss_by_hand(model.rowwise, guide.rowwise, token_batches(16, 16)[0])
    assert after < before - 0.5


def test_svi_by_hand_trains_the_head_and_nothing_of_the_network():
    network = tiny_bert()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = lb.BayesianLoRA(network, size=16)
    start = model.head_values()["classifier.weight"].clone()
    loss_by_hand(model, lb.guides.Diagonal()(model), token_batches(16, 16)[0], steps=3)
    assert not torch.equal(model.head_values()["classifier.weight"], start)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("prior", [*PRIORS, users_prior], ids=label)
@pytest.mark.parametrize("adapter", [lb.LoRAXS(2), lb.LoRA(2, "all-linear")], ids=label)
def test_priors_shared_and_per_row(prior, adapter):
    """Shapes; the latents' log density per row is the mean over rows, the prior's own sites count once."""
    model = lb.BayesianLoRA(tiny_bert(), adapter, prior, size=40)
    batch = token_batches(8)[0]
    shared = poutine.trace(model).get_trace(batch)
    rowwise = poutine.trace(model.rowwise).get_trace(batch)
    shared.compute_log_prob(), rowwise.compute_log_prob()
    for name, shape in model.sites.shapes.items():
        assert shared.nodes[name]["value"].shape == shape
        assert rowwise.nodes[name]["value"].shape == (8, *shape)
        per_row = rowwise.nodes[name]["fn"].log_prob(rowwise.nodes[name]["value"])
        torch.testing.assert_close(rowwise.nodes[name]["log_prob_sum"], per_row.mean())
    for name in set(shared.stochastic_nodes) - set(model.sites.shapes) - {"data"}:
        assert rowwise.nodes[name]["value"].shape == shared.nodes[name]["value"].shape
        assert rowwise.nodes[name]["scale"] == 1.0
    assert rowwise.nodes["labels"]["scale"] == 40 / 8


@pytest.mark.parametrize("spec", GUIDES[1:], ids=label)
def test_rowwise_and_shared_elbo_agree_in_expectation(spec):
    problem = LinearGaussian(rank=2)
    model, guide = problem.model, spec(problem.model)
    batch = {name: value[:8] for name, value in problem.batch.items()}  # 8 of 24 rows: the plate scales by 3
    estimate = lambda program, proposal: torch.tensor([Trace_ELBO().loss(program, proposal, batch) for _ in range(600)])
    shared, rowwise = estimate(model, guide), estimate(model.rowwise, guide.rowwise)
    error = (shared.var() / len(shared) + rowwise.var() / len(rowwise)).sqrt()
    assert (shared.mean() - rowwise.mean()).abs() < 4 * error
    assert rowwise.var() < shared.var()


def test_predictive_and_prior_predictive():
    model = lb.BayesianLoRA(tiny_bert(), size=16)
    inputs = {k: v for k, v in token_batches(8)[0].items() if k != "labels"}
    prior = Predictive(model, num_samples=5)(inputs)
    assert prior["labels"].shape == (5, 8)
    guide = lb.guides.LowRank(2)(model)
    assert Predictive(model, guide=guide, num_samples=5)(inputs)["labels"].shape == (5, 8)


def test_draws_are_not_taken_for_rows():
    """A parallel Predictive gives all draws at once, as many as rows or not."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=16)
    inputs = {k: v for k, v in token_batches(8)[0].items() if k != "labels"}
    for draws in (8, 4, 3):
        latents = {name: torch.randn(draws, *shape) for name, shape in model.sites.shapes.items()}
        assert Predictive(model, latents)(inputs)["labels"].shape == (draws, 8)
        with pytest.raises(ValueError, match=r"one draw of 'R' per call.*write parallel=False"):
            Predictive(model, latents, parallel=True)(inputs)


def test_handlers_around_a_call_do_not_reach_into_it():
    """Nor do the sites within reach them."""
    model, batches = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), token_batches(16)
    fit = lambda: lb.fit(model, batches, guide=lb.guides.Diagonal(), epochs=1, progress=False)
    posterior = fit()
    with poutine.scale(scale=0.1), poutine.trace() as seen:
        assert torch.equal(fit().guide.loc, posterior.guide.loc)
        assert torch.equal(posterior.sample(2, seed=0)["R"], posterior.sample(2, seed=0)["R"])
        lb.predict(posterior, batches, draws=2)
    assert list(seen.trace.nodes) == []


def test_nuts_by_hand_finds_the_exact_posterior():
    problem = LinearGaussian(rank=2)
    mcmc = MCMC(NUTS(problem.model), num_samples=400, warmup_steps=200, disable_progbar=True)
    mcmc.run(problem.batch)
    draws = mcmc.get_samples()["R"].reshape(400, -1).double()
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert ((draws.mean(0) - problem.mean).abs() < 0.3 * sd).all()
    assert (draws.std(0) / sd - 1).abs().max() < 0.25


def test_bayesian_head_is_sampled():
    model = lb.BayesianLoRA(tiny_bert(), head="bayesian", size=16)
    trace = poutine.trace(model).get_trace(token_batches(8)[0])
    assert trace.nodes["classifier.weight"]["value"].shape == (3, 16)
    assert not [name for name, site in trace.nodes.items() if site["type"] == "param"]
    draw = poutine.trace(lb.guides.Diagonal()(model)).get_trace()
    assert "classifier.bias" in draw.nodes


def test_probe_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    batches = token_batches(60, 12)
    model = lb.BayesianLoRA(tiny_bert(), head_scale=0.5).prepare(batches)
    network, features = model.network, []
    handle = network.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    labels = torch.cat([batch["labels"] for batch in batches])
    reference = LogisticRegression(C=0.5**2, tol=1e-8, max_iter=2000).fit(torch.cat(features), labels)
    torch.testing.assert_close(
        model.head_start["classifier.weight"], torch.tensor(reference.coef_).float(), atol=2e-3, rtol=1e-2
    )


@pytest.mark.parametrize("sd", [0.5, 4.0])
def test_the_chosen_scale_is_near_the_one_that_weights_were_drawn_from(sd):
    features = torch.randn(600, 12).double() / 12**0.5  # of length 1: so are the units that scales are tried in
    labels = torch.distributions.Categorical(logits=sd * features @ torch.randn(12, 3).double()).sample()
    assert sd / 2 < choose_scale(features, labels, 3, True) < 2 * sd


def test_probe_reads_the_token_the_network_pools():
    """GPT-2 scores every token and reads the last one that is no padding."""
    from test_adapters import tiny_gpt2

    batches = token_batches(40)
    for batch in batches:
        batch["input_ids"][::2, -2:] = 0
        batch["attention_mask"][::2, -2:] = 0
    probed = lb.BayesianLoRA(tiny_gpt2(), head_scale=3.0).prepare(batches)
    nll = lambda head: sum(
        torch.nn.functional.cross_entropy(probed.pretrained_outputs(b, head).logits, b["labels"], reduction="sum")
        for b in batches
    )
    assert nll(probed.head_start) < nll({"score.weight": torch.zeros(3, 16)}) - 2
    for i in range(3):  # a maximum of the posterior density: moving away in any direction is worse
        worse = probed.head_start["score.weight"] + 0.05 * torch.randn(3, 16, generator=torch.manual_seed(i))
        penalty = lambda w: 0.5 * w.square().sum() / 3.0**2
        assert nll({"score.weight": worse}) + penalty(worse) > nll(probed.head_start) + penalty(
            probed.head_start["score.weight"]
        )


def test_induced_sd():
    """Orthonormal factors: |W - W0|_F^2 = |R|_F^2, so the entries have sd scale * r / sqrt(m n)."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(4, targets=["intermediate.dense"]), lb.priors.Normal(0.3))
    for value in model.induced_sd(draws=2000).values():
        assert abs(value / (0.3 * 4 / (16 * 24) ** 0.5) - 1) < 0.05


@pytest.mark.parametrize("prior", [*PRIORS, users_prior], ids=label)
def test_prior_variance(prior):
    from pyro_lrblora.priors import prior_variance

    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), prior)
    variance = prior_variance(model.sample_prior, model.sites.shapes)["R"]
    assert variance.shape == model.sites.shapes["R"]
    assert variance.isfinite().all()
    assert (variance > 0).all()
    if isinstance(prior, lb.priors.Normal):
        torch.testing.assert_close(variance, torch.full_like(variance, 0.01))


def test_a_batch_cannot_tell_how_many_rows_there_are():
    model = lb.BayesianLoRA(tiny_bert())
    with pytest.raises(ValueError, match="number of training rows N"):
        model(token_batches(8)[0])


def test_data_driven_projection_needs_prepare():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient()), size=8)
    with pytest.raises(ValueError, match="model.prepare"):
        model(token_batches(8)[0])


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
@pytest.mark.parametrize("prior", [type(p) for p in PRIORS if not isinstance(p, lb.priors.Learned)])
def test_prior_scale_must_be_positive(prior, scale):
    with pytest.raises(ValueError, match="expected scale > 0"):
        prior(scale=scale)


@pytest.mark.chosen_head_scale
@pytest.mark.parametrize("projection", [lb.projections.Gradient(), lb.projections.Random()], ids=repr)
def test_a_prepared_model_is_prepared_anew(projection):
    """Folds of a cross-validation must not share what the first one has seen."""
    first, second = token_batches(seed=0), token_batches(seed=1)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, projection))
    again, fresh = model.prepare(first).prepare(second, seed=3), model.prepare(second, seed=3)
    assert again.head_scale == fresh.head_scale
    for found, expected in ((again.adapted.tensors(), fresh.adapted.tensors()), (again.head_start, fresh.head_start)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for other in (lb.LoRAXS(1, projection), lb.LoRAXS(2, projection, layers=[0])):
        with pytest.raises(ValueError, match="expected another model with the model's adapter"):
            lb.BayesianLoRA(tiny_bert(), other).in_subspace_of(fresh)
    kept = model.in_subspace_of(fresh).prepare(first)
    assert all(torch.equal(kept.adapted.tensors()[name], value) for name, value in fresh.adapted.tensors().items())


def test_looking_at_a_model_does_not_decide_its_subspace():
    model, seen = (lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Random())) for _ in range(2))
    assert seen.sites.size == 32
    expected, found = (each.prepare(token_batches(), seed=5).adapted.tensors() for each in (model, seen))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_prior_that_forgets_a_site():
    model = lb.BayesianLoRA(tiny_bert(), prior=lambda shapes: {}, size=8)
    with pytest.raises(KeyError, match="expected the prior to return every latent site"):
        model(token_batches(8)[0])


def test_unknown_head():
    with pytest.raises(ValueError, match="head="):
        lb.BayesianLoRA(tiny_bert(), head="laplace")
    with pytest.raises(ValueError, match="expected head modules among"):
        lb.BayesianLoRA(tiny_bert(), head_modules=["clasifier"])
    with pytest.raises(ValueError, match="expected a head with parameters"):
        lb.BayesianLoRA(tiny_bert(), head=lb.FixedHead({}))


class Unnamed(torch.nn.Module):
    """An encoder and a head, as people write it: nothing says which is which."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert().bert
        self.classifier = torch.nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        return self.classifier(self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def test_a_head_that_is_not_found_is_said():
    with pytest.warns(UserWarning, match="no head was found in Unnamed.*head_modules="):
        lb.BayesianLoRA(Unnamed(), lb.LoRAXS(2, targets=["query"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = lb.BayesianLoRA(Unnamed(), lb.LoRAXS(2, targets=["query"]), head_modules=["classifier"])
        lb.BayesianLoRA(Unnamed(), lb.LoRAXS(2, targets=["query"]), head="frozen")
    assert set(named.head_start) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"adapter": lb.LoRAXS}, r"write LoRAXS\(\)"),
        ({"adapter": "lora"}, r"such as LoRAXS\(\), got 'lora'"),
        ({"prior": lb.priors.Normal}, r"write Normal\(\)"),
        ({"prior": 0.1}, r"such as priors.Normal\(0.1\), got 0.1"),
        ({"likelihood": lb.likelihoods.Categorical}, r"write Categorical\(\)"),
    ],
    ids=str,
)
def test_parts_of_the_wrong_kind(parts, message):
    with pytest.raises(TypeError, match=message):
        lb.BayesianLoRA(tiny_bert(), **parts)
    with pytest.raises(TypeError, match="projection with `statistics`"):
        lb.LoRAXS(2, lambda weight, rank: None)


def test_networks_without_class_logits():
    with pytest.raises(ValueError, match="got the language model LlamaForCausalLM.*NextToken"):
        lb.BayesianLoRA(tiny_llama())
    bare = lb.BayesianLoRA(tiny_bert().bert, head="frozen")
    with pytest.raises(TypeError, match="expected a network that returns logits.*AutoModelForSequenceClassification"):
        lb.fit(bare, token_batches(), progress=False)


def test_a_compiled_network_is_refused():
    """Its modules are called by code that was made without the adapter's hooks."""
    with pytest.raises(ValueError, match="_orig_mod"):
        lb.BayesianLoRA(torch.compile(tiny_bert(), backend="eager"))
    network = tiny_bert()
    network.compile(backend="eager")
    with pytest.raises(ValueError, match="after .compile"):
        lb.BayesianLoRA(network)


def test_padding_that_the_network_takes_for_text_is_refused():
    """A decoder reads a row at its last token that is not padding, so at a pad where it takes another token for one."""
    tokenizer, network = tiny_tokenizer(), tiny_bert()
    lb.BayesianLoRA(network, tokenizer=tokenizer)
    tokenizer.pad_token = "[UNK]"
    with pytest.raises(ValueError, match=r"same token, got 0 in network.config and 1 \('\[UNK\]'\) in the tokenizer"):
        lb.BayesianLoRA(network, tokenizer=tokenizer)
    network.config.pad_token_id = tokenizer.pad_token_id
    lb.BayesianLoRA(network, tokenizer=tokenizer)
    network.config.pad_token_id = None  # transformers itself refuses more than one row of such a decoder
    lb.BayesianLoRA(network, tokenizer=tokenizer)
    tokenizer.pad_token = "[PAD]"
    network.config.pad_token_id = 5
    lb.BayesianLoRA(MeanPoolClassifier(network.bert, 2), tokenizer=tokenizer)  # pools by the mask


def test_a_prior_with_parameters_of_its_own_is_refused():
    def scaled(shapes):
        scale = pyro.param("my_scale", torch.tensor(0.1))
        normal = dist.Normal(0.0, scale)
        return {name: pyro.sample(name, normal.expand(shape).to_event()) for name, shape in shapes.items()}

    with pytest.raises(ValueError, match="my_scale.*priors.Learned"):
        lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), scaled), token_batches(), progress=False)


@pytest.mark.parametrize("head", ["point", "bayesian"])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_prior_of_a_head_is_the_same_after_a_staged_start_and_on_disk(tmp_path, head, prepared):
    """A dense layer is pulled to the network's own, not to what an earlier fit of the same rows made of it."""
    from test_adapters import tiny_roberta

    network, rates = tiny_roberta(), lb.Rates(head=0.05)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), head=head)
    first = lb.fit(model, token_batches(), guide=lb.guides.Diagonal(), rates=rates, epochs=3, progress=False)
    model = model.prepare(token_batches()) if prepared else model
    staged = lb.fit(model, token_batches(), init=first, map_epochs=1, rates=rates, epochs=1, progress=False)
    staged.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, network)
    own = {name: network.get_parameter(name) for name in model.head_start if "dense" in name}
    assert own
    for posterior in (first, staged, loaded, lb.fit(loaded.model, token_batches(), init=loaded, progress=False)):
        prior = posterior.model.head_prior()
        assert all(torch.equal(prior[name].loc, value) for name, value in own.items())
        moved = lb.fixed_from(posterior).values
        assert all(not torch.equal(moved[name], value) for name, value in own.items())


def test_one_prior_of_the_head_spares_base_rates_and_what_was_pretrained():
    from test_adapters import tiny_roberta

    batches = token_batches(rows=64)
    for batch in batches:
        batch["labels"] = (batch["labels"] == 0) * torch.tensor([1, 0, 0, 0, 0, 0, 0, 0])  # few of one class
    model = lb.BayesianLoRA(tiny_roberta(), lb.LoRAXS(2), head="bayesian", head_scale=0.1).prepare(batches)
    sites = pyro.poutine.trace(model.sample_prior).get_trace().nodes
    start = model.head_start
    output = sites["classifier.out_proj.weight"]["fn"].base_dist
    assert not output.loc.any()
    assert (output.scale == 0.1).all()
    bias = sites["classifier.out_proj.bias"]["fn"].base_dist
    assert start["classifier.out_proj.bias"].abs().max() > 0.3
    assert torch.equal(bias.loc, start["classifier.out_proj.bias"])
    assert (bias.scale >= 1).all()
    dense = sites["classifier.dense.weight"]["fn"].base_dist
    assert torch.equal(dense.loc, start["classifier.dense.weight"])
    point = model.with_head("point")
    values = {name: value + 0.01 for name, value in start.items()}
    wanted = sum(-(fn := sites[name]["fn"]).log_prob(v) + fn.log_prob(fn.mean) for name, v in values.items())
    assert float(point.head_penalty(values)) == pytest.approx(float(wanted), rel=1e-4)


def test_a_bayesian_head_keeps_a_rare_class_rare():
    """One row in forty: with the weights' narrow prior on the bias too, it was predicted far more often."""
    batches = token_batches(rows=160, classes=2)
    rows = iter(range(160))
    for batch in batches:
        batch["labels"] = torch.tensor([int(next(rows) % 40 == 0) for _ in batch["labels"]])
    model = lb.BayesianLoRA(tiny_bert(2), lb.LoRAXS(2), lb.priors.Normal(0.01), head="bayesian", head_scale=0.05)
    posterior = lb.fit(model, batches, epochs=20, progress=False)
    assert float(lb.predict(posterior, batches).probs[:, 1].mean()) == pytest.approx(4 / 160, abs=0.012)


def test_a_model_made_while_another_is_attached_is_not():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=40)
    batch = token_batches()[0]
    with model.attached():
        copy = model.with_prior(lb.priors.Normal(1.0))
    values = {"R": torch.ones(model.sites.shapes["R"])}
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    found, wanted = (each.outputs(batch, values, each.head_values()).logits for each in (copy, model))
    torch.testing.assert_close(found, wanted)
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())


def plated(shapes):
    with pyro.plate("modules", next(iter(shapes.values()))[0]):
        scales = pyro.sample("scale", dist.LogNormal(-2.0, 1.0))
    return {n: pyro.sample(n, dist.Normal(0, scales[:, None, None].expand(s)).to_event(3)) for n, s in shapes.items()}


def computed(shapes):
    return {
        n: pyro.deterministic(n, 0.1 * pyro.sample(f"raw_{n}", dist.Normal(0, 1).expand(s).to_event(3)), event_dim=3)
        for n, s in shapes.items()
    }


@pytest.mark.parametrize(
    ("prior", "message"), [(plated, r"without pyro.plate.*\['modules'\]"), (computed, r"sample the latents.*\['R'\]")]
)
@pytest.mark.parametrize("kl", ["auto", "mc"])
def test_priors_that_cannot_be_fitted_say_why(prior, message, kl):
    with pytest.raises(ValueError, match=message):
        lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), prior), token_batches(), epochs=1, kl=kl, progress=False)


def test_a_device_without_float64_is_refused():
    with pytest.raises(ValueError, match="'mps', which has no float64"):
        lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), token_batches(), device="mps", progress=False)
