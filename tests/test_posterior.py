"""Draws, densities, files and predictions of posteriors."""

import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import datasets
import numpy as np
import pyro
import pytest
import torch
from conftest import label, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from safetensors.torch import load_file, save_file
from test_model import GUIDES, PRIORS, users_prior
from transformers import BertConfig, BertForSequenceClassification

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
STOCK = [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
XS, BOTH = lb.LoRAXS(2), lb.LoRA(2, "all-linear")  # one site, and four
FAMILIES = [
    lb.guides.BlockLowRank(2),
    lb.guides.BlockLowRank(2, "covariance"),
    lb.guides.FullRank(),
    lb.guides.FullRank(per_module=True),
    lb.guides.MatrixNormal(),
    lb.guides.RotatedDiagonal(),
    lb.guides.Flow(hidden=4),
    lb.guides.Mixture(2),
    lb.guides.Mixture(2, "delta"),
    lb.guides.Dropout(0.2),
]
GRID = [(guide, adapter) for guide in FAMILIES for adapter in (XS, BOTH)]
GRID += [(lb.guides.Diagonal(point_sites=("B",)), BOTH)]


def fit(guide, prior=None, adapter=None, **options):
    model = lb.BayesianLoRA(
        tiny_bert(),
        adapter or lb.LoRAXS(2),
        prior or lb.priors.Normal(0.1),
        tokenizer=tiny_tokenizer(),
        **options,
    )
    return lb.fit(model, token_batches(), guide=guide, epochs=2, progress=False)


@pytest.mark.parametrize("guide", [*GUIDES[1:], *STOCK], ids=label)
def test_mean_covariance_and_density_agree_with_draws(guide):
    posterior = fit(guide)
    draws = posterior.sample(4000, seed=0)
    flat = posterior.model.sites.join(draws)
    mean = posterior.model.sites.join(posterior.mean())
    sd = flat.std(0)
    assert ((flat.mean(0) - mean).abs() < 5 * sd / 4000**0.5).all()
    # The mean of -log q is the entropy; a normal's, from the sample covariance.
    entropy = 0.5 * torch.logdet(flat.double().T.cov()) + 0.5 * flat.shape[1] * math.log(2 * math.pi * math.e)
    log_q = posterior.log_prob({name: value[:1000] for name, value in draws.items()})
    assert log_q.shape == (1000,)
    assert abs(-float(log_q.mean()) - float(entropy)) < 0.5
    covariance = posterior.covariance()
    torch.testing.assert_close(covariance.variance, covariance.dense().diagonal())
    assert (flat.var(0) / covariance.variance - 1).abs().max() < 0.15


@pytest.mark.parametrize("guide", [lb.guides.LowRank(2), AutoNormal], ids=label)
def test_density_covers_the_priors_own_sites(guide):
    """Changing a scale's value changes log q by what its own LogNormal factor says, jacobian included."""
    posterior = fit(guide, lb.priors.LayerScale(0.1))
    draws = posterior.sample(2, seed=0)
    moved = draws | {"R_scale": 2 * draws["R_scale"]}
    auto = posterior.guide.extra if isinstance(posterior.guide, lb.guides.LatentGuide) else posterior.guide
    loc, scale = (part.R_scale.detach() for part in (auto.locs, auto.scales))
    factor = torch.distributions.LogNormal(loc, scale)
    expected = (factor.log_prob(moved["R_scale"]) - factor.log_prob(draws["R_scale"])).sum(-1)
    torch.testing.assert_close(posterior.log_prob(moved) - posterior.log_prob(draws), expected, rtol=1e-3, atol=1e-3)


def test_a_guide_without_density():
    posterior = fit(pyro.infer.autoguide.AutoDelta)
    draws = posterior.sample(2)
    with pytest.raises(TypeError, match="guide with a density"):
        posterior.log_prob(draws)


def test_draws_are_seeded_and_at_least_one():
    posterior = fit(lb.guides.LowRank(2))
    assert torch.equal(posterior.sample(3, seed=1)["R"], posterior.sample(3, seed=1)["R"])
    assert not torch.equal(posterior.sample(3)["R"], posterior.sample(3)["R"])
    for draws in (0, -1):
        with pytest.raises(ValueError, match="draws to be an integer >= 1"):
            posterior.sample(draws)
        with pytest.raises(ValueError, match="draws to be an integer >= 1"):
            lb.predict(posterior, token_batches(), draws=draws)
    with pytest.raises(ValueError, match="at='mean'"):
        lb.predict(posterior, token_batches(), at="mode")


@pytest.mark.parametrize("head", ["point", "bayesian"])
def test_antithetic_draws_are_pairs_around_the_mean(head):
    posterior = fit(lb.guides.LowRankPrecision(2), head=head)
    mean = posterior.mean()
    draws = posterior.sample(5, seed=1, antithetic=True)
    for name, values in draws.items():
        for a, b in ((0, 1), (2, 3)):
            torch.testing.assert_close(values[a] + values[b], 2 * mean[name])
        assert len(values.flatten(1).unique(dim=0)) == 5
    assert torch.equal(draws["R"][0], posterior.sample(1, seed=1)["R"][0])


@pytest.mark.parametrize("guide", [lb.guides.Mixture(2), lb.guides.Flow(hidden=4), AutoNormal], ids=label)
def test_draws_without_a_mirror_are_independent_all_the_same(guide):
    posterior = fit(guide)
    pairs, free = (posterior.sample(4, seed=1, antithetic=antithetic)["R"] for antithetic in (True, False))
    assert torch.equal(pairs, free)


# --- prediction


def test_pairs_take_most_of_the_noise_out_of_a_prediction():
    """Ten draws against 400: the logits are nearly linear in R, so what is left is of second order."""
    posterior = fit(lb.guides.Diagonal(start_scale=1.0))
    whole = lb.predict(posterior, token_batches(), draws=400, seed=99).probs

    def error(antithetic):
        options = {"draws": 10, "antithetic": antithetic}
        found = [lb.predict(posterior, token_batches(), seed=seed, **options).probs for seed in range(8)]
        return float((torch.stack(found) - whole).square().mean())

    assert error(antithetic=True) < 0.2 * error(antithetic=False)


@pytest.mark.parametrize("guide", [lb.guides.LowRankPrecision(2), AutoNormal], ids=label)
@pytest.mark.parametrize("adapter", [lb.LoRAXS(2), lb.LoRA(2, "all-linear")], ids=label)
def test_folded_draws_equal_the_loop(guide, adapter):
    posterior = fit(guide, adapter=adapter)
    loop, folded = (lb.predict(posterior, token_batches(), draws=5, fold=fold) for fold in (1, 3))
    torch.testing.assert_close(loop.logits, folded.logits, atol=1e-5, rtol=1e-4)


def test_a_point_is_predicted_once(monkeypatch):
    posterior, batches = fit(lb.guides.Delta()), token_batches()
    once, passes = lb.predict(posterior, batches, at="mean").logits, []
    outputs = posterior.model.outputs
    monkeypatch.setattr(posterior.model, "outputs", lambda *args: passes.append(1) or outputs(*args))
    found = lb.predict(posterior, batches, draws=32)
    assert len(passes) == len(batches)
    assert torch.equal(found.logits, once.expand(32, -1, -1))
    assert found.probs.shape == (40, 3)


def test_labels_that_are_no_classes_are_not_scored():
    """-1 marks the rows of many test splits; as an index it would be the last class."""
    batches = [batch | {"labels": torch.full_like(batch["labels"], -1)} for batch in token_batches()]
    found = lb.predict(fit(lb.guides.Delta()), batches)
    assert len(found.probs) == 40
    for scored in (lambda: found.nll, found.losses, lambda: found.log_likelihood, found.scores):
        with pytest.raises(ValueError, match=r"labels 0\.\.2, got -1; -1 marks rows without a label"):
            scored()


def test_threads_predict_as_one_does():
    posterior, batches = fit(lb.guides.Diagonal()), token_batches(8)
    expected = lb.predict(posterior, batches, draws=2).logits
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: lb.predict(posterior, batches, draws=2).logits, range(12)))
    assert all(torch.equal(logits, expected) for logits in found)
    assert not pyro.settings.get("module_local_params")


