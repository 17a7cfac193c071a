"""Every kind of transformer a user brings: targets, exactness against edited weights, and a fit from start to disk."""

import copy
import warnings
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as hf
from conftest import LinearNetwork, assert_same_state, random_latents, state, tiny_reviews, tiny_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyro_lrblora as lb
from pyro_lrblora.adapters.rows import mixing_modules

ROWS, LENGTH, END = 4, 8, 1

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": END}
DEBERTA = SIZES | {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8, "num_labels": 3, "initializer_range": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A tiny config, how many modules each target means, and names of those that see more than the batch's rows."""

    config: hf.PretrainedConfig
    attention: int
    mlp: int
    all_linear: int
    mixing: tuple[str, ...] = ()


ARCHITECTURES = {
    # Per layer q, k, v, o and two in the MLP; the pooler is linear too.
    "bert": Architecture(hf.BertConfig(**SIZES), 8, 4, 13),
    "roberta": Architecture(hf.RobertaConfig(**SIZES), 8, 4, 12),
    # One set of layer weights, run twice, behind a projection of the embeddings and before a pooler.
    "albert": Architecture(hf.AlbertConfig(**SIZES, embedding_size=8), 4, 2, 8),
    # DeBERTa's positions have projections of their own, or (v3) share the rows'.
    "deberta-v2": Architecture(
        hf.DebertaV2Config(**DEBERTA), 12, 4, 16, ("pos_key_proj", "pos_query_proj")
    ),
    "deberta-v3": Architecture(
        hf.DebertaV2Config(**DEBERTA, share_att_key=True), 8, 4, 12, ("key_proj", "query_proj")
    ),
    "modernbert": Architecture(
        hf.ModernBertConfig(**SIZES, bos_token_id=2, eos_token_id=END, cls_token_id=2, sep_token_id=END), 4, 4, 8
    ),
    # Time stands in the first axis; attention is made of parameters, not modules.
    "xlnet": Architecture(
        hf.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=4, d_inner=24, num_labels=3,
                       initializer_range=0.3, pad_token_id=0, dropout=0.0), 0, 4, 4, ("layer_1", "layer_2"),
    ),
    "gpt2": Architecture(
        hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0,
                      bos_token_id=2, eos_token_id=END, initializer_range=0.3), 4, 4, 8,
    ),
    "llama": Architecture(hf.LlamaConfig(**GROUPED), 8, 6, 14),
    "qwen2": Architecture(hf.Qwen2Config(**GROUPED), 8, 6, 14),
    "qwen3": Architecture(hf.Qwen3Config(**GROUPED, head_dim=8), 8, 6, 14),
    "mistral": Architecture(hf.MistralConfig(**GROUPED), 8, 6, 14),
    "gemma": Architecture(hf.GemmaConfig(**GROUPED, head_dim=8), 8, 6, 14),
    "gemma2": Architecture(hf.Gemma2Config(**GROUPED, head_dim=8), 8, 6, 14),
    # q, k, v in one module, gate and up in another.
    "phi3": Architecture(hf.Phi3Config(**GROUPED), 4, 4, 8),
    # The experts are one stacked parameter, and their router is not a linear module.
    "mixtral": Architecture(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), 8, 0, 8),
    # Self-attention twice, cross-attention once.
    "t5": Architecture(
        hf.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, num_labels=3,
                    pad_token_id=0, eos_token_id=END, decoder_start_token_id=0), 24, 8, 32,
    ),
    "bart": Architecture(
        hf.BartConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
                      num_labels=3, pad_token_id=0, bos_token_id=2, eos_token_id=END, decoder_start_token_id=END,
                      init_std=0.3), 24, 8, 32,
    ),
    "vit": Architecture(hf.ViTConfig(**IMAGE), 8, 4, 12),
}  # fmt: skip
NAMES = list(ARCHITECTURES)
DECODERS = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3"]

all_linear = lb.LoRAXS(2, targets="all-linear")


def build(name, **options):
    """A fresh network of an architecture, the same at every call."""
    torch.manual_seed(3)
    # A copy: building a network writes into its config.
    config = copy.deepcopy(ARCHITECTURES[name].config)
    kind = hf.AutoModelForImageClassification if name == "vit" else hf.AutoModelForSequenceClassification
    return kind.from_config(config, **options).eval()


