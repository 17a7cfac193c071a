"""The comparison table against its parts."""

import copy
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_lrblora as lb
from pyro_lrblora import comparison, metrics
from pyro_lrblora.evidence import elbo, importance, psis_loo
from pyro_lrblora.guides.draws import Draws, DrawsGuide
from pyro_lrblora.guides.ensemble import Ensemble

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


@pytest.fixture(scope="module")
def reviews():
    """The first word tells the label of three rows in four, so that a temperature has an optimum."""

    def learnable(rows, seed):
        data = tiny_reviews(rows, seed=seed)
        told = [WORDS.index(text.split()[0]) % 3 for text in data["text"]]
        labels = [drawn if row % 4 == 0 else first for row, (drawn, first) in enumerate(zip(data["label"], told))]  # noqa: B905
        return data.remove_columns("label").add_column("label", labels)

    return {"train": learnable(40, 0), "validation": learnable(30, 1), "test": learnable(33, 2)}


@pytest.fixture(scope="module")
def fits(reviews):
    """One fit of many kinds, all in one subspace."""
    torch.manual_seed(0)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tiny_tokenizer()).prepare(reviews["train"])
    specs = {
        "point": lb.guides.Delta(),
        "diagonal": lb.guides.Diagonal(),
        "precision": lb.guides.LowRankPrecision(2),
        "flow": lb.guides.Flow(hidden=4),
        "mixture": lb.guides.Mixture(2),
        "points": lb.guides.Mixture(2, component="delta"),
        "dropout": lb.guides.Dropout(0.2),
        "AutoNormal": AutoNormal,
        "AutoDelta": AutoDelta,
    }
    fit = lambda spec: lb.fit(model, reviews["train"], guide=spec, epochs=2, progress=False)
    found = {name: fit(spec) for name, spec in specs.items()}
    stored = {name: value.unsqueeze(0) for name, value in found["diagonal"].sample(12, seed=0).items()}
    found["stored"] = lb.Posterior(found["diagonal"].model, DrawsGuide(stored), Draws(1, 12))
    found["ensemble"] = lb.infer.ensemble(model, reviews["train"], members=2, epochs=1, progress=False)
    assert isinstance(found["ensemble"].guide_spec, Ensemble)
    return found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("point", "a point has no density"),
        ("AutoDelta", "a point has no density"),
        ("points", "finitely many points"),
        ("dropout", "finitely many points"),
        ("stored", "stored draws"),
        ("ensemble", "ensemble's members"),
    ],
)
def test_without_a_density_there_is_no_elbo_and_it_says_why(fits, reviews, name, reason):
    for estimate in (elbo, importance) if name == "stored" else (elbo, psis_loo, importance):
        with pytest.raises(TypeError, match=reason):
            estimate(fits[name], reviews["train"])


def test_a_guide_that_leaves_out_a_site_has_no_density():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1), head="frozen", size=40)
    partial = lb.BayesianLoRA(model.network, lb.LoRAXS(2), head="frozen", size=40)
    spec = lambda model: AutoNormal(partial)
    posterior = lb.Posterior(model, lb.guides.stock.build_guide(spec, model), spec)
    with pytest.raises(TypeError, match="no density for the prior's sites"):
        elbo(posterior, token_batches())


def test_wrong_rows_and_draws_are_refused(fits, reviews):
    with pytest.raises(ValueError, match="N=40 rows that were fitted .* got 33"):
        elbo(fits["diagonal"], reviews["test"])
    with pytest.raises(ValueError, match="column 'label'"):
        elbo(fits["diagonal"], reviews["train"].remove_columns("label"))
    with pytest.raises(ValueError, match="draws to be an integer >= 1"):
        psis_loo(fits["diagonal"], reviews["train"], draws=0)


@pytest.mark.parametrize("draws", [1, 10, 24])
def test_too_few_draws_for_a_tail_are_said_and_not_hidden(fits, reviews, draws):
    pieces = importance(fits["diagonal"], reviews["train"], draws=draws)
    loo = pieces.loo
    assert loo.k_hat.isnan().all()
    assert math.isnan(loo.share_above())
    assert f"no tail to fit in {draws} draws" in loo.note
    weights = (pieces.log_weights.unsqueeze(1) - pieces.log_likelihood).softmax(0)
    expected = (weights * pieces.log_likelihood.exp()).sum(0).log()
    torch.testing.assert_close(loo.elpd, expected)
    assert math.isnan(pieces.elbo.standard_error) == (draws == 1)


