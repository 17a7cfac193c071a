"""Attach, detach, targets, and what an update adds."""

import pytest
import torch
import transformers
from conftest import LinearNetwork, assert_same_state, label, random_latents, state, tiny_bert, token_batches
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.adapters.attach import Attachment
from pyro_lrblora.adapters.targets import base_weight, find_targets


def tiny_gpt2():
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        num_labels=3,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return transformers.GPT2ForSequenceClassification(config).eval()


def tiny_llama():
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_labels=3, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).eval()


def tiny_roberta():
    torch.manual_seed(2)
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


NETWORKS = [tiny_bert, tiny_gpt2, tiny_llama, tiny_roberta]
ADAPTERS = [lb.LoRAXS(2, targets="all-linear"), lb.LoRA(2, targets="all-linear"), lb.LoRA(2, alpha=16)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=label)
@pytest.mark.parametrize("build", NETWORKS)
def test_start_is_the_base_model_and_detach_restores_it(build, adapter):
    network = build().train()
    network.requires_grad_(True)
    before = state(network)
    model = lb.BayesianLoRA(network, adapter)
    batch = token_batches(8)[0]
    outputs = model.outputs(batch, model.start(), model.head_values())
    # An error in the block must not leave anything behind either.
    with pytest.raises(KeyError), model.attached():
        model.outputs(batch, {}, {})
    assert_same_state(before, state(network))
    with torch.no_grad():
        base = network.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(outputs.logits, base)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=label)
@pytest.mark.parametrize("build", NETWORKS)
def test_update_equals_changed_weights(build, adapter):
    """The attached network against one whose weights were changed to W0 + low-rank product."""
    network = build()
    model = lb.BayesianLoRA(network, adapter)
    batch = token_batches(8)[0]
    latents = {name: 0.3 * value for name, value in random_latents(model).items()}
    attached = model.outputs(batch, latents, {}).logits
    assert (attached - model.outputs(batch, model.start(), {}).logits).abs().max() > 1e-3
    with torch.no_grad():
        for name, latent in model.adapted.per_module(latents).items():
            left, right = model.adapted.low_rank_factors(name, latent)
            base_weight(network.get_submodule(name)).add_(left @ right)
        changed = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (attached - changed).abs().max() < 1e-4


@pytest.mark.parametrize("adapter", ADAPTERS, ids=label)
@pytest.mark.parametrize("build", NETWORKS)
def test_whole_weights_without_gradients_give_what_added_updates_give(build, adapter):
    model = lb.BayesianLoRA(build(), adapter)
    batch = token_batches(8)[0]
    latents = {name: 0.3 * value for name, value in random_latents(model).items()}
    added = model.outputs(batch, latents, {}).logits
    own, between, during = [], [], []
    for module in model.modules.values():
        own.append(module.weight)
        module.register_forward_pre_hook(lambda module, args: between.append(module.weight))
        module.register_forward_hook(lambda module, args, output: during.append(module.weight))
    with torch.no_grad(), model.attached():
        for _ in range(2):
            whole = model.outputs(batch, latents, {}).logits
    assert (added - whole).abs().max() < 1e-5
    # Hooks that were there before see each weight on its way in as it was, on its way out as it is used.
    assert {id(weight) for weight in between} == {id(weight) for weight in own}
    assert {id(weight) for weight in during} - {id(weight) for weight in own}


def test_an_error_inside_a_module_leaves_its_own_weight():
    network = tiny_bert()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"))
    latents, batch, before = random_latents(model), token_batches(8)[0], state(network)
    module = list(model.modules.values())[-1]
    module.forward = lambda inputs: 1 / 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model.outputs(batch, latents, {})
    assert_same_state(before, state(network))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=label)
@pytest.mark.parametrize("build", NETWORKS)
def test_rowwise_draws_equal_a_loop_of_single_draws(build, adapter):
    model = lb.BayesianLoRA(build(), adapter)
    batch = token_batches(8)[0]
    latents = random_latents(model, 8)
    together = model.outputs(batch, latents, {}).logits
    for row in range(8):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        single = model.outputs(alone, {name: value[row] for name, value in latents.items()}, {}).logits
        torch.testing.assert_close(together[row : row + 1], single, atol=1e-5, rtol=1e-4)


def test_only_latents_get_gradients():
    network = tiny_bert().train()
    model = lb.BayesianLoRA(network)
    latents = {name: value.requires_grad_() for name, value in random_latents(model).items()}
    model.outputs(token_batches(8)[0], latents, {}).logits.sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(value.grad.abs().sum() > 0 for value in latents.values())


def test_two_adapters_at_once_are_an_error():
    model = lb.BayesianLoRA(tiny_bert())
    other = lb.BayesianLoRA(model.network, lb.LoRA(2))
    with model.attached(), pytest.raises(RuntimeError, match="already carries an adapter"):
        other.outputs(token_batches(8)[0], other.start(), {})


@pytest.mark.parametrize(
    ("build", "targets", "count"),
    [
        (tiny_bert, "attention", 8),
        (tiny_bert, "mlp", 4),
        (tiny_bert, "all-linear", 13),  # the pooler is linear too; the head is not adapted
        (tiny_bert, ["query", "value"], 4),
        (tiny_bert, r".*\.layer\.1\..*key", 1),
        (tiny_gpt2, "attention", 4),
        (tiny_gpt2, "mlp", 4),
        (tiny_llama, "attention", 8),
        (tiny_llama, "mlp", 6),
        (tiny_roberta, "all-linear", 12),
    ],
)
def test_targets(build, targets, count):
    assert len(lb.BayesianLoRA(build(), lb.LoRAXS(2, targets=targets)).modules) == count


