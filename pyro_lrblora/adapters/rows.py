"""Latents of each row's own, also where a module does not see the batch's rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..data import Batch, batch_rows
from .checkpointing import without_checkpointing

_SAME = 0.05  # relative: bf16 rounding stays below, other rows' activations do not


def mixing_modules(model, batch: Batch) -> list[str]:
    """The adapted modules whose inputs are not the batch's rows one after the other, found once per model.

    DeBERTa sends relative positions, which no row owns, through its attention's projections; XLNet has time in the
    first axis. So two rows are run together and alone: where a module's inputs are not the same, latents of a row's own
    would not meet that row.

    Args:
        model: a BayesianLoRA.
        batch: tensors by name; one row alone cannot tell and counts as none found.

    Raises:
        ValueError: what the network returns for a row depends on the other rows.
    """
    rows = batch_rows(batch)
    if model._mixing is None and rows > 1:
        if model._attachment is not None:
            model._attachment.set({}, {})
        pair = {name: value[:2] if len(value) == rows else value for name, value in _tensors(batch)}
        together, *alone = (_inputs(model, part) for part in (pair, *_single_rows(pair)))
        mixing = [name for name in together if not _apart(together[name], *(row[name] for row in alone))]
        if "outputs" in mixing:
            raise ValueError(
                f"expected a network that treats the rows of a batch apart, got a {type(model.network).__name__} whose "
                "outputs for a row depend on the others; fit with draws='shared', warm_start=False"
            )
        model._mixing = mixing
        if model._mixing:
            warnings.warn(
                f"{len(model._mixing)} adapted modules, such as {model._mixing[0]!r}, see more than the batch's rows "
                "(relative positions, for one): rows with draws of their own are run one at a time. draws='shared' "
                "runs them together",
                stacklevel=2,
            )
    return model._mixing or []


def check_one_draw(values: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError for latents with an axis of draws, which would be taken for that of the batch's rows."""
    for name, shape in shapes.items():
        if values[name].shape != shape:
            raise ValueError(
                f"expected one draw of {name!r} per call, {tuple(shape)}, got {tuple(values[name].shape)}; write "
                "parallel=False, or vectorize_particles=False, with this network: its batch has an axis of rows alone"
            )


def run_rows(model, batch: Batch, latents: Mapping[str, Tensor], head: Mapping[str, Tensor]):
    """What the network returns for a batch; row by row where rows have latents of their own and modules mix rows.

    Args:
        model: a BayesianLoRA, attached.
        batch: tensors by name.
        latents: by site, one draw or one per row.
        head: what model.head_values returned.
    """
    own = any(latents[name].dim() > len(shape) for name, shape in model.sites.shapes.items())
    if not (own and mixing_modules(model, batch)):
        model._attachment.set(latents, head)
        return model._run(batch)
    parts = []
    # Layers run again in backward would find the last row's latents.
    with without_checkpointing(model.network):
        for row, alone in enumerate(_single_rows(batch)):
            model._attachment.set({name: value[row] for name, value in latents.items()}, head)
            parts.append(model._run(alone))
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    joined = {name: torch.cat([part[name] for part in parts]) for name, _ in _tensors(parts[0])}
    return type(parts[0])(**joined)


def rows_apart(model, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches as they are, or row by row where a module of the network mixes rows."""
    for batch in batches:
        if mixing_modules(model, batch):
            yield from _single_rows(batch)
        else:
            yield batch


def _single_rows(batch: Batch) -> Iterator[Batch]:
    rows = batch_rows(batch)
    for row in range(rows):
        yield {name: value[row : row + 1] if len(value) == rows else value for name, value in _tensors(batch)}


def _tensors(values: Mapping) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in values.items() if isinstance(value, Tensor) and value.dim()]


@torch.no_grad()
def _inputs(model, batch: Batch) -> dict[str, list[Tensor]]:
    """The inputs of every adapted module, call by call, and what the network returns."""
    seen: dict[str, list[Tensor]] = {name: [] for name in model.modules}
    handles = [
        module.register_forward_pre_hook(lambda module, args, calls=seen[name]: calls.append(args[0]))
        for name, module in model.modules.items()
    ]
    try:
        outputs = model.pretrained_outputs(batch, {})
    finally:
        for handle in handles:
            handle.remove()
    seen["outputs"] = [outputs] if isinstance(outputs, Tensor) else [_tensors(outputs)[0][1]]
    return seen


def _apart(together: list[Tensor], first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether the halves of every tensor's first axis are what two rows have alone."""
    if not len(together) == len(first) == len(second) or any(len(both) % 2 for both in together):
        return False
    for both, *alone in zip(together, first, second, strict=True):
        if any(one.numel() * 2 != both.numel() for one in alone):
            return False
        expected = torch.stack([one.flatten() for one in alone]).float()
        if (both.reshape(2, -1).float() - expected).norm() > _SAME * expected.norm():
            return False
    return True