@pytest.fixture(scope="module")
def table(fits, reviews):
    chosen = {name: fits[name] for name in ("point", "diagonal", "precision")}
    return lb.compare(chosen, reviews["test"], train=reviews["train"], validation=reviews["validation"], draws=4)


def losses(probs, labels):
    """NLL and Brier score of every row, the long way."""
    rows = [(-math.log(p[y]), sum((q - (c == y)) ** 2 for c, q in enumerate(p))) for p, y in zip(probs, labels)]  # noqa: B905
    return {"NLL": np.array([nll for nll, _ in rows]), "Brier": np.array([brier for _, brier in rows])}


@pytest.fixture(scope="module")
def by_hand(fits, reviews):
    """Predicted probabilities of every row of `table`, from predict and metrics alone."""
    found = {}
    several = [(name, at) for name in ("diagonal", "precision") for at in (None, "mean")]
    for name, at in [("point", None), *several]:
        log_probs = {
            role: lb.predict(fits[name], reviews[role], draws=4 if name != "point" else 1, at=at).log_probs.double()
            for role in ("test", "validation", "train")
        }
        row = name if at is None else f"{name}, mean"
        temperature = metrics.fit_temperature(log_probs["validation"], reviews["validation"]["label"])
        found[row] = {role: each.exp().numpy() for role, each in log_probs.items()}, 1.0
        scaled = {role: torch.softmax(each / temperature, -1).numpy() for role, each in log_probs.items()}
        found[f"{row}, temperature"] = scaled, temperature
    return found


def test_rows_are_posteriors_means_and_both_at_their_temperature(table):
    several = [f"{name}{kind}" for name in ("diagonal", "precision") for kind in ("", ", mean")]
    assert list(table.index) == [f"{row}{kind}" for row in ["point", *several] for kind in ("", ", temperature")]


def test_a_bar_tells_which_posterior_is_at_work(fits, reviews, capsys):
    two = dict(list(fits.items())[:2])
    lb.compare(two, reviews["test"])
    shown = capsys.readouterr().err
    assert all(name in shown for name in [*two, "compare"])
    lb.compare(two, reviews["test"], progress=False)
    assert capsys.readouterr().err == ""


def test_scores_are_those_of_the_predictions(table, by_hand, reviews):
    labels = reviews["test"]["label"]
    for row, (probs, temperature) in by_hand.items():
        found = table.loc[row]
        assert found["accuracy"] == pytest.approx(np.mean(probs["test"].argmax(-1) == labels))
        for name, values in losses(probs["test"], labels).items():
            assert found[name] == pytest.approx(values.mean(), abs=1e-6)
        assert found["ECE (15 bins)"] == pytest.approx(metrics.ece(probs["test"], labels, 15), abs=1e-6)
        in_sample = losses(probs["train"], reviews["train"]["label"])["NLL"].mean()
        assert found["train NLL"] == pytest.approx(in_sample, abs=1e-6)
        if row.endswith("temperature"):
            assert found["temperature"] == pytest.approx(temperature, rel=1e-3)
            assert 0.02 < temperature < 50  # inside its bounds, or whose rows it was fitted on would not show
            assert abs(temperature - 1) > 0.01
        else:
            assert math.isnan(found["temperature"])


def test_differences_are_paired_and_from_the_row_with_the_best_nll(table, by_hand, reviews):
    labels, best = reviews["test"]["label"], table["NLL"].idxmin()
    assert table.loc[best, ["NLL - best", "NLL - best SE", "Brier - best", "Brier - best SE"]].tolist() == [0] * 4
    assert (table["NLL - best"] >= 0).all()
    reference = losses(by_hand[best][0]["test"], labels)
    for row, (probs, _) in by_hand.items():
        for name, values in losses(probs["test"], labels).items():
            difference = values - reference[name]
            assert table.loc[row, f"{name} - best"] == pytest.approx(difference.mean(), abs=1e-6)
            error = difference.std(ddof=1) / len(labels) ** 0.5
            assert table.loc[row, f"{name} - best SE"] == pytest.approx(error, abs=1e-6)


