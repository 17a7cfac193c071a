"""Parts of one's own, and data, that do not fit: told before any work, with what to write instead."""

import datasets
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches

import pyro_lrblora as lb


def model(**parts):
    return lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tiny_tokenizer(), **parts)


def fit(model, train=None, **options):
    return lb.fit(model, token_batches() if train is None else train, **({"epochs": 1, "progress": False} | options))


def encoded(names, rows=24):
    texts = tiny_reviews(rows)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": texts["text"], "label": [k % 3 for k in range(rows)]}, features)


def test_classes_in_another_order_are_not_taken_for_wrong_labels():
    train, turned, other = encoded(["a", "b", "c"]), encoded(["c", "a", "b"]), encoded(["x", "y", "z"])
    posterior = fit(model(), train)
    message = r"model's order, \['a', 'b', 'c'\], got \['c', 'a', 'b'\]; write dataset.align_labels_with_mapping"
    for call in (
        lambda: lb.predict(posterior, turned, draws=2),
        lambda: lb.compare({"one": posterior}, turned),
        lambda: fit(model(), train, validation=turned),
        lambda: fit(model().prepare(train), turned),
        lambda: fit(model(), turned, init=posterior),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    aligned = turned.align_labels_with_mapping({"a": 0, "b": 1, "c": 2}, "label")
    lb.predict(posterior, aligned, draws=2)
    lb.predict(posterior, turned.remove_columns("label"), draws=2)
    lb.predict(posterior, other, draws=2)  # other names: nothing can be told


def sites(fn):
    return lambda shapes: {name: pyro.sample(name, fn(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (sites(lambda shape: dist.Uniform(-0.2, 0.2).expand(shape).to_event()), ValueError, "over all real numbers"),
        (sites(lambda shape: dist.HalfNormal(0.2).expand(shape).to_event()), ValueError, "over all real numbers"),
        (sites(lambda shape: dist.Normal(0.0, 0.2).expand(shape)), ValueError, "as one event of shape"),
        (sites(lambda shape: dist.Normal(0.0, 0.2)), ValueError, "as one event of shape"),
        (lambda shapes: torch.zeros(3), TypeError, "to return a dict of the latent sites, got Tensor"),
        (
            lambda shapes: {n: 0.1 * value for n, value in lb.priors.Normal(1.0)(shapes).items()},
            ValueError,
            r"return the latents as it samples them, got \['R'\] changed",
        ),
    ],
)
def test_priors(prior, error, message):
    with pytest.raises(error, match=message):
        fit(model(prior=prior))


def tied(shapes):
    """B's width is what A says, so that no row's own A may be seen by another row's B."""
    a = pyro.sample("A", dist.Normal(0.0, 1.0).expand(shapes["A"]).to_event())
    return {"A": a, "B": pyro.sample("B", dist.Normal(0.0, 1 / a.norm()).expand(shapes["B"]).to_event())}


def test_latents_that_depend_on_each_other_are_drawn_for_all_rows_alike():
    """A fit's own KL is that of importance weights, which know nothing of rows."""
    made = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2, "attention", layers=[1]), tied, head="frozen")
    standing = {"steps": 100, "rates": lb.Rates(0, 0, 0, 0), "warm_start": False}
    posterior = fit(made, guide=lb.guides.Diagonal(start_scale=1.0), **standing)
    assert (posterior.settings["draws"], posterior.settings["kl"]) == ("shared", "mc")
    found = torch.tensor([row["kl"] for row in posterior.history])
    weights = lb.evidence.importance(posterior, token_batches(), draws=100, progress=False)
    expected = weights.log_q - weights.log_prior
    error = (found.var() / len(found) + expected.var() / len(expected)).sqrt()
    assert abs(found.mean() - expected.mean()) < 4 * error
    with pytest.raises(ValueError, match=r"depends on the latents for draws='row', got \['B'\]"):
        fit(made, draws="row")


