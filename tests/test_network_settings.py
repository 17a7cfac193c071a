"""How a network is set up: padding, tied and frozen embeddings, grouped queries, dropout, checkpointing, attention."""

import copy
from functools import cache

import pytest
import torch
import transformers as hf
from architectures import (
    ARCHITECTURES,
    DECODERS,
    GROUPED,
    LENGTH,
    ROWS,
    all_linear,
    batch_of,
    build,
    latents_of,
)
from conftest import assert_same_state, state, tiny_reviews, tiny_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyro_lrblora as lb

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*run one at a time"),  # asserted where it matters
    pytest.mark.filterwarnings("ignore:.*scales had not converged"),
]


@pytest.fixture(scope="module")
def trained():
    """The posterior of a short fit per architecture, made when first asked for."""

    @cache
    def fit(name):
        model = lb.BayesianLoRA(build(name), all_linear)
        return lb.fit(model, [batch_of(name)], steps=2, progress=False)

    return fit


@pytest.mark.parametrize("name", DECODERS)
def test_padding_side_does_not_matter(name, trained):
    right, left = batch_of(name), batch_of(name, left=True)
    if name == "gpt2":
        # Absolute positions are counted from the first column unless the batch says otherwise: transformers' own rule.
        left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = [lb.predict(trained(name), [batch], draws=3).logits for batch in (right, left)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_padding_side_of_a_tokenizer(trained):
    data, tokenizer = tiny_reviews(12), tiny_tokenizer()
    predictions = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        predictions.append(lb.predict(trained("llama"), data, draws=2, tokenizer=tokenizer, batch_size=4).logits)
    torch.testing.assert_close(*predictions, atol=1e-5, rtol=1e-4)


def test_no_padding_token():
    network = build("llama")
    network.config.pad_token_id = None
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), tokenizer=tiny_tokenizer(pad=False))
    with pytest.raises(ValueError, match="tokenizer.pad_token = tokenizer.eos_token"):
        lb.fit(model, tiny_reviews(4), progress=False)
    # transformers needs none for one row.
    whole = batch_of("llama")
    single = [
        {
            key: value[row : row + 1, :length] if value.dim() == 2 else value[row : row + 1]
            for key, value in whole.items()
        }
        for row, length in enumerate((8, 6, 5, 3))
    ]
    posterior = lb.fit(model, single, steps=2, progress=False)
    logits = lb.predict(posterior, single, draws=2).logits
    network.config.pad_token_id = 0
    torch.testing.assert_close(logits, lb.predict(posterior, [whole], draws=2).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "output"),
    [
        (hf.GPT2LMHeadModel, ARCHITECTURES["gpt2"].config, "lm_head"),
        (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, tie_word_embeddings=True), "lm_head"),
        (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, tie_word_embeddings=False), "lm_head"),
        (hf.GemmaForCausalLM, hf.GemmaConfig(**GROUPED, head_dim=8), "lm_head"),
        (hf.T5ForConditionalGeneration, ARCHITECTURES["t5"].config, "lm_head"),
        (hf.BertForMaskedLM, ARCHITECTURES["bert"].config, "cls.predictions.decoder"),
    ],
)  # fmt: skip
def test_output_embeddings_are_never_adapted(kind, config, output):
    """Tied to the input embeddings or not: neither they nor the head move."""
    torch.manual_seed(3)
    network = kind(copy.deepcopy(config)).eval()
    before = state(network)
    text = lb.likelihoods.NextToken()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"), likelihood=text)
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert output in dict(network.named_modules())
    assert output not in model.modules
    assert not any("embed" in module or "wte" in module for module in model.modules)
    assert not any(parameter.startswith(output) for parameter in model.head_start)
    with pytest.raises(ValueError, match="expected targets that match"):
        lb.BayesianLoRA(network, lb.LoRAXS(2, targets=[output]), likelihood=text)
    batch = batch_of("llama")
    if kind is hf.T5ForConditionalGeneration:
        batch["decoder_input_ids"] = batch["input_ids"]
    own = latents_of(model, ROWS)
    logits = model.outputs(batch, own, {}).logits
    assert logits.shape == (ROWS, LENGTH, 60)
    row = {key: value[2:3] for key, value in batch.items()}
    single = model.outputs(row, {site: value[2] for site, value in own.items()}, {}).logits
    torch.testing.assert_close(logits[2:3], single, atol=1e-4, rtol=1e-4)
    assert_same_state(before, state(network))


