"""Every architecture: its targets, exactness against edited weights, and a fit from start to disk."""

import copy
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, NAMES, ROWS, all_linear, batch_of, build, latents_of, plain
from conftest import LinearNetwork, assert_same_state, random_latents, state
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyro_lrblora as lb
from pyro_lrblora.adapters.rows import mixing_modules
from pyro_lrblora.adapters.statistics import sum_statistics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*run one at a time"),  # asserted where it matters
    pytest.mark.filterwarnings("ignore:.*scales had not converged"),
]


@pytest.mark.parametrize("name", NAMES)
def test_targets(name):
    architecture, network = ARCHITECTURES[name], build(name)
    counts = {"attention": architecture.attention, "mlp": architecture.mlp, "all-linear": architecture.all_linear}
    found = {}
    for targets, count in counts.items():
        if not count:
            with pytest.raises(ValueError, match="expected targets that match"):
                lb.BayesianLoRA(network, lb.LoRAXS(2, targets=targets))
            continue
        model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets=targets))
        found[targets] = set(model.modules)
        assert len(model.modules) == count, sorted(model.modules)
        head = {parameter.rpartition(".")[0] for parameter in model.head_start}
        assert head
        assert not head & set(model.modules)
        assert all(isinstance(module, nn.Linear | Conv1D) for module in model.modules.values())
    assert not found.get("attention", set()) & found.get("mlp", set())
    # What "all-linear" adds belongs to no layer.
    rest = found["all-linear"] - found.get("attention", set()) - found.get("mlp", set())
    assert all(module.endswith(("pooler.dense", "albert.pooler", "embedding_hidden_mapping_in")) for module in rest)


@pytest.mark.parametrize("name", NAMES)
def test_start_is_the_plain_network_bit_for_bit(name):
    network, batch = build(name), batch_of(name)
    model = lb.BayesianLoRA(network, all_linear)
    assert torch.equal(model.outputs(batch, model.start(), {}).logits, plain(network, batch))
    # Also with a draw of zeros per row, as a warm start has it.
    zeros = {site: value.expand(ROWS, *value.shape) for site, value in model.start().items()}
    torch.testing.assert_close(model.outputs(batch, zeros, {}).logits, plain(network, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_updates_equal_edited_weights(name):
    """The network attached, against a copy with B R A added to its weights: shared, and one for each row."""
    network, batch = build(name), batch_of(name)
    model = lb.BayesianLoRA(network, all_linear)

    def edited(latents):
        other = copy.deepcopy(network)
        for module, (core,) in model.adapted.per_module(latents).items():
            basis, target = model.adapted.bases[module], other.get_submodule(module)
            update = basis.B @ core @ basis.A
            target.weight.data += update.T if isinstance(target, Conv1D) else update
        return other

    shared = latents_of(model)
    together = model.outputs(batch, shared, {}).logits
    assert (together - plain(network, batch)).abs().max() > 1e-3
    torch.testing.assert_close(together, plain(edited(shared), batch), atol=1e-5, rtol=1e-4)

    own = latents_of(model, ROWS)
    logits = model.outputs(batch, own, {}).logits
    for row in range(ROWS):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        expected = plain(edited({site: value[row] for site, value in own.items()}), alone)
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_see_more_than_rows_are_found(name):
    model, batch = lb.BayesianLoRA(build(name), all_linear), batch_of(name)
    endings = {module.rpartition(".")[2] for module in mixing_modules(model, batch)}
    assert endings == set(ARCHITECTURES[name].mixing)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_statistics_equal_gradients_of_the_weights(name):
    """The summed gradient, against autograd on the weights themselves, modules called twice among them."""
    network, batch = build(name), batch_of(name)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Gradient(), targets="all-linear"))
    found = sum_statistics(model, [batch])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    network.requires_grad_(True)
    nll = nn.functional.cross_entropy(network(**inputs).logits, batch["labels"], reduction="sum")
    weights = [module.weight for module in model.modules.values()]
    expected = torch.autograd.grad(-nll, weights, allow_unused=True)
    for (path, module), gradient in zip(model.modules.items(), expected, strict=True):
        gradient = torch.zeros_like(module.weight) if gradient is None else gradient
        gradient = gradient.T if isinstance(module, Conv1D) else gradient
        torch.testing.assert_close(
            found[path]["gradient"], gradient, atol=1e-4 * float(gradient.norm()) + 1e-6, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v3", "xlnet", "vit"])
def test_label_free_statistics_are_sums_over_rows(name):
    """sum over rows and classes of p(c) G G', G being one row's gradient of log p(c) by the weight."""
    network, batch = build(name), batch_of(name)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Gradient(label_free=True), targets="all-linear"))
    found = sum_statistics(model, [batch])
    weights = [module.weight for module in model.modules.values()]
    network.requires_grad_(True)
    expected = [torch.zeros(len(weight), len(weight)) for weight in weights]
    for row in range(ROWS):
        alone = {key: value[row : row + 1] for key, value in batch.items() if key != "labels"}
        log_probs = network(**alone).logits.log_softmax(-1)[0]
        for log_prob in log_probs:
            for total, gradient in zip(
                expected, torch.autograd.grad(log_prob, weights, retain_graph=True), strict=True
            ):
                total += log_prob.detach().exp() * gradient @ gradient.T
    for path, total in zip(model.modules, expected, strict=True):
        torch.testing.assert_close(found[path]["left"], total, atol=1e-4 * float(total.norm()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "deberta-v3", "xlnet"])
