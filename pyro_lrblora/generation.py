"""Text from the posterior predictive: at every step the next-token distribution is the mean over S draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .context import check_context, context_length
from .counts import check_counts
from .data.texts import without_end
from .posterior import Posterior, local_parameters

_DRAWS = 8
_OURS = {"return_dict_in_generate", "logits_processor", "max_length", "generation_config"}
_WARPERS = {"min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}


@local_parameters
@torch.no_grad()
def generate(
    posterior: Posterior,
    prompts: str | Sequence[str] | Sequence[Sequence[int]] | Mapping | Tensor,
    *,
    draws: int | None = None,
    at: str | None = None,
    max_new_tokens: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    antithetic: bool = True,
    precision: str = "fp32",
    tokenizer=None,
    **options,
) -> Generation:
    """Continue prompts by transformers' own `generate`, each token from the mean of S draws' distributions.

    The draws of a prompt are rows of one batch with a key-value cache each: S functions, the same for every prompt and
    every step. The averaged distribution weighs them equally at every step, whatever the text so far says for each.

    Args:
        posterior: of a causal or sequence-to-sequence language model.
        prompts: texts; or token ids without padding, (B, T) or a list for each; or what a tokenizer made of texts,
            padded on either side.
        draws: S, at least 1; None is 8, of an ensemble and of points as in predict.
        at: "mean" takes the posterior mean instead.
        max_new_tokens: tokens added at most.
        do_sample: draw each token from the averaged distribution; False takes its most probable one.
        temperature, top_k, top_p: of sampling, applied to the averaged distribution.
        seed: of the draws and of the sampling.
        antithetic: as in predict.
        precision: "fp32", "bf16" or "fp16".
        tokenizer: for texts, where the model has none.
        options: of transformers' generate, such as repetition_penalty; beams, other ways to cut a distribution,
            stop_strings, stopping_criteria and generation_config are not among them.

    Raises:
        ValueError: draws < 1, no prompts, texts without a tokenizer that pads, beams, another end than a token, a
            network that cannot generate or whose context is too short.
    """
    model = posterior.model
    tokenizer = tokenizer or model.tokenizer
    network = getattr(model.network, "language_model", model.network)
    draws = posterior.balanced_draws(_DRAWS) if draws is None else draws
    check_counts(draws=draws)
    if at not in (None, "mean"):
        raise ValueError(f"expected at='mean' or at=None, got at={at!r}")
    if not (hasattr(network, "can_generate") and network.can_generate()):
        raise ValueError(f"expected a language model of transformers that can generate, got {type(network).__name__}")
    if options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1:
        raise ValueError(
            "expected one sequence per prompt and no beams; write do_sample=True and another seed for more"
        )
    options.pop("num_beams", None)  # 1, which is said below
    ours = sorted(_OURS & set(options))
    if ours:
        raise ValueError(
            f"expected other options of generate, got {ours}; write each option by itself, max_new_tokens= for a length"
        )
    if not_here := sorted(_WARPERS & set(options)):
        raise ValueError(
            f"expected temperature, top_k or top_p, which act on the averaged distribution, got {not_here}, which "
            "transformers' generate would not apply to it"
        )
    # A row that ended in another way is filled up until the last one ends, and no token tells where that begins.
    strings = options.get("stop_strings", network.generation_config.stop_strings)
    for name, value in {"stop_strings": strings, "stopping_criteria": options.get("stopping_criteria")}.items():
        if value is not None:
            raise ValueError(
                f"expected texts to end with a token, got {name}={value!r}; write eos_token_id= with the numbers of "
                "those that end one"
            )
    inputs = _encoded(prompts, tokenizer, network.config.is_encoder_decoder)
    values = posterior.mean() if at else posterior.sample(draws, seed=seed, antithetic=antithetic)
    if values.keys() & model.head_start.keys():
        raise ValueError("expected a language model without a Bayesian head")
    values = {name: values[name].unsqueeze(0) if at else values[name] for name in model.sites.shapes}
    count = 1 if at else draws
    rows = len(inputs["input_ids"])
    inputs = {name: value.repeat_interleave(count, 0).to(model.device) for name, value in inputs.items()}
    latents = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in values.items()}
    step = _AveragedStep(count, _warpers(do_sample, temperature, top_k, top_p), do_sample, seed)
    _check_room(network, inputs["input_ids"].shape[1], max_new_tokens)
    if allowed := options.pop("prefix_allowed_tokens_fn", None):
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row // count, ids)
    pad = options.pop("pad_token_id", None)
    if pad is None:
        pad = getattr(tokenizer, "pad_token_id", None)
    with model.carrying(latents, posterior.head(), precision):
        sequences = network.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad,
            logits_processor=[step], return_dict_in_generate=False, **options,
        )  # fmt: skip
    sequences = sequences[::count].cpu()
    new = sequences[:, -len(step.entropy) :]
    ends = options.get("eos_token_id", network.generation_config.eos_token_id)
    written = _before_the_end(new, ends)
    texts = None
    if tokenizer is not None:
        own = zip(new, written, strict=True)
        texts = [tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in own]
    of = lambda values: torch.stack(values, dim=1).cpu() * written
    return Generation(sequences, texts, written, of(step.log_probs), of(step.entropy), of(step.data_entropy))


@dataclass(frozen=True)
class Generation:
    """Continuations of B prompts with the uncertainty at every new token, on the host.

    Args:
        sequences: (B, T), prompts and continuations; of a sequence-to-sequence network the decoder's tokens.
        texts: the continuations alone, where there is a tokenizer.
        written: (B, M) whether each of the M new places holds a token, its end-of-text token included.
        log_probs: (B, M) of the tokens written, under the averaged distribution, nats.
        entropy: (B, M) of the averaged distribution, nats: all that is uncertain.
        data_entropy: (B, M) mean entropy of the draws' own distributions, nats: what stays if the weights are known.
    """

    sequences: Tensor  # (B, T)
    texts: list[str] | None
    written: Tensor  # (B, M)
    log_probs: Tensor  # (B, M)
    entropy: Tensor  # (B, M)
    data_entropy: Tensor  # (B, M)

    @property
    def mutual_information(self) -> Tensor:
        """The part of the entropy that is the model's, nats, (B, M)."""
        return (self.entropy - self.data_entropy).clamp(min=0)

    @property
    def sequence_entropy(self) -> Tensor:
        """Entropy of each continuation per token, nats, (B,), its steps' mean (Malinin & Gales 2021, arXiv 2002.07650).

        By the chain rule the sum over steps estimates the entropy of the whole text, from one path.
        """
        return self.entropy.sum(-1) / self.written.sum(-1)

    @property
    def sequence_mutual_information(self) -> Tensor:
        """The epistemic part of it, nats per token, (B,)."""
        return self.mutual_information.sum(-1) / self.written.sum(-1)