def test_evidence_is_per_training_row_and_blank_for_a_point_a_mean_and_a_temperature(table, fits, reviews):
    names = ["ELBO per row", "ELBO per row SE", "LOO per row", "LOO per row SE", "high k-hat"]
    for name in ("diagonal", "precision"):
        pieces = importance(fits[name], reviews["train"], draws=50)
        total = pieces.loo.total
        expected = [pieces.elbo.value, pieces.elbo.standard_error, total.value, total.standard_error]
        found = table.loc[name, names]
        assert found.iloc[:4].tolist() == pytest.approx([value / 40 for value in expected], rel=1e-5)
        assert found.iloc[4] == float((pieces.loo.k_hat > 1 - 1 / math.log10(50)).double().mean())
    assert table.loc[[row for row in table.index if row not in ("diagonal", "precision")], names].isna().all(axis=None)
    assert "point: no ELBO or LOO: a point has no density" in table.attrs["notes"]
    assert "diagonal, precision: ELBO and LOO are conditional on the point head" in table.attrs["notes"]
    assert "diagonal, precision: k-hat is high above 0.41, with 50 draws" in table.attrs["notes"]


def test_k_hat_is_high_above_the_limit_of_so_few_draws(fits, reviews):
    """A guide that is too narrow by a fifth: k-hats between 0.41, the limit for 50 draws, and the usual 0.7."""
    narrow = copy.deepcopy(fits["diagonal"])
    with torch.no_grad():
        narrow.guide.scale_unconstrained += math.log(0.8)
    k_hat = importance(narrow, reviews["train"], draws=50).loo.k_hat
    assert ((k_hat > 0.42) & (k_hat < 0.69)).all()
    assert lb.compare({"narrow": narrow}, reviews["test"], train=reviews["train"]).loc["narrow", "high k-hat"] == 1


def test_costs(table, fits):
    for name, size in (("point", 1), ("diagonal", 2), ("precision", 4)):
        model, row = fits[name].model, table.loc[name]
        assert row["parameters"] == size * model.sites.size
        assert row["head"] == 16 * 3 + 3
        assert row["total"] == row["parameters"] + row["head"]
        lora = sum(8 * (m.in_features + m.out_features) for m in model.modules.values())
        assert row["of LoRA r=8"] == pytest.approx(row["parameters"] / lora)
        assert row["training s"] == pytest.approx(sum(epoch["seconds"] for epoch in fits[name].history))
        assert row["s/step"] == pytest.approx(row["training s"] / fits[name].history[-1]["step"])
        assert row["s/1000 predictions"] > 0
        assert (table.loc[f"{name}, temperature", "parameters":] == row["parameters":]).all()


def test_seconds_per_step_of_an_ensemble_count_every_members_steps(fits, reviews):
    table = lb.compare({"ensemble": fits["ensemble"]}, reviews["test"], draws=2)
    seconds, steps = sum(row["seconds"] for row in fits["ensemble"].history), 2 * 2  # members, batches of 32
    assert table.loc["ensemble", "s/step"] == pytest.approx(seconds / steps)


def test_all_heads_of_an_ensemble_count(fits):
    assert fits["ensemble"].parameter_counts()["head"] == 2 * (16 * 3 + 3)