@pytest.mark.parametrize("projection", [lb.projections.WhitenedSVD(), lb.projections.Gradient(label_free=True)])
def test_statistics_do_not_depend_on_how_rows_are_batched(projection, name):
    """DeBERTa's positions count once per row, whatever the batch."""
    batch, found = batch_of(name), []
    single = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(ROWS)]
    for data in ([batch], single):
        model = lb.BayesianLoRA(build(name), lb.LoRAXS(2, projection, targets="all-linear"))
        found.append(sum_statistics(model, data))
    for module, expected in found[1].items():
        for key, value in expected.items():
            scale = float(value.norm())
            torch.testing.assert_close(found[0][module][key], value, atol=1e-4 * scale + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_fit_predict_save_load_detach(name, tmp_path):
    network = build(name).train()
    network.requires_grad_(True)
    before = state(network)
    data = [batch_of(name, seed) for seed in range(2)]
    model = lb.BayesianLoRA(network, all_linear)
    posterior = lb.fit(model, data, guide=lb.guides.LowRankPrecision(rank=2), steps=2, progress=False)
    assert posterior.history[-1]["step"] == 2
    assert torch.isfinite(torch.tensor(posterior.history[-1]["elbo"]))
    assert all(value.abs().sum() > 0 for value in posterior.mean().values())
    prediction = lb.predict(posterior, data, draws=3)
    assert prediction.logits.shape == (3, 2 * ROWS, 3)
    assert prediction.logits.std(0).max() > 1e-4
    # Draws folded into the batch's rows, as a GPU has them.
    folded = lb.predict(posterior, data, draws=3, fold=3)
    torch.testing.assert_close(folded.logits, prediction.logits, atol=1e-4, rtol=1e-4)

    posterior.save(tmp_path)
    again = lb.Posterior.load(tmp_path, build(name))
    assert torch.equal(lb.predict(again, data, draws=3).logits, prediction.logits)
    assert_same_state(before, state(network))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_mixes_its_rows_is_refused():
    class Centred(LinearNetwork):
        def forward(self, x):
            return self.layer(x - x.mean(0))

    model = lb.BayesianLoRA(Centred(), lb.LoRAXS(2, targets=["layer"]))
    x, values = torch.randn(3, 7), random_latents(model, 3)
    with pytest.raises(ValueError, match="treats the rows of a batch apart, got a Centred.*draws='shared'"):
        model.outputs({"x": x}, values, {})
    assert model.outputs({"x": x}, {"R": values["R"][0]}, {}).shape == (3, 6)


def test_one_warning_where_rows_are_run_one_at_a_time():
    model, batch = lb.BayesianLoRA(build("deberta-v3"), all_linear), batch_of("deberta-v3")
    latents = latents_of(model, ROWS)
    with pytest.warns(UserWarning, match=r"4 adapted modules, such as '.*query_proj'.*draws='shared'"):
        model.outputs(batch, latents, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.outputs(batch, latents, {})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_the_left_moves_no_row(name):
    """GPT-2 counts padding where it is not told: a row's likelihood would depend on the longest row of its batch."""
    network, batch = build(name), dict(batch_of(name))
    batch.pop("labels", None)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="attention"), size=4)
    left = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in batch.items()}
    with torch.no_grad():
        plain, padded = (model.pretrained_outputs(each, {}).logits for each in (batch, left))
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)
