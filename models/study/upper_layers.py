"""An encoder's upper layers as a network of their own: the frozen lower ones are computed once per row and kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import SequenceClassifierOutput

from pyro_lrblora.data import EncodedBatches
from pyro_lrblora.networks import MeanPoolClassifier


class UpperLayers(MeanPoolClassifier):
    """The last layers of a BERT encoder in the place of the whole of it, from where `LowerStates` stopped.

    Args:
        encoder: a BertModel, whose modules are shared.
        below: layers that are left to LowerStates.
        num_labels: C; 1 gives scores of choices, (B, C), from hidden (B, C, T, H).
        compared: a row is two texts that were encoded apart, hidden (B, 2, T, H), and the head reads their means u and
            v as (u, v, |u - v|): how sentence encoders are trained on pairs (Reimers and Gurevych 2019).
    """

    def __init__(self, encoder: nn.Module, below: int, num_labels: int, compared: bool = False):
        super().__init__(encoder, num_labels)
        self.encoder, self.compared = encoder.encoder.layer[below:], compared
        if compared:
            self.classifier = nn.Linear(3 * encoder.config.hidden_size, num_labels)
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits (B, C) from the lower layers' output hidden (B, T, H), (B, 2, T, H) or (B, C, T, H) and its mask."""
        items = attention_mask.shape[:-1]
        hidden, mask = hidden.flatten(0, -3), attention_mask.flatten(0, -2)
        additive = _additive(mask, hidden.dtype)
        for layer in self.encoder:
            hidden = layer(hidden, additive)
        if not self.compared:
            return self.classified(hidden, mask, items)
        u, v = self.pooled(hidden, mask).unflatten(0, items).unbind(1)
        return SequenceClassifierOutput(logits=self.classifier(torch.cat([u, v, (u - v).abs()], -1)))


class LowerStates(EncodedBatches):
    """Rows of any EncodedBatches after an encoder's embeddings and first layers, with the same labels and shuffling.

    Args:
        batches: in their own order, or shuffled.
        encoder: a BertModel.
        below: how many of its layers are computed.
        batch_size: rows per batch from now on.
        shuffle: a seed for a new order in every epoch; None keeps the order.
    """

    @torch.no_grad()
    def __init__(self, batches: EncodedBatches, encoder: nn.Module, below: int, batch_size: int, shuffle: int | None):
        encoder = encoder.eval()
        device, columns = next(encoder.parameters()).device, {"hidden": [], "attention_mask": []}
        for batch in batches.in_order():
            batch = {name: value.to(device) for name, value in batch.items()}
            mask = batch.pop("attention_mask").flatten(0, -2)
            items = batch["input_ids"].shape[:-1]
            inputs = {name: value.flatten(0, -2) for name, value in batch.items() if name != "labels"}
            hidden = encoder.embeddings(**inputs)
            for layer in encoder.encoder.layer[:below]:
                hidden = layer(hidden, _additive(mask, hidden.dtype))
            longest = mask.view(len(batch["input_ids"]), -1, mask.shape[-1]).sum(-1).amax(1)
            for states, shown, length in zip(
                hidden.view(*items, *hidden.shape[-2:]).cpu(), mask.view(*items, -1).cpu(), longest, strict=True
            ):
                columns["hidden"].append(states[..., : int(length), :].clone())
                columns["attention_mask"].append(shown[..., : int(length)])
        lengths = [mask.shape[-1] for mask in columns["attention_mask"]]
        super().__init__(columns, batches.labels, None, batch_size, shuffle, shuffle is None, lengths)
        self.class_names = batches.class_names

    def _padded(self, columns: Mapping[str, list]) -> dict[str, Tensor]:
        longest = max(mask.shape[-1] for mask in columns["attention_mask"])
        return {
            "hidden": torch.stack([pad(row, (0, 0, 0, longest - row.shape[-2])) for row in columns["hidden"]]),
            "attention_mask": torch.stack(
                [pad(row, (0, longest - row.shape[-1])) for row in columns["attention_mask"]]
            ),
        }


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, T) of ones and zeros as what attention adds, (B, 1, 1, T)."""
    return (1 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min