def test_every_kind_of_posterior_has_its_row(fits, reviews):
    table = lb.compare(fits, reviews["test"], train=reviews["train"], draws=2, evidence_draws=5)
    assert set(fits) < set(table.index)
    assert table["NLL"].notna().all()
    notes = "\n".join(table.attrs["notes"])
    assert "mixture, points, ensemble: no row for its mean" in notes
    assert not {"mixture, mean", "ensemble, mean", "point, mean", "AutoDelta, mean"} & set(table.index)
    assert {"flow, mean", "stored, mean", "dropout, mean", "AutoNormal, mean"} < set(table.index)
    blank = {name for name in fits if math.isnan(table.loc[name, "ELBO per row"])}
    assert blank == {"point", "points", "dropout", "AutoDelta", "stored", "ensemble"}
    for name in blank:
        assert re.search(rf"\b{name}\b.*: no ELBO{'' if name == 'stored' else ' or LOO'}: ", notes)
        assert math.isnan(table.loc[name, "LOO per row"]) == (name != "stored")
    loo = psis_loo(fits["stored"], reviews["train"], draws=5)
    assert table.loc["stored", "LOO per row"] == pytest.approx(loo.total.value / 40, rel=1e-6)
    assert table.loc["stored", "LOO per row SE"] == pytest.approx(loo.total.standard_error / 40, rel=1e-6)
    assert "k-hat is unknown for 40 of 40 rows: no tail to fit in 5 draws" in notes
    assert table["high k-hat"].isna().all()


def test_a_missing_role_leaves_its_columns_out_and_says_so(fits, reviews):
    scores = {"accuracy", "NLL", "ECE (7 bins)", "Brier"}
    for role, columns in (
        ("train", {"train NLL", "ELBO per row", "LOO per row", "high k-hat"}),
        ("validation", {"temperature"}),
    ):
        roles = {name: reviews[name] for name in {"train", "validation"} - {role}}
        table = lb.compare({"a": fits["diagonal"]}, reviews["test"], draws=2, bins=7, evidence_draws=2, **roles)
        assert not columns & set(table)
        assert scores < set(table)
        assert any(f"lb.compare has with {role}=" in n for n in table.attrs["notes"])


def test_everything_is_checked_before_any_prediction(fits, reviews, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("predicted before everything was checked")

    for name in ("predict", "importance"):
        monkeypatch.setattr(comparison, name, refuse)
    good, test = {"a": fits["diagonal"]}, reviews["test"]
    four = lb.fit(
        lb.BayesianLoRA(tiny_bert(classes=4), lb.LoRAXS(2), tokenizer=tiny_tokenizer()),
        reviews["train"], guide=lb.guides.Delta(), epochs=1, progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="at least one posterior"):
        lb.compare({}, test)
    with pytest.raises(ValueError, match="column 'label' or 'labels' in the test data"):
        lb.compare(good, test.remove_columns("label"))
    with pytest.raises(ValueError, match="in the validation data"):
        lb.compare(good, test, validation=reviews["validation"].remove_columns("label"))
    with pytest.raises(ValueError, match="same classes.*'a': 3, 'b': 4"):
        lb.compare(good | {"b": four}, test)
    with pytest.raises(ValueError, match="N=40 rows"):
        lb.compare(good, test, train=reviews["validation"])
    with pytest.raises(ValueError, match="expected labels 0..2"):
        lb.compare(good, tiny_reviews(40, classes=5))
    with pytest.raises(ValueError, match="names that do not end in"):
        lb.compare(good | {"a, mean": fits["precision"]}, test)


def test_it_prints_in_blocks_of_a_terminals_width(table):
    text = str(table)
    assert max(map(len, text.splitlines())) <= 120
    titles = ["On test rows:", "Evidence, in nats per training row:", "Costs"]
    blocks = re.split(r"\n\n", text)
    assert [block.startswith(title) for block, title in zip(blocks, titles, strict=False)] == [True] * 3
    assert blocks[3].startswith("- ")
    first = [line.split("  0.")[0].rstrip() for line in blocks[0].splitlines()[2:]]
    assert first[:4] == ["point", "  temperature", "diagonal", "  temperature"]
    assert first[4:6] == ["  mean", "  mean, temperature"]
    assert len(first) == len(table)
    assert [line.split()[0] for line in blocks[1].splitlines()[2:]] == ["diagonal", "precision"]
    row = table.loc["diagonal"]
    for name in ("ELBO per row", "LOO per row"):
        assert f"{row[name]:.3f} ± {row[f'{name} SE']:.3f}" in blocks[1]
    worst = table.loc[table["NLL"].idxmax()]
    assert f"{worst['NLL - best']:.3f} ± {worst['NLL - best SE']:.3f}" in blocks[0]
    costs = blocks[2].splitlines()
    # Scaling costs nothing of its own.
    assert [line.split()[0] for line in costs[2:]] == ["point", "diagonal", "mean", "precision", "mean"]
    assert "nan" not in text.lower()


def test_a_column_of_ones_own_is_printed_and_a_selection_is_a_plain_frame(table):
    own = comparison.Comparison(table)
    own.insert(1, "|p - p_true|", 0.25)
    assert "\\" not in str(own)  # not wrapped
    own["words"] = "yes"
    assert "|p - p_true|" in str(own).split("\n\n")[0]
    assert "yes" in str(own)
    assert type(table[["NLL"]]) is pd.DataFrame
    assert str(comparison.Comparison({"NLL": [1.0]}, index=["a"])).startswith("On test rows:\n")


def test_long_names_wrap():
    names = ["accuracy", "NLL", "NLL - best", "ECE (15 bins)", "Brier", "Brier - best", "temperature", "train NLL"]
    text = str(comparison.Comparison({name: [0.5] for name in names}, index=["a rather long name " * 3]))
    assert max(map(len, text.splitlines())) <= 120
    assert all(name in text for name in names if name != "temperature")


def test_html_markdown_and_csv_have_every_number(table):
    expected = [f"{value:.6f}" for value in table.astype(float).to_numpy().flatten() if not math.isnan(value)]
    numbers = lambda text: re.findall(r"-?\d+\.\d{6}\b", text)
    whole = comparison.Comparison(table.astype(float))
    assert numbers(whole.to_html(float_format="{:.6f}".format)) == expected
    assert numbers(whole.to_markdown(floatfmt=".6f")) == expected
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(table.to_csv()), index_col=0), pd.DataFrame(table))
    for row in table.index:
        assert row in table.to_markdown()
        assert row in table.to_html()
    assert "ELBO per row SE" in table.to_markdown()