def test_a_fit_needs_no_gradients_around_it_and_keeps_its_dropout(tmp_path):
    with torch.no_grad():
        posterior = lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), dropout=True), token_batches(8), epochs=1)
    posterior.save(tmp_path)
    assert lb.Posterior.load(tmp_path, tiny_bert()).model.dropout


def test_each_draw_is_one_function():
    """The same rows in other batches get the same logits, draw by draw."""
    posterior = fit(lb.guides.LowRank(2))
    whole = lb.predict(posterior, token_batches(40, 40), draws=4)
    (rows,) = token_batches(40, 40)
    tens = [{name: value[i : i + 10] for name, value in rows.items()} for i in range(0, 40, 10)]
    parts = lb.predict(posterior, tens, draws=4)
    torch.testing.assert_close(whole.logits, parts.logits, atol=1e-5, rtol=1e-4)


def test_prediction_keeps_the_datas_order_and_averages_probabilities():
    posterior = fit(lb.guides.LowRank(2))
    data = tiny_reviews(23)
    prediction = lb.predict(posterior, data, draws=6, batch_size=5)
    assert prediction.logits.shape == (6, 23, 3)
    assert prediction.labels.tolist() == data["label"]
    torch.testing.assert_close(prediction.probs, prediction.logits.softmax(-1).mean(0))
    for row in (0, 11, 22):
        alone = lb.predict(posterior, data.select([row]), draws=6)
        torch.testing.assert_close(prediction.logits[:, row], alone.logits[:, 0], atol=1e-5, rtol=1e-4)
    shuffled = lb.Batches(data, posterior.model.tokenizer, batch_size=5, shuffle=3)
    again = lb.predict(posterior, shuffled, draws=6)
    torch.testing.assert_close(again.logits, prediction.logits, atol=1e-5, rtol=1e-4)
    unlabelled = lb.predict(posterior, data.remove_columns("label"), draws=2)
    assert unlabelled.labels is None
    assert lb.predict(posterior, data, draws=6, batch_size=5).logits.equal(prediction.logits)