def test_layers_narrow_the_targets():
    modules = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, targets="all-linear", layers=[1])).modules
    assert len(modules) == 6
    assert all("layer.1." in name for name in modules)


def test_no_match_lists_what_could_be_matched():
    with pytest.raises(ValueError, match=r"targets=\['qery'\].*attention.self.query.*layers \[0, 1\]"):
        find_targets(tiny_bert(), ["qery"])
    with pytest.raises(ValueError, match=r"write targets=\['query'\]$"):
        find_targets(tiny_bert(), "query")
    with pytest.raises(ValueError, match="regular expression"):
        find_targets(tiny_bert(), "(")


@pytest.mark.parametrize(
    ("targets", "layers", "idle"), [(["query", "valeu"], None, r"\['valeu'\]"), ("all-linear", [1, 9], r"\[9\]")]
)
def test_every_name_and_layer_has_to_match(targets, layers, idle):
    with pytest.raises(ValueError, match=f"of which {idle} match none"):
        find_targets(tiny_bert(), targets, layers)


def test_a_linear_module_that_is_never_called_is_no_target():
    """nn.MultiheadAttention reads its out_proj's weight, past any hook."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24)
    assert list(find_targets(layer, "all-linear")) == ["linear1", "linear2"]


def test_updates_are_float32_whatever_the_default_is():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, targets="all-linear"))
    batch = token_batches(16)[0]
    torch.set_default_dtype(torch.float64)
    try:
        posterior = lb.fit(model, [batch], epochs=1, progress=False)
        assert lb.predict(posterior, [batch], draws=2).logits.isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_batch_norms_stay_as_they_are_under_dropout():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm = torch.nn.Embedding(60, 16), torch.nn.BatchNorm1d(16)
            self.inner, self.classifier = torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask):
            return self.classifier(self.norm(self.inner(self.words(input_ids).mean(1))))

    torch.manual_seed(0)
    network = Network()
    before = state(network)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets=["inner"]), head_modules=["classifier"], dropout=True)
    lb.fit(model, token_batches(16), epochs=1, progress=False)
    assert_same_state(before, state(network))


@pytest.mark.parametrize("adapter", [lb.LoRAXS, lb.LoRA])
@pytest.mark.parametrize("rank", [0, -1, 17])
def test_rank_that_does_not_fit(adapter, rank):
    with pytest.raises(ValueError, match=f"expected 1 <= rank <= 16 for module .*got rank={rank}"):
        lb.BayesianLoRA(tiny_bert(), adapter(rank))


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_a_scale_that_leaves_no_update_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha > 0, or None for no scaling"):
        lb.LoRA(2, alpha=alpha)


def test_output_embedding_is_never_adapted():
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)
    text = lb.likelihoods.NextToken()
    network = transformers.GPT2LMHeadModel(config)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"), likelihood=text)
    assert "lm_head" not in model.modules
    assert model.head_start == {}


def test_flattened_inputs_keep_their_rows():
    """A module that gets (B * T, n) treats every T tokens as one row's."""

    class Flattening(LinearNetwork):
        def forward(self, x):
            return self.layer(x.reshape(-1, 7)).reshape(*x.shape[:-1], 6)

    model = lb.BayesianLoRA(Flattening(), lb.LoRAXS(2, targets=["layer"]))
    x, latents = torch.randn(3, 5, 7), random_latents(model, 3)
    reference = lb.BayesianLoRA(model.network, model.adapter)
    straight = torch.stack([
        reference.outputs({"x": x[i]}, {"R": latents["R"][i]}, {}) for i in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(model.outputs({"x": x}, latents, {}), straight)


def test_rows_that_cannot_be_divided():
    class Pooled(LinearNetwork):
        def forward(self, x):
            return self.layer(x.mean(0, keepdim=True))

    model = lb.BayesianLoRA(Pooled(), lb.LoRAXS(2, targets=["layer"]))
    with pytest.raises(ValueError, match="treats the rows of a batch apart"):
        model.outputs({"x": torch.randn(3, 7)}, random_latents(model, 3), {})


def test_half_precision_base():
    network = tiny_bert().to(torch.bfloat16)
    model = lb.BayesianLoRA(network)
    batch = token_batches(8)[0]
    logits = model.outputs(batch, random_latents(model, 8), {}).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_gradient_checkpointing_inside_the_block():
    """The layers run again in backward, and must find the same latents."""
    batch = token_batches(8)[0]
    latents = random_latents(lb.BayesianLoRA(tiny_bert()))

    def gradient(checkpointing):
        network = tiny_bert()
        network.config.hidden_dropout_prob = network.config.attention_probs_dropout_prob = 0.0
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            network.gradient_checkpointing_enable()
        model = lb.BayesianLoRA(network, dropout=True)
        leaves = {name: value.clone().requires_grad_() for name, value in latents.items()}
        with model.attached():
            model.outputs(batch, leaves, {}).logits.square().sum().backward()
        return leaves["R"].grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_attachment_without_adapter_only_slots_the_head():
    network = tiny_bert()
    weight = torch.zeros(3, 16)
    with Attachment(network, None) as attachment, torch.no_grad():
        attachment.set({}, {"classifier.weight": weight})
        logits = network(input_ids=token_batches(8)[0]["input_ids"]).logits
    torch.testing.assert_close(logits, network.classifier.bias.expand(8, 3))
    assert network.classifier.weight.abs().sum() > 0