def batch_of(name, seed=0, left=False):
    """Four images, or four texts of 8, 6, 5 and 3 tokens, padded on the right or the left."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 0])
    if name == "vit":
        return {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator), "labels": labels}
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((8, 6, 5, 3)):
        tokens = torch.randint(3, 60, (length,), generator=generator)
        tokens[-1] = END
        places = slice(LENGTH - length, None) if left else slice(length)
        ids[row, places], mask[row, places] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(network, batch):
    """The logits of a network that carries nothing."""
    with torch.no_grad():
        return network(**{name: value for name, value in batch.items() if name != "labels"}).logits


def latents_of(model, *rows, scale=0.3):
    return {name: scale * value for name, value in random_latents(model, *rows).items()}


@pytest.fixture(autouse=True)
def _mixing_is_expected():
    """That rows are run one at a time is asserted where it matters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run one at a time")
        warnings.filterwarnings("ignore", message=".*scales had not converged")
        yield


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
    """The subspace's summed gradient, against autograd on the weights themselves, modules called twice among them."""
    network, batch = build(name), batch_of(name)
    seen = {}

    class Spy(lb.projections.Gradient):
        def __call__(self, weight, rank, statistics, generator):
            seen[len(seen)] = statistics["gradient"]
            return super().__call__(weight, rank, statistics, generator)

    model = lb.BayesianLoRA(network, lb.LoRAXS(2, Spy(), targets="all-linear")).prepare([batch], probe=False)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    network.requires_grad_(True)
    nll = nn.functional.cross_entropy(network(**inputs).logits, batch["labels"], reduction="sum")
    weights = [module.weight for module in model.modules.values()]
    expected = torch.autograd.grad(-nll, weights, allow_unused=True)
    for position, (module, gradient) in enumerate(zip(model.modules.values(), expected, strict=True)):
        gradient = torch.zeros_like(module.weight) if gradient is None else gradient
        gradient = gradient.T if isinstance(module, Conv1D) else gradient
        torch.testing.assert_close(seen[position], gradient, atol=1e-4 * float(gradient.norm()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v3", "xlnet", "vit"])
def test_label_free_statistics_are_sums_over_rows(name):
    """sum over rows and classes of p(c) G G', G being one row's gradient of log p(c) by the weight."""
    network, batch = build(name), batch_of(name)
    seen = {}

    class Spy(lb.projections.Gradient):
        def __call__(self, weight, rank, statistics, generator):
            seen[len(seen)] = statistics["left"]
            return super().__call__(weight, rank, statistics, generator)

    model = lb.BayesianLoRA(network, lb.LoRAXS(2, Spy(label_free=True), targets="mlp")).prepare([batch], probe=False)
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
    for position, total in enumerate(expected):
        torch.testing.assert_close(seen[position], total, atol=1e-4 * float(total.norm()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_fit_predict_save_load_detach(name, tmp_path):
    network = build(name).train()
    network.requires_grad_(True)
    before = state(network)
    data = [batch_of(name, seed) for seed in range(2)]
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"))
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


@pytest.fixture(scope="module")
def trained():
    """The posterior of a short fit per architecture, made when first asked for."""

    @cache
    def fit(name):
        model = lb.BayesianLoRA(build(name), lb.LoRAXS(2, targets="all-linear"))
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
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"))
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings
    assert output in dict(network.named_modules())
    assert output not in model.modules
    assert not any("embed" in module or "wte" in module for module in model.modules)
    assert not any(parameter.startswith(output) for parameter in model.head_start)
    with pytest.raises(ValueError, match="expected targets that match"):
        lb.BayesianLoRA(network, lb.LoRAXS(2, targets=[output]))
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
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_frozen_and_trainable_embeddings_stay_as_they_are(name, frozen):
    network = build(name)
    network.requires_grad_(frozen != "everything")
    network.get_input_embeddings().requires_grad_(frozen == "nothing")
    before, data = state(network), [batch_of(name)]
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Gradient()))
    posterior = lb.fit(model, data, steps=2, progress=False)
    assert_same_state(before, state(network))
    assert all(parameter.grad is None for parameter in network.parameters())
    # Whether a base weight could be trained changes nothing of the fit.
    other = lb.fit(lb.BayesianLoRA(build(name), model.adapter), data, steps=2, progress=False)
    for one, two in zip(posterior.guide.parameters(), other.guide.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "t5", "vit"])
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


@pytest.mark.parametrize("draws", ["row", "shared"])
@pytest.mark.parametrize("name", ["bert", "deberta-v3", "gpt2", "llama", "phi3", "t5", "bart", "vit"])
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