class _AveragedStep:
    """Makes the S rows of a prompt agree on one token of their averaged distribution, and notes the entropies."""

    def __init__(self, draws: int, warpers, sample: bool, seed: int):
        self.draws, self.warpers, self.sample = draws, warpers, sample
        # A stream of its own: the posterior was drawn with the seed itself.
        (own,) = np.random.SeedSequence(seed % 2**64).generate_state(1).tolist()
        self.generator = torch.Generator().manual_seed(own)
        self.log_probs: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.data_entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        each = scores.float().log_softmax(-1).unflatten(0, (-1, self.draws))  # (B, S, V)
        mixture = each.logsumexp(1) - math.log(self.draws)
        self.entropy.append(_entropy(mixture))
        self.data_entropy.append(_entropy(each).mean(1))
        warped = self.warpers(input_ids[:: self.draws], mixture)
        if self.sample:
            # On the host, so that a seed means the same on every device.
            token = torch.multinomial(warped.softmax(-1).cpu(), 1, generator=self.generator).to(scores.device)
        else:
            token = warped.argmax(-1, keepdim=True)
        self.log_probs.append(mixture.gather(-1, token).squeeze(-1))
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter(-1, token.repeat_interleave(self.draws, 0), 0.0)


def _entropy(log_probs: Tensor) -> Tensor:
    """Nats; a token that is ruled out (-inf) counts nothing."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _warpers(sample: bool, temperature: float, top_k: int, top_p: float):
    if not sample and (temperature != 1.0 or top_k or top_p != 1.0):
        raise ValueError("expected do_sample=True with temperature, top_k or top_p: the most probable token needs none")
    # Here, since it imports accelerate where that is installed.
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p != 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _encoded(prompts, tokenizer, ended: bool) -> dict[str, Tensor]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point() or prompts.numel() == 0:
            raise ValueError(f"expected token ids (B, T), got {prompts.dtype} {tuple(prompts.shape)}")
        return {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    rows = _token_rows(prompts, tokenizer, ended)
    if not rows:
        raise ValueError("expected at least one prompt, got none")
    if not all(rows):
        raise ValueError(f"expected prompts with at least one token, got an empty one at {rows.index([])}")
    pad = getattr(tokenizer, "pad_token_id", None)
    if len({len(ids) for ids in rows}) > 1 and pad is None:
        raise ValueError("expected a tokenizer with a padding token for prompts of unequal length")
    # On the left, where it is no part of what follows.
    width = max(len(ids) for ids in rows)
    fill = pad or 0
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _is_rows(ids) -> bool:
    """Whether these are the tokens of several texts, not of one."""
    return len(ids) == 0 or not (isinstance(ids[0], int) or getattr(ids[0], "ndim", 1) == 0)


def _token_rows(prompts, tokenizer, ended: bool) -> list[list[int]]:
    """The tokens of each prompt without padding; one that goes on (not `ended`) without an end-of-text token."""
    if isinstance(prompts, Mapping):
        if not _is_rows(prompts["input_ids"]):
            prompts = {name: [row] for name, row in prompts.items()}
        masks = prompts.get("attention_mask", [[1] * len(ids) for ids in prompts["input_ids"]])
        kept = zip(prompts["input_ids"], masks, strict=True)
        return [[int(token) for token, shown in zip(*row, strict=True) if shown] for row in kept]
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and not isinstance(prompts[0], str):
        if not _is_rows(prompts):
            raise ValueError(f"expected the token ids of every prompt in a list of its own, got {prompts}; write [ids]")
        return [[int(token) for token in row] for row in prompts]
    if prompts and tokenizer is None:
        raise ValueError("expected a tokenizer for texts; give tokenizer= to the model or to this call, or token ids")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return rows if ended else [without_end(ids, tokenizer) or ids for ids in rows]


def _check_room(network, prompt: int, new: int) -> None:
    """Raise a ValueError where a prompt, or what is to be written after it, is longer than the network's context."""
    check_context(network, prompt, "prompts")
    written = new + (1 if network.config.is_encoder_decoder else prompt)  # a decoder begins with its start token
    limit = context_length(network)
    if limit is not None and written > limit:
        room = limit - written + new
        raise ValueError(
            f"expected at most {limit} tokens before and after writing, the context of this {type(network).__name__}, "
            f"got {written - new} + max_new_tokens={new}; write shorter prompts"
            + (f" or max_new_tokens={room}" if room else "")
        )


def _before_the_end(tokens: Tensor, ends) -> Tensor:
    """Whether each of the new tokens (B, M) is at or before the first end-of-text token of its row."""
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.as_tensor(ends))
    return ended.cumsum(-1) - ended.long() == 0