def test_rows_of_a_shuffling_loader_are_compared_in_pairs():
    batches = token_batches(rows=24)
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    posterior = lb.fit(model, batches, epochs=1, progress=False)
    found, expected = (lb.compare({"one": posterior, "again": posterior}, data, draws=4) for data in (loader, batches))
    columns = ["NLL - best", "NLL - best SE"]
    np.testing.assert_allclose(found[columns], expected[columns], atol=1e-6)
    diagnosis = lb.diagnose(posterior, loader, draws=4)
    at_mean, found = diagnosis.findings.at_mean, diagnosis.findings.prediction
    assert torch.equal(at_mean.labels, found.labels)


def test_other_rows_of_equal_number_are_not_taken_for_those_fitted():
    batches, others = token_batches(), token_batches(seed=7)
    posterior = lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), batches, epochs=1, progress=False)
    for train, said in ((batches, False), (others, True)):
        notes = lb.compare({"one": posterior}, batches, train=train, draws=2, evidence_draws=2).attrs["notes"]
        assert any("one: train= holds other rows" in note for note in notes) == said
    data, words = tiny_reviews(20), tiny_tokenizer()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=words)
    posterior = lb.fit(model, data, epochs=1, progress=False)
    for train, said in ((data, False), (tiny_reviews(20, seed=9), True)):
        notes = lb.compare({"one": posterior}, data, train=train, draws=2, evidence_draws=2).attrs["notes"]
        assert any("train= holds other rows" in note for note in notes) == said


def test_seed_and_bins_reach_every_row(fits, reviews):
    posterior = fits["diagonal"]
    table = lb.compare({"one": posterior}, **reviews, draws=4, evidence_draws=20, bins=3, seed=7, progress=False)
    options = {"draws": posterior.balanced_draws(4), "seed": 7, "progress": False}
    held, found = (lb.predict(posterior, reviews[role], **options) for role in ("validation", "test"))
    tempered = found.tempered(lb.metrics.fit_temperature(held.log_probs, held.labels))
    for row, prediction in {"one": found, "one, temperature": tempered}.items():
        for name, value in prediction.scores(3).items():
            assert table.loc[row, name] == pytest.approx(value, rel=1e-5)
    bound = elbo(posterior, reviews["train"], draws=20, seed=7, progress=False)
    assert table.loc["one", "ELBO per row"] == pytest.approx(bound.value / 40, rel=1e-5)