def test_mean_is_one_forward_at_the_mean():
    posterior = fit(lb.guides.Diagonal())
    prediction = lb.predict(posterior, token_batches(), at="mean")
    direct = torch.cat(
        [posterior.model.outputs(b, posterior.mean(), posterior.head()).logits for b in token_batches()]
    ).detach()
    torch.testing.assert_close(prediction.logits[0], direct)


# --- files


@pytest.mark.parametrize("guide", [*GUIDES, *STOCK, AutoIAFNormal], ids=label)
@pytest.mark.parametrize("head", ["point", "bayesian", "frozen"])
def test_saved_and_loaded_predictions_are_bit_identical(guide, head, tmp_path):
    posterior = fit(guide, lb.priors.LayerScale(0.1), head=head)
    posterior.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["posterior.json", "posterior.safetensors"]
    fresh = tiny_bert()
    torch.nn.init.normal_(fresh.classifier.weight)  # a new head: the saved one must be used
    loaded = lb.Posterior.load(tmp_path, fresh, tokenizer=tiny_tokenizer())
    for options in ({"draws": 3, "seed": 4}, {"at": "mean"}):
        expected, found = (lb.predict(p, tiny_reviews(), **options).logits for p in (posterior, loaded))
        assert torch.equal(expected, found)
    assert loaded.history == posterior.history
    assert repr(loaded.guide_spec) == repr(posterior.guide_spec)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("prior", PRIORS, ids=label)
@pytest.mark.parametrize("projection", [lb.projections.Gradient(), lb.projections.Random()], ids=label)
def test_specs_survive_the_file(prior, projection, tmp_path):
    posterior = fit(lb.guides.LowRank(3), prior, lb.LoRAXS(2, projection, ["query"], layers=[1]))
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert loaded.model.prior == prior
    assert loaded.model.adapter == posterior.model.adapter
    assert loaded.guide_spec == lb.guides.LowRank(3)
    assert loaded.model.size == 40
    lb.Posterior.load(tmp_path, tiny_bert(), prior=prior, guide=lb.guides.LowRank(3))
    for other in ({"prior": lb.priors.Normal(0.3)}, {"guide": lb.guides.LowRank(2)}, {"prior": users_prior}):
        with pytest.raises(ValueError, match=f"expected no {next(iter(other))}=, .* leave it out"):
            lb.Posterior.load(tmp_path, tiny_bert(), **other)


