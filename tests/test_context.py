"""Rows longer than a network's context are one clear error, before any work, whatever the network calls its context."""

import datasets
import pytest
import torch
import transformers as hf
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer
from test_generation import tiny_gpt2, wide_posterior
from test_tasks import tiny_items, tiny_llama, tiny_t5, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora.context import context_length
from pyro_lrblora.networks import AnswerScorer, MeanPoolClassifier

SIZES = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 1,
}  # fmt: skip


def roberta():
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, max_position_embeddings=34))


def modernbert():
    config = hf.ModernBertConfig(**SIZES, max_position_embeddings=32, cls_token_id=0, sep_token_id=0, bos_token_id=0)
    return hf.ModernBertForSequenceClassification(config)


def bart():
    config = hf.BartConfig(
        vocab_size=12, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def gemma():
    """Its language model's config is one of several."""
    text = SIZES | {"max_position_embeddings": 32, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        return hf.Gemma3ForConditionalGeneration(config)


def deberta(biased: bool):
    config = hf.DebertaV2Config(
        **SIZES, max_position_embeddings=32, relative_attention=True, position_biased_input=biased
    )
    return hf.DebertaV2ForSequenceClassification(config)


def stretched():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, max_position_embeddings=32, rope_scaling=rope))


@pytest.mark.parametrize(
    ("build", "context"),
    [
        (tiny_bert, 32),
        (lambda: MeanPoolClassifier(tiny_bert().bert, 2), 32),
        (tiny_llama, 32),
        (lambda: AnswerScorer(tiny_llama()), 32),
        (tiny_gpt2, 32),
        (roberta, 32),  # of 34 places, two come before the first token
        (modernbert, 32),
        (bart, 32),
        (gemma, 32),
        (stretched, 128),
        (lambda: deberta(True), 32),
        (lambda: deberta(False), None),  # relative positions alone
        (tiny_t5, None),
        (lambda: torch.nn.Linear(3, 3), None),
    ],
    ids=["bert", "mean pooling", "llama", "answers", "gpt2", "roberta", "modernbert", "bart", "gemma", "stretched",
         "deberta", "deberta-v3", "t5", "no transformer"],
)  # fmt: skip
def test_the_context_of_a_network(build, context):
    assert context_length(build()) == context


def test_robertas_last_place_is_its_contexts():
    network = roberta().eval()
    network(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, 33), 5))


LONG = datasets.Dataset.from_dict({"text": ["good film " * 20, "bad plot"], "label": [0, 1]})
TOO_LONG = r"at most 32 tokens, the context of this \w+, got 40 in the {}; write max_length=32"


@pytest.mark.parametrize("network", [tiny_llama, tiny_gpt2])
def test_texts_longer_than_the_context_are_refused(network):
    model = lb.BayesianLoRA(network(), lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    fits = lb.data.Texts(LONG, tiny_tokenizer(), max_length=32)
    long = lb.data.Texts(LONG, tiny_tokenizer(), max_length=200)
    for data in (long, list(long)):
        for call in (model.prepare, lambda data: lb.fit(model, data, progress=False)):
            with pytest.raises(ValueError, match=TOO_LONG.format("training data")):
                call(data)
        with pytest.raises(ValueError, match=TOO_LONG.format("validation data")):
            lb.fit(model, fits, validation=data, progress=False)
    posterior = lb.fit(model, fits, steps=1, guide=lb.guides.Delta(), progress=False)
    with pytest.raises(ValueError, match=TOO_LONG.format("data")):
        lb.predict(posterior, long, draws=1)


def test_classes_choices_and_both_ends_of_a_decoder():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 100
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=TOO_LONG.format("training data")):
        lb.fit(model, LONG, progress=False)
    posterior = lb.fit(model, tiny_reviews(), steps=1, guide=lb.guides.Delta(), progress=False)
    with pytest.raises(ValueError, match=TOO_LONG.format("data")):
        lb.predict(posterior, LONG.remove_columns("label"))  # data without labels too

    items = tiny_items(6).map(lambda row: {"question": "good " * 38})
    choices = lb.data.Choices(items, tokenizer, pair=False, max_length=100)
    scorer = lb.BayesianLoRA(AnswerScorer(tiny_llama()), lb.LoRAXS(2), likelihood=lb.likelihoods.MultipleChoice())
    with pytest.raises(ValueError, match="at most 32 tokens"):
        scorer.prepare(choices)

    network = bart()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    for text, prompt in (("text", "label"), ("label", "text")):
        columns = LONG.map(lambda row: {"label": "good"}, remove_columns=["label"])
        long = lb.data.Texts(columns, tokenizer, text=text, prompt=prompt, decoder=network, max_length=100)
        with pytest.raises(ValueError, match=TOO_LONG.format("training data")):
            model.prepare(long)


def test_nothing_is_written_beyond_the_context():
    posterior = wide_posterior(tiny_llama())
    prompt = torch.full((1, 20), 5)
    assert lb.generate(posterior, prompt, draws=2, max_new_tokens=12).sequences.shape[1] == 32
    with pytest.raises(ValueError, match=r"got 20 \+ max_new_tokens=13; write shorter prompts or max_new_tokens=12"):
        lb.generate(posterior, prompt, draws=2, max_new_tokens=13)
    with pytest.raises(ValueError, match=r"at most 32 tokens.*got 40 in the prompts"):
        lb.generate(posterior, torch.full((1, 40), 5))
    relative = wide_posterior(tiny_t5(), "all-linear")
    assert lb.generate(relative, torch.full((1, 40), 5), draws=2, max_new_tokens=40).entropy.shape == (1, 40)


def test_relative_positions_have_no_end():
    network = tiny_t5()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    texts = tiny_texts(4).map(lambda row: {"prompt": "good " * 40})
    batches = lb.data.Texts(texts, tiny_tokenizer(), prompt="prompt", decoder=network, max_length=60)
    lb.fit(model, batches, steps=1, guide=lb.guides.Delta(), progress=False)
