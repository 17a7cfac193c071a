"""Generation with the posterior predictive against a loop without cache, draw by draw."""

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from test_tasks import tiny_llama, tiny_t5, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora import generation


def tiny_gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def wide_posterior(network, targets="attention", scale=1.0):
    """Random latents, wide enough for draws to disagree."""
    model = lb.BayesianLoRA(
        network, lb.LoRAXS(4, targets=targets), lb.priors.Normal(scale), lb.likelihoods.NextToken(),
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    decoder = {"prompt": "prompt", "decoder": network} if network.config.is_encoder_decoder else {}
    data = lb.data.Texts(tiny_texts(), tiny_tokenizer(), **decoder)
    guide = lb.guides.Diagonal(start_scale=1.0)
    return lb.fit(model, data, guide=guide, steps=1, rates=lb.Rates(0, 0, 0, 0), warm_start=False, progress=False)


def by_hand(posterior, prompt, draws, tokens, seed=0, decoder_start=None):
    """Greedy continuation from full forwards of each draw in turn: tokens, entropies, mean entropies, log probs."""
    model, values = posterior.model, posterior.sample(draws, seed=seed, antithetic=True)
    written, rows = [], []
    for _ in range(tokens):
        each = []
        for s in range(draws):
            latents = {name: value[s] for name, value in values.items()}
            batch = {"input_ids": prompt}
            if decoder_start is None:
                batch["input_ids"] = torch.cat([prompt, torch.tensor([written], dtype=torch.long)], 1)
            else:
                batch["decoder_input_ids"] = torch.tensor([[decoder_start, *written]])
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            with torch.no_grad():
                each.append(model.outputs(batch, latents, {}).logits[0, -1].softmax(-1))
        each = torch.stack(each)
        mean = each.mean(0)
        entropy = lambda p: -(p * p.log()).sum(-1)
        written.append(int(mean.argmax()))
        rows.append([entropy(mean).item(), entropy(each).mean().item(), mean.max().log().item()])
    return written, torch.tensor(rows).T


@pytest.mark.parametrize("network", [tiny_llama, tiny_gpt2, tiny_t5], ids=["llama", "gpt2", "t5"])
def test_greedy_text_is_that_of_the_averaged_distribution(network):
    network = network()
    posterior = wide_posterior(network, "all-linear" if network.config.is_encoder_decoder else "attention")
    start = network.config.decoder_start_token_id if network.config.is_encoder_decoder else None
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prompts = ["good film the", "very dull plot was bad film"]  # of unequal length: the shorter one is padded
    found = lb.generate(posterior, prompts, draws=3, max_new_tokens=5)
    for row, prompt in enumerate(prompts):
        ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        tokens, (entropy, data, log_probs) = by_hand(posterior, ids, 3, 5, decoder_start=start)
        assert found.sequences[row, -5:].tolist() == tokens
        torch.testing.assert_close(found.entropy[row], entropy, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.data_entropy[row], data, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.log_probs[row], log_probs, atol=1e-4, rtol=1e-4)
    assert (found.mutual_information > 0.01).any()  # the draws do disagree
    assert found.sequence_entropy.shape == found.sequence_mutual_information.shape == (2,)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_mean_alone_is_transformers_own_generation():
    posterior = wide_posterior(tiny_llama())
    prompt = torch.tensor([[2, 5, 7]])
    mean, model = posterior.mean(), posterior.model
    found = lb.generate(posterior, prompt, at="mean", max_new_tokens=6)
    with model.carrying(mean, {}):
        expected = model.network.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    assert torch.equal(found.sequences, expected)
    assert float(found.mutual_information.max()) < 1e-5


def test_sampled_tokens_have_the_averaged_distribution():
    """One token, 4,000 prompts in batches: frequencies against the mean of the draws' probabilities."""
    posterior = wide_posterior(tiny_llama())
    prompt = torch.tensor([[2, 5, 7]])
    found = lb.generate(posterior, prompt.expand(2000, -1), draws=2, max_new_tokens=1, do_sample=True)
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    values = posterior.sample(2, seed=0, antithetic=True)
    with torch.no_grad():
        each = [posterior.model.outputs(batch, {"R": values["R"][s]}, {}).logits[0, -1].softmax(-1) for s in range(2)]
    expected = (each[0] + each[1]) / 2
    share = torch.bincount(found.sequences[:, -1], minlength=12) / 2000
    assert (share - expected).abs().max() < 4 * (expected * (1 - expected) / 2000).sqrt().max()
    sharp = lb.generate(posterior, prompt.expand(200, -1), draws=2, max_new_tokens=1, do_sample=True, top_k=1)
    assert set(sharp.sequences[:, -1].tolist()) == {int(expected.argmax())}
    again = [lb.generate(posterior, prompt, max_new_tokens=8, do_sample=True, seed=3).sequences for _ in range(2)]
    assert torch.equal(*again)


def test_what_follows_the_end_of_a_text_does_not_count():
    posterior = wide_posterior(tiny_llama())
    free = lb.generate(posterior, "good film", draws=2, max_new_tokens=6)
    end = int(free.sequences[0, 4])  # its third new token
    first = free.sequences[0, 2:].tolist().index(end)
    found = lb.generate(posterior, ["good film", "bad plot"], draws=2, max_new_tokens=6, eos_token_id=end)
    assert found.written[0].tolist() == [place <= first for place in range(found.written.shape[1])]
    assert float(found.entropy[0, first + 1 :].abs().sum()) == 0
    assert found.sequence_entropy[0].item() == pytest.approx(found.entropy[0].sum().item() / (first + 1), rel=1e-5)


def test_nothing_is_written_after_the_end_where_there_is_no_padding_token():
    posterior, tokenizer = wide_posterior(tiny_llama()), tiny_tokenizer(pad=False)
    posterior.model.network.generation_config.pad_token_id = None
    free = lb.generate(posterior, "good film", draws=2, max_new_tokens=6, tokenizer=tokenizer)
    end = int(free.sequences[0, 4])
    found = lb.generate(
        posterior, ["good film", "bad plot"], draws=2, max_new_tokens=6, eos_token_id=end, tokenizer=tokenizer
    )
    for text, row, written in zip(found.texts, found.sequences[:, 2:], found.written, strict=True):
        assert text == tokenizer.decode(row[written], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws to be an integer >= 1"),
        ({"at": "mode"}, "at='mean'"),
        ({"num_beams": 4}, "no beams"),
        ({"temperature": 0.5}, "do_sample=True"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": torch.ones(3)}, "token ids"),
        ({"prompts": [5, 6]}, r"in a list of its own, got \[5, 6\]"),
        ({"prompts": {"input_ids": [[5, 6], []]}}, "an empty one at 1"),
        ({"return_dict_in_generate": True}, "other options of generate"),
        ({"logits_processor": []}, "other options of generate"),
        ({"max_length": 10}, "max_new_tokens="),
        ({"generation_config": {"max_new_tokens": 3}}, "write each option by itself"),
        ({"stop_strings": ["."]}, "write eos_token_id="),
        ({"do_sample": True, "min_p": 0.9}, r"temperature, top_k or top_p.*got \['min_p'\]"),
        ({"stopping_criteria": ["any"]}, "got stopping_criteria=.*write eos_token_id="),
    ],
    ids=str,
)
def test_bad_requests_are_refused(options, message):
    posterior = wide_posterior(tiny_llama())
    with pytest.raises(ValueError, match=message):
        lb.generate(posterior, **({"prompts": "good"} | options))


def test_strings_that_a_network_itself_stops_at_are_refused_too():
    posterior = wide_posterior(tiny_llama())
    posterior.model.network.generation_config.stop_strings = ["."]
    with pytest.raises(ValueError, match="write eos_token_id="):
        lb.generate(posterior, "good")


def test_the_tokens_allowed_are_those_of_the_prompt():
    """The function is asked by the prompt's number, whatever the draws."""
    posterior = wide_posterior(tiny_llama())
    allowed = lambda prompt, ids: [(5, 6)[prompt]]
    options = {"draws": 3, "max_new_tokens": 2, "prefix_allowed_tokens_fn": allowed}
    found = lb.generate(posterior, torch.tensor([[5, 6], [6, 5]]), **options).sequences
    assert found[:, 2:].tolist() == [[5, 5], [6, 6]]


def test_token_ids_are_prompts_in_lists_of_any_length_and_alone():
    posterior, tokenizer = wide_posterior(tiny_llama()), tiny_tokenizer()
    written = lambda prompts: lb.generate(posterior, prompts, draws=2, max_new_tokens=2, tokenizer=tokenizer).sequences
    ids = [[5, 6, 7], [6]]
    masked = {"input_ids": torch.tensor([[5, 6, 7], [0, 0, 6]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]])}
    assert torch.equal(written(ids), written(masked))
    assert torch.equal(written({"input_ids": ids[0], "attention_mask": [1, 1, 1]}), written(ids[:1]))
    assert torch.equal(written(np.array(ids[:1])), written(ids[:1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returned_is_a_prompt(side):
    posterior = wide_posterior(tiny_llama())
    texts = ["good", "a dull film"]
    tokenizer = posterior.model.tokenizer
    tokenizer.padding_side = side
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    options = {"draws": 2, "max_new_tokens": 4, "num_beams": 1}
    assert lb.generate(posterior, encoded, **options).texts == lb.generate(posterior, texts, **options).texts


def test_a_network_that_cannot_generate_is_refused(bert):
    model = lb.BayesianLoRA(bert, size=10)
    posterior = lb.Posterior(model, lb.guides.Diagonal()(model), lb.guides.Diagonal())
    with pytest.raises(ValueError, match="can generate"):
        lb.generate(posterior, torch.ones(1, 2).long())


def test_every_prompt_keeps_its_last_word_whatever_the_first_ends_in():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    plain = lambda text: tokenizer(text)["input_ids"]

    def ended(text):
        return {"input_ids": plain(text) + ([end] if text == "good film" else [])}

    ended.eos_token_id = end
    found = generation._token_rows(["good film", "bad plot"], ended, ended=False)
    assert found == [plain("good film"), plain("bad plot")]


def test_log_probabilities_are_of_the_averaged_distribution_whatever_it_is_sampled_by():
    """One token, by independent draws: what temperature and top-k pick by is not what the token was worth."""
    posterior, prompt = wide_posterior(tiny_llama()), torch.tensor([[2, 5, 7]])
    options = {"draws": 3, "max_new_tokens": 1, "do_sample": True, "antithetic": False}
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    tokens = []
    for seed in range(6):
        found = lb.generate(posterior, prompt, seed=seed, temperature=3.0, top_k=6, **options)
        values = posterior.sample(3, seed=seed, antithetic=False)
        with torch.no_grad():
            each = [posterior.model.outputs(batch, {"R": value}, {}).logits[0, -1] for value in values["R"]]
        mean = torch.stack(each).softmax(-1).mean(0)
        tokens.append(int(found.sequences[0, -1]))
        torch.testing.assert_close(found.log_probs[0, 0], mean[tokens[-1]].log(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.entropy[0, 0], -(mean * mean.log()).sum(), atol=1e-4, rtol=1e-4)
    assert len(set(tokens)) > 1
    many = prompt.expand(50, -1)  # the same latents, so that the sampling alone differs
    at_mean = [
        lb.generate(posterior, many, at="mean", max_new_tokens=1, do_sample=True, seed=s).sequences for s in (0, 1)
    ]
    assert not torch.equal(*at_mean)
