"""What a model learns of its data before any fit: how many rows there are, a probed head, and the subspace."""

from __future__ import annotations

from .adapters.cache import bind_cached, check_cache
from .adapters.statistics import bind
from .data import as_batches, check_class_order
from .model import BayesianLoRA
from .probe import probe_head


def prepare(
    model: BayesianLoRA,
    train,
    *,
    tokenizer=None,
    probe: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    cache=None,
) -> BayesianLoRA:
    """A copy that knows N, the probed head and the subspace, so that several fits share them.

    Args:
        model: left as it is. A prepared one is prepared anew, one that is in another's subspace (in_subspace_of, a
            loaded posterior's) stays in it.
        train: the training data.
        tokenizer: for a datasets.Dataset, where the model has none.
        probe: fit the head's output layer as a linear probe on the pretrained network first.
        batch_size: rows per batch of the passes over the data.
        seed: of every random choice (randomised SVD, LoRA's start).
        cache: a folder that keeps the subspace, and where it is found again by what it was computed from: the weights,
            the adapter and the seed, and where the projection looks at data, the network and the batches.

    Raises:
        ValueError: labels out of range, empty data; with cache=, a projection or likelihood of your own without a repr
            that tells it from others.
    """
    tokenizer = tokenizer or model.tokenizer
    batches = as_batches(train, tokenizer, batch_size=batch_size, by_length=True).restarted()
    model.check_labels(batches, "training data")
    if model.head not in ("point", "bayesian"):  # nothing trains its classes into the data's order
        labels = getattr(getattr(model.network, "config", None), "id2label", None) or {}
        check_class_order(list(labels.values()), batches.class_names, "training data")
    if cache is not None:
        check_cache(model)
    new = model._copy(size=batches.rows, tokenizer=tokenizer, _class_names=batches.class_names, prepared=True)
    if probe and model.head in ("point", "bayesian") and model.head_start:
        if not model._head_scale_given:
            new.head_scale = None
        start, new.head_scale = probe_head(new, batches)
        new._set_head(model.head, start)
    if model._adapted is None or model.prepared:
        new._adapted = bind(new, batches, seed) if cache is None else bind_cached(cache, new, batches, seed)
    return new