@pytest.mark.parametrize("adapter", [lb.LoRAXS, lb.LoRA])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_grouped_query_attention_bounds_the_rank_module_by_module(name, adapter):
    network = build(name)
    smallest = network.config.num_key_value_heads * getattr(network.config, "head_dim", 4)
    model = lb.BayesianLoRA(network, adapter(min(smallest, 16)))
    keys = next(module for path, module in model.modules.items() if path.endswith("k_proj"))
    assert keys.weight.shape == (smallest, 16)
    with pytest.raises(ValueError, match=rf"rank <= {min(smallest, 16)} for module '.*_proj' with weight"):
        lb.BayesianLoRA(network, adapter(min(smallest, 16) + 1))


@pytest.mark.parametrize("frozen", ["nothing", "embeddings", "everything"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_frozen_and_trainable_embeddings_stay_as_they_are(name, frozen, trained):
    network = build(name)
    network.requires_grad_(frozen != "everything")
    network.get_input_embeddings().requires_grad_(frozen == "nothing")
    before = state(network)
    posterior = lb.fit(lb.BayesianLoRA(network, all_linear), [batch_of(name)], steps=2, progress=False)
    assert_same_state(before, state(network))
    assert all(parameter.grad is None for parameter in network.parameters())
    # Whether a base weight could be trained changes nothing of the fit.
    for one, other in zip(posterior.guide.parameters(), trained(name).guide.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "vit"])
def test_dropout_is_noise_in_training_and_absent_in_prediction(name):
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
    data = [batch_of(name)]
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), dropout=True).prepare(data, probe=False)
    for values in (model.start(), latents_of(model, ROWS)):
        first, second = (model.outputs(data[0], values, {}).logits for _ in range(2))
        assert not torch.equal(first, second)
    posterior = lb.fit(model, data, steps=2, progress=False)
    first, second = (lb.predict(posterior, data, draws=2).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not any(module.training for module in network.modules())
    steady = lb.fit(lb.BayesianLoRA(network, lb.LoRAXS(2)), data, steps=2, progress=False)
    assert posterior.history[-1]["log_likelihood"] != steady.history[-1]["log_likelihood"]


@pytest.mark.parametrize(
    ("name", "draws"),
    [*((name, "row") for name in ("bert", "deberta-v3", "gpt2", "llama", "t5", "bart", "vit")),
     ("deberta-v3", "shared"), ("llama", "shared")],
)  # fmt: skip
def test_gradient_checkpointing_changes_nothing_but_memory(name, draws):
    """transformers' switch works without dropout too: layers run again in backward, and find the same latents."""

    def fit(checkpointing):
        network = build(name)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.4  # to see that it stays off
        if checkpointing:
            network.gradient_checkpointing_enable()
        before, runs = state(network), []
        handle = next(
            module for path, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)
            and "head" not in path and ".1." in path
        ).register_forward_hook(lambda module, args, output: runs.append(torch.is_grad_enabled()))  # fmt: skip
        model = lb.BayesianLoRA(network, lb.LoRAXS(2))
        posterior = lb.fit(model, [batch_of(name)], steps=2, draws=draws, progress=False)
        handle.remove()
        after = state(network)
        # All but the counting hook.
        assert after.pop("hooks") == before.pop("hooks")
        assert_same_state(before, after)
        return [parameter.detach() for parameter in posterior.guide.parameters()], sum(runs)

    (saved, more), (kept, fewer) = fit(True), fit(False)
    for one, two in zip(saved, kept, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    # Rows that are run one at a time keep their activations.
    assert more > fewer or (name == "deberta-v3" and draws == "row")


def test_reentrant_checkpointing_is_refused():
    network = build("llama")
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    before = state(network)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        lb.fit(model, [batch_of("llama")], steps=1, warm_start=False, progress=False)
    assert_same_state(before, state(network))


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama", "gemma", "phi3", "bart", "vit"])
def test_sdpa_and_eager_attention_agree(name):
    batch, found = batch_of(name), []
    for implementation in ("sdpa", "eager"):
        network = build(name, attn_implementation=implementation)
        assert network.config._attn_implementation == implementation
        model = lb.BayesianLoRA(network, all_linear)
        torch.manual_seed(5)
        own = {site: value.requires_grad_() for site, value in latents_of(model, ROWS).items()}
        logits = model.outputs(batch, own, {}).logits
        found.append((logits, *torch.autograd.grad(logits.square().sum(), list(own.values()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