def test_ones_own_prior_is_asked_for(tmp_path):
    posterior = fit(lb.guides.Diagonal(), users_prior)
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match="expected prior= because .*users_prior"):
        lb.Posterior.load(tmp_path, tiny_bert())
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), prior=users_prior)
    assert torch.equal(loaded.sample(2, seed=0)["R"], posterior.sample(2, seed=0)["R"])


def test_saving_again_replaces_and_a_crash_keeps_the_old(tmp_path, monkeypatch):
    first, second = fit(lb.guides.Diagonal()), fit(lb.guides.LowRank(2))
    first.save(tmp_path)
    from pyro_lrblora import storage

    monkeypatch.setattr(storage, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        second.save(tmp_path)
    monkeypatch.undo()
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert loaded.guide_spec == lb.guides.Diagonal()
    second.save(tmp_path)
    assert lb.Posterior.load(tmp_path, tiny_bert()).guide_spec == lb.guides.LowRank(2)


def test_a_setting_that_json_does_not_have_leaves_no_file_behind(tmp_path):
    posterior = fit(lb.guides.Diagonal())
    posterior.settings["mine"] = object()
    with pytest.raises(TypeError, match="values that JSON has"):
        posterior.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_of_ones_own_guide_is_asked_for_as_a_whole(tmp_path):
    own = partial(AutoNormal, init_scale=0.01)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    posterior = lb.infer.ensemble(model, token_batches(), members=2, guide=own, epochs=1, progress=False)
    posterior.save(tmp_path)
    with pytest.raises(ValueError, match=r"write guide=lb.guides.Ensemble\(your guide, 2\)"):
        lb.Posterior.load(tmp_path, tiny_bert())
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), guide=lb.guides.Ensemble(own, 2))
    assert torch.equal(loaded.sample(2, seed=0)["R"], posterior.sample(2, seed=0)["R"])


def test_a_network_with_another_head_is_refused(tmp_path):
    fit(lb.guides.Diagonal()).save(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 16\), got \(2, 16\).*num_labels"):
        lb.Posterior.load(tmp_path, tiny_bert(2))


def test_settings_of_numpy_are_saved(tmp_path):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, layers=np.arange(2)))
    options = {"rates": lb.Rates(loc=np.float32(1e-3)), "clip": np.float32(1)}
    posterior = lb.fit(model, token_batches(), epochs=1, progress=False, **options)
    posterior.save(tmp_path)
    again = lb.Posterior.load(tmp_path, tiny_bert())
    assert list(again.model.adapter.layers) == [0, 1]
    assert again.settings["clip"] == 1


def test_a_base_with_a_vocabulary_of_ordinary_size_is_saved(tmp_path):
    """Its embedding has more than 2^24 entries, whose places a float32 cannot count."""
    config = BertConfig(
        vocab_size=30522, hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=8
    )
    network = BertForSequenceClassification(config)
    posterior = lb.fit(lb.BayesianLoRA(network, lb.LoRAXS(2)), token_batches(classes=2), steps=1, progress=False)
    posterior.save(tmp_path)
    again = lb.Posterior.load(tmp_path, network)
    assert torch.equal(again.mean()["R"], posterior.mean()["R"])
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight[-1, -1] += 100  # the last place is looked at
    with pytest.raises(ValueError, match="other weights in 1 of"):
        lb.Posterior.load(tmp_path, network)


def test_another_base_is_refused(tmp_path):
    fit(lb.guides.Diagonal()).save(tmp_path)
    with pytest.raises(ValueError, match="got other weights in .* such as"):
        lb.Posterior.load(tmp_path, tiny_bert(seed=7))
    from test_adapters import tiny_gpt2, tiny_roberta

    for other in (tiny_gpt2(), tiny_roberta()):
        with pytest.raises(ValueError, match="expected the base|targets"):
            lb.Posterior.load(tmp_path, other)
    lb.Posterior.load(tmp_path, tiny_bert().to(torch.bfloat16))  # the same base, stored more coarsely


