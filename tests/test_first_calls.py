"""What people try first and is not meant: refused before any work, in words that say what to write instead."""

import datasets
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoGaussian

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
XS = lb.LoRAXS(2)


def fitted(adapter=XS, guide=None, **options):
    model = lb.BayesianLoRA(tiny_bert(), adapter, **options)
    return lb.fit(model, token_batches(), guide=guide or lb.guides.Diagonal(), epochs=1, progress=False)


@pytest.mark.parametrize(
    "adapter",
    [lb.LoRA(2), lb.LoRAXS(2, targets=["query"]), lb.LoRAXS(2, lb.projections.Random()), lb.LoRAXS(4)],
    ids=repr,
)
def test_a_start_from_another_adapter_is_refused(adapter):
    point = fitted(guide=lb.guides.Delta())
    with pytest.raises(ValueError, match="init= with the model's adapter, got LoRAXS"):
        lb.fit(lb.BayesianLoRA(tiny_bert(), adapter), token_batches(), init=point, epochs=1, progress=False)


def test_a_start_from_another_network_is_refused():
    from test_adapters import tiny_roberta

    with pytest.raises(ValueError, match="names and shapes, got BertForSequenceClassification"):
        lb.fit(lb.BayesianLoRA(tiny_roberta(), XS), token_batches(), init=fitted(), epochs=1, progress=False)


class Rows:
    """A projection of one's own, no dataclass: the first rows and columns."""

    statistics = None

    def __call__(self, weight, rank, statistics, generator):
        m, n = weight.shape
        return lb.projections.Basis(A=torch.eye(n)[:rank], B=torch.eye(m)[:, :rank])


def test_a_projection_of_ones_own_is_loaded_with_its_basis(tmp_path):
    posterior = fitted(lb.LoRAXS(2, Rows(), targets={"query", "value"}))
    posterior.save(tmp_path / "once")
    loaded = lb.Posterior.load(tmp_path / "once", tiny_bert())
    loaded.save(tmp_path / "again")
    for each in (loaded, lb.Posterior.load(tmp_path / "again", tiny_bert())):
        assert "Rows" in repr(each.model.adapter)
        wanted = lb.predict(posterior, token_batches(), draws=3).logits
        assert torch.equal(lb.predict(each, token_batches(), draws=3).logits, wanted)
    with pytest.raises(TypeError, match="no new subspace of a loaded posterior"):
        lb.BayesianLoRA(tiny_bert(), loaded.model.adapter).prepare(token_batches())


def test_labels_that_are_no_classes_are_not_predicted_as_some(monkeypatch):
    several = lambda outputs, batch: pyro.sample(
        "labels", dist.Bernoulli(logits=lb.likelihoods.logits_of(outputs)).to_event(1), obs=batch.get("labels")
    )
    batches = [batch | {"labels": torch.rand(len(batch["labels"]), 3).round()} for batch in token_batches()]
    model = lb.BayesianLoRA(tiny_bert(), XS, likelihood=several)
    posterior = lb.fit(model, batches, epochs=1, progress=False)
    with pytest.raises(TypeError, match="classes, one per logit, got Independent.*`summary` and `prediction`"):
        lb.predict(posterior, batches)
    monkeypatch.setattr("pyro_lrblora.infer.loop.Loop.run_epoch", lambda *_: pytest.fail("an epoch was run"))
    with pytest.raises(TypeError, match="classes, one per logit, got Independent"):
        lb.fit(model, batches, validation=batches, epochs=1, progress=False)


def test_draws_that_a_network_makes_no_numbers_of_are_told():
    posterior = fitted(guide=lb.guides.Diagonal())
    posterior.guide.loc.data.fill_(1e38)
    for options in ({"draws": 4}, {"method": "linearised"}):
        with pytest.raises(FloatingPointError, match="finite logits, got NaN or infinity in rows"):
            lb.predict(posterior, token_batches(), **options)


def test_a_frozen_head_is_not_given_the_data_s_order_of_classes():
    network, names = tiny_bert(), ["b", "c", "a"]
    network.config.id2label = dict(enumerate("abc"))
    network.config.label2id = {name: n for n, name in enumerate("abc")}
    data = tiny_reviews(12).cast_column("label", datasets.ClassLabel(names=names))
    model = lb.BayesianLoRA(network, XS, head="frozen", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="align_labels_with_mapping"):
        model.prepare(data)
    aligned = data.align_labels_with_mapping(network.config.label2id, "label")
    assert model.prepare(aligned).class_names == list("abc")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stock_guide_that_is_no_normal_is_diagnosed():
    posterior = fitted(guide=AutoGaussian)
    assert lb.diagnose(posterior, token_batches(), draws=4).checks
    with pytest.raises(TypeError, match="Gaussian guide for a covariance"):
        posterior.covariance()


def test_hidden_labels_are_left_out_of_arviz():
    hidden = [batch | {"labels": torch.full_like(batch["labels"], -1)} for batch in token_batches()]
    data = fitted().to_arviz(hidden, draws=4)
    assert "log_likelihood" not in list(data.groups() if callable(data.groups) else data.groups)


REFUSED = {
    "a name for a network": (lambda: lb.BayesianLoRA("bert", XS), "expected a network, a torch module, got 'bert'"),
    "a distribution for a prior": (lambda: lb.BayesianLoRA(tiny_bert(), XS, dist.Normal(0, 1)), "prior= such as"),
    "a prior's class": (lambda: lb.BayesianLoRA(tiny_bert(), XS).with_prior(lb.priors.Horseshoe), "write Horseshoe()"),
    "a projection's class": (lambda: lb.LoRAXS(2, lb.projections.Gradient), "expected a projection with"),
    "half a rank": (lambda: lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2.5)), "rank to be an integer"),
    "a layer's number": (lambda: lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, layers=1)), r"write layers=\[1\]"),
    "a number for a name": (lambda: lb.compare({1: fitted()}, token_batches()), "posteriors by name, got 1"),
    "a model for a posterior": (lambda: lb.compare({"a": fitted().model}, token_batches()), "got 'a': BayesianLoRA"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_of_another_kind_is_refused(how):
    make, message = REFUSED[how]
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_and_classes_are_not_compared():
    two = lb.BayesianLoRA(tiny_bert(2), XS, likelihood=lb.likelihoods.Gaussian())
    numbers = [batch | {"labels": torch.randn(len(batch["labels"]))} for batch in token_batches()]
    of_numbers = lb.fit(two, numbers, epochs=1, progress=False)
    of_classes = lb.fit(lb.BayesianLoRA(tiny_bert(2), XS), token_batches(classes=2), epochs=1, progress=False)
    with pytest.raises(ValueError, match="same kind of thing, got the likelihoods"):
        lb.compare({"numbers": of_numbers, "classes": of_classes}, numbers)


def test_a_notebook_shows_the_blocks_and_the_notes():
    table = lb.compare({"a <b>": fitted()}, token_batches(), draws=2)
    assert "On test rows:" in table._repr_html_()
    assert "a &lt;b&gt;" in table._repr_html_()
    assert np.isfinite(table["NLL"]).all()
