"""Pyro programs that observe the labels, and what is predicted under them.

A likelihood is any function of (outputs, batch), called inside the data plate, that makes one pyro.sample statement
named "labels" with obs=batch.get("labels"). `outputs` is what the network returned. The classes here add what is known
beyond that, all of it optional: `logits(outputs, batch)`, (B, C), where labels are classes; `check_labels(labels,
classes)`; and, for predictions that are not classes, `summary(outputs, batch)` (tensors (B, ...) kept of each draw)
with `prediction(summaries, labels, class_names)` (what `predict` returns, from summaries (S, N, ...)).
"""

from .categorical import Categorical, logits_of
from .gaussian import Gaussian
from .multiple_choice import MultipleChoice, letter_tokens
from .next_token import NextToken
from .reading import check_classes, class_logits, label_site, prediction, summary

__all__ = [
    "Categorical",
    "Gaussian",
    "MultipleChoice",
    "NextToken",
    "check_classes",
    "class_logits",
    "label_site",
    "letter_tokens",
    "logits_of",
    "prediction",
    "summary",
]