class Own(lb.guides.LatentGuide):
    """A guide whose distribution is wrong in one way."""

    def __init__(self, model, wrong):
        super().__init__(model)
        self.wrong = wrong
        self.loc = torch.nn.Parameter(self.starting_point(model)[0])

    def distribution(self):
        normal = dist.Normal(self.loc, 0.1)
        if self.wrong == "no event":
            return normal
        if self.wrong == "too few":
            return dist.Normal(self.loc[:-1], 0.1).to_event(1)
        components = dist.Normal(torch.stack([self.loc, self.loc + 0.1]), 0.1).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no event", r"write .to_event\(1\)"),
        ("too few", "over the D latents as one event"),
        ("no rsample", "reparameterised distribution.*EqualMixture"),
    ],
)
def test_guides(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit(model(), guide=lambda made: Own(made, wrong))


def with_cuts(outputs, batch):
    cuts = pyro.param("cuts", torch.zeros(3))
    pyro.sample("labels", dist.Categorical(logits=lb.likelihoods.logits_of(outputs) + cuts), obs=batch.get("labels"))


def with_site(outputs, batch):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("labels", dist.Categorical(logits=lb.likelihoods.logits_of(outputs) + shift), obs=batch.get("labels"))


def tempered(outputs, batch):
    with pyro.poutine.scale(scale=0.5):
        lb.likelihoods.Categorical()(outputs, batch)


def test_a_scaled_likelihood_is_refused():
    """Its distribution, which the Fisher matrix and the evidence read, does not show the scale."""
    with pytest.raises(TypeError, match="with poutine.scale or poutine.mask around it; write the weight into"):
        fit(model(likelihood=tempered))


class Trained(torch.nn.Module):
    """A likelihood with a parameter."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, outputs, batch):
        logits = lb.likelihoods.logits_of(outputs) / self.temperature
        pyro.sample("labels", dist.Categorical(logits=logits), obs=batch.get("labels"))


@pytest.mark.parametrize(
    ("likelihood", "message"), [(with_cuts, "'cuts'"), (with_site, "'shift'"), (Trained(), "temperature|Trained")]
)
def test_likelihoods(likelihood, message):
    with pytest.raises(TypeError, match=f"without.*would not train.*{message}"):
        fit(model(likelihood=likelihood))


class Projection:
    """A projection that returns something wrong."""

    statistics = None

    def __init__(self, wrong):
        self.wrong = wrong

    def __call__(self, weight, rank, statistics, generator):
        (m, n), one = weight.shape, torch.ones
        a, b = one(rank, n), one(m, rank)
        basis = lb.projections.Basis
        return {
            "tuple": (a, b),
            "turned": basis(A=a.T, B=b),
            "not finite": basis(A=a * float("nan"), B=b),
        }[self.wrong]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("tuple", TypeError, "to return a projections.Basis, got tuple"),
        ("turned", ValueError, r"expected A \(2, 16\) and B"),
        ("not finite", ValueError, "expected finite A and B"),
    ],
)
def test_projections(wrong, error, message):
    with pytest.raises(error, match=message):
        fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, Projection(wrong))))


def test_data():
    frame = pd.DataFrame({"review": ["good film", "bad film"] * 4, "label": [1, 0] * 4})
    for data, message in (
        (frame, r"got DataFrame; write datasets.Dataset.from_pandas\(frame\)"),
        (["good film", "bad film"], r"write datasets.Dataset.from_dict\(\{\"text\": texts\}\)"),
        ("good film", r"write datasets.Dataset.from_dict"),
    ):
        with pytest.raises(TypeError, match=message):
            fit(model(), data)
    fit(model(), datasets.Dataset.from_pandas(frame))  # one column of strings is the text, in any of their types
    two = datasets.Dataset.from_pandas(frame.assign(title="a"))
    with pytest.raises(KeyError, match="rename_column"):
        fit(model(), two)
    with pytest.raises(ValueError, match="subtract 1 from every label"):
        fit(model(), datasets.Dataset.from_dict({"text": ["good"] * 6, "label": [1, 2, 3] * 2}))
    with pytest.raises(ValueError, match="cast_column"):
        fit(model(), datasets.Dataset.from_dict({"text": ["good"] * 6, "label": [1.0, 2.0, 0.0] * 2}))


def test_calls():
    prepared = model()
    posterior = fit(prepared)
    for call, error, message in (
        (lambda: lb.fit(tiny_bert(), token_batches()), TypeError, r"write lb.BayesianLoRA\(network\)"),
        (lambda: lb.predict(prepared, token_batches()), TypeError, "what lb.fit returned, got BayesianLoRA"),
        (lambda: lb.predict(posterior, token_batches(), draws=1.5), ValueError, "draws to be an integer >= 1"),
        (lambda: lb.predict(posterior, token_batches(), draws="8"), ValueError, "draws to be an integer >= 1"),
        (lambda: lb.Posterior.load("folder", "roberta-base"), TypeError, "the network itself"),
    ):
        with pytest.raises(error, match=message):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            fit(prepared, device="cuda")


def test_the_probe_of_a_head_with_logits_per_token_says_what_to_write():
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    network = BertForTokenClassification(config).eval()
    batches = [{"input_ids": torch.randint(12, (4, 5)), "labels": torch.randint(3, (4, 5))} for _ in range(2)]

    def tokens(outputs, batch):
        logits = lb.likelihoods.logits_of(outputs)
        pyro.sample("labels", dist.Categorical(logits=logits).to_event(1), obs=batch.get("labels"))

    made = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=tokens)
    with pytest.raises(ValueError, match="probe=False"):
        made.prepare(batches)
    fit(made.prepare(batches, probe=False), batches)