def spoil_json(change):
    def spoil(folder):
        card = json.loads((folder / "posterior.json").read_text())
        change(card)
        (folder / "posterior.json").write_text(json.dumps(card))

    return spoil


def truncate(folder):
    path = folder / "posterior.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_tensors(change):
    """A change that whoever writes both files can make: the hash is that of the changed tensors."""

    def spoil(folder):
        tensors = load_file(folder / "posterior.safetensors")
        change(tensors)
        save_file(tensors, folder / "posterior.safetensors")
        found = hashlib.sha256((folder / "posterior.safetensors").read_bytes()).hexdigest()
        spoil_json(lambda card: card.update(sha256=found))(folder)

    return spoil


def narrow(tensors):
    name = next(name for name in tensors if name.endswith("query.A"))
    tensors[name] = tensors[name][:, :-1].contiguous()


SPOILED = {
    "no json": lambda folder: (folder / "posterior.json").unlink(),
    "no tensors": lambda folder: (folder / "posterior.safetensors").unlink(),
    "truncated tensors": truncate,
    "not json": lambda folder: (folder / "posterior.json").write_text("{"),
    "foreign json": lambda folder: (folder / "posterior.json").write_text("[1]"),
    "other version": spoil_json(lambda card: card.update(format="pyro_lrblora posterior, version 99")),
    "missing field": spoil_json(lambda card: card.pop("adapter")),
    "other guide": spoil_json(lambda card: card.update(guide={"type": "LowRank", "fields": {"rank": 5}})),
    "unknown type": spoil_json(lambda card: card["prior"].update(type="__import__")),
    "unknown autoguide": spoil_json(lambda card: card.update(guide={"autoguide": "os"})),
    "other modules": spoil_json(lambda card: card["modules"].update({"bert.other": [16, 16]})),
    "other shapes": spoil_json(lambda card: card["modules"].update(dict.fromkeys(card["modules"], [10**7, 10**7]))),
    "huge guide": spoil_json(lambda card: card.update(guide={"type": "LowRank", "fields": {"rank": 10**12}})),
    "number for names": spoil_json(lambda card: card.update(class_names=5)),
    "word for a number": spoil_json(lambda card: card.update(size="many")),
    "list for settings": spoil_json(lambda card: card.update(settings=[])),
    "no base": spoil_tensors(lambda tensors: tensors.pop("base")),
    "no head": spoil_tensors(lambda tensors: tensors.pop("head.classifier.weight")),
    "narrow A": spoil_tensors(narrow),
    "no A": spoil_tensors(lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("query.A")))),
    "unknown field": spoil_json(lambda card: card["prior"]["fields"].update(scalee=1)),
}


@pytest.mark.parametrize("how", SPOILED)
def test_corrupt_or_foreign_files(how, tmp_path):
    fit(lb.guides.LowRank(2)).save(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "whole")
    SPOILED[how](tmp_path)
    network = tiny_bert()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="expected"):
        lb.Posterior.load(tmp_path, network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    lb.Posterior.load(tmp_path / "whole", network)


def test_a_guide_fitted_by_hand_becomes_a_posterior():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    spec = lb.guides.LowRank(2)
    guide = spec(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for batch in token_batches():
        svi.step(batch)
    posterior = lb.Posterior(model, guide, spec)
    assert lb.predict(posterior, token_batches(), draws=2).logits.isfinite().all()
    assert not torch.equal(posterior.head()["classifier.weight"], model.head_start["classifier.weight"])


# --- every other family


def fit_grid(guide, adapter, draws="auto"):
    model = lb.BayesianLoRA(tiny_bert(), adapter, lb.priors.Normal(0.3), tokenizer=tiny_tokenizer())
    return lb.fit(model, token_batches(16), guide=guide, draws=draws, epochs=1, progress=False)


@pytest.mark.parametrize("draws", ["row", "shared"])
@pytest.mark.parametrize(("guide", "adapter"), GRID, ids=label)
def test_every_family_fits_predicts_saves_and_loads(guide, adapter, draws, tmp_path):
    posterior = fit_grid(guide, adapter, draws)
    assert posterior.settings["draws"] == draws
    assert len(pyro.get_param_store()) == 0
    mean, start = posterior.mean(), posterior.model.start()
    assert not any(torch.equal(mean[name], start[name]) for name in posterior.model.sites.shapes)
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), tokenizer=tiny_tokenizer())
    assert loaded.guide_spec == guide
    for options in ({"draws": 2, "seed": 4}, {"at": "mean"}):
        expected, found = (lb.predict(p, tiny_reviews(8), **options).logits for p in (posterior, loaded))
        assert torch.equal(expected, found)
    assert len(lb.predict(posterior, tiny_reviews(8), draws=6).logits.unique(dim=0)) > 1


@pytest.mark.parametrize("guide", [guide for guide, adapter in GRID if adapter == XS], ids=label)
def test_every_familys_moments_and_density_agree_with_draws(guide):
    posterior = fit_grid(guide, XS)
    flat = posterior.guide.distribution().sample((3000,))
    draws = posterior.model.sites.split(flat)
    mean, sd = posterior.model.sites.join(posterior.mean()), flat.std(0)
    behind = 256 if isinstance(guide, lb.guides.Flow) else math.inf  # draws that its mean was taken of
    assert ((flat.mean(0) - mean).abs() < 5 * sd * (1 / 3000 + 1 / behind) ** 0.5).all()
    if isinstance(guide, lb.guides.Dropout) or guide == lb.guides.Mixture(2, "delta"):
        with pytest.raises(TypeError, match="guide with a density"):
            posterior.log_prob(draws)
    else:
        entropy = 0.5 * torch.logdet(flat.double().T.cov()) + 0.5 * flat.shape[1] * math.log(2 * math.pi * math.e)
        # A normal has the greatest entropy among distributions of its covariance; a mixture's is smaller.
        slack = 4.0 if isinstance(guide, lb.guides.Mixture) else 0.5
        assert -slack < -float(posterior.log_prob(draws).mean()) - float(entropy) < 0.5
    if isinstance(guide, lb.guides.Dropout | lb.guides.Flow | lb.guides.Mixture):
        with pytest.raises(TypeError, match="sample covariance"):
            posterior.covariance()
    else:
        covariance = posterior.covariance()
        matrix, spread = covariance.dense(), covariance.variance.sqrt()
        torch.testing.assert_close(covariance.variance, matrix.diagonal())
        assert ((flat.T.cov() - matrix).abs() / (spread[:, None] * spread)).max() < 6 * (2 / 3000) ** 0.5


def test_another_tokenizer_is_told_from_the_own(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    network = tiny_bert()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), tokenizer=tiny_tokenizer())
    lb.fit(model, tiny_reviews(), epochs=1, progress=False).save(tmp_path)
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=other, pad_token="[PAD]", unk_token="[UNK]")
    with pytest.raises(ValueError, match="other tokens of the same text"):
        lb.Posterior.load(tmp_path, network, tokenizer=other)
    for same in (tiny_tokenizer(), None):
        lb.Posterior.load(tmp_path, network, tokenizer=same)


def test_the_precision_asked_for_is_that_of_the_forward():
    posterior = fit(lb.guides.Diagonal())
    for options in ({"draws": 2}, {"at": "mean"}, {"method": "linearised", "draws": 50}):
        whole, half = (lb.predict(posterior, token_batches(), precision=p, **options).logits for p in ("fp32", "bf16"))
        assert not torch.equal(whole, half)
        torch.testing.assert_close(whole.mean(0), half.mean(0), atol=0.1, rtol=0.1)


def test_the_scale_of_the_head_and_the_names_of_classes_survive_the_file(tmp_path):
    names = datasets.ClassLabel(names=["bad", "so so", "good"])
    rows = tiny_reviews().cast_column("label", names)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tiny_tokenizer(), head_scale=0.37)
    posterior = lb.fit(model, rows, epochs=1, progress=False)
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), tokenizer=tiny_tokenizer())
    assert loaded.model.head_scale == 0.37
    assert lb.predict(loaded, rows, draws=2).class_names == ["bad", "so so", "good"]
