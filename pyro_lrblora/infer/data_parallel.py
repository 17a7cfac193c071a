"""Data parallel: several processes share the rows of every batch, and their gradients add up to one process's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..data import Batch, batch_rows, some_rows
from ..guides.mirrored import mirrored
from ..model import BayesianLoRA
from .progress import load_states, states
from .start import in_same_subspace, subspace_of


class Workers:
    """The processes of torch.distributed's default group; outside of one, this process alone.

    Every process is given the same model, data, arguments and random numbers, and takes its rows of each batch. A loss
    over b of the batch's B rows, weighted by b / B, adds up over the processes to that over the batch: the KL counts
    once, and each row's likelihood and draw are those it has in a fit by one process.
    """

    def __init__(self):
        grouped = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.rows, self.mine = 0, slice(0, 0)  # of the batch at hand: rows in all, and which are this process's
        if not grouped and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # set by torchrun and accelerate launch
            warnings.warn(
                f"this is one of {os.environ['WORLD_SIZE']} processes, but they fit apart from each other; write "
                "accelerate.PartialState() or torch.distributed.init_process_group() first to share the work",
                stacklevel=4,
            )

    @property
    def first(self) -> bool:
        """Whether this is the process that shows, writes and calls back."""
        return self.rank == 0

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows of a batch, and their share b / B of it."""
        if self.size == 1:
            return batch, 1.0
        rows = self.rows = batch_rows(batch)
        start, stop = rows * self.rank // self.size, rows * (self.rank + 1) // self.size
        # A process left without rows runs one that counts nothing.
        mine = self.mine = slice(start, max(stop, start + 1))
        return some_rows(batch, mine), (stop - start) / rows

    def share(self, batches):
        """This process's batches of a pass, every P-th."""
        if self.size == 1:
            return batches
        return [batch for position, batch in enumerate(batches) if position % self.size == self.rank]

    def programs(self, model, guide, per_row: bool, antithetic: bool) -> tuple[Callable, Callable]:
        """Model and guide as PartedELBO takes them.

        Raises:
            TypeError: several processes with a draw per row of a guide that has no `distribution`.
        """
        program, proposal = (model.rowwise, guide.rowwise) if per_row else (model, guide)
        if self.size > 1 and per_row:
            if not hasattr(guide, "distribution"):
                raise TypeError(
                    f"expected a LatentGuide for a draw per row in several processes, got {type(guide).__name__}; "
                    "write draws='shared'"
                )
            proposal = _inside(lambda: _OwnRows(self, guide, antithetic), proposal)
        if self.size > 1 and model.dropout:
            program = self._with_own_noise(program)
        return program, proposal

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in all of them."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def sums(self, values: Iterable[float], device: torch.device) -> list[float]:
        """The sums of some numbers over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, value: bool, device: torch.device) -> bool:
        """What the first process says."""
        return bool(self.sums([float(value and self.first)], device)[0])

    def from_first(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The first process's values of tensors that all have by the same names and shapes."""
        copies = {name: value.detach().to(device, copy=True).contiguous() for name, value in tensors.items()}
        for value in copies.values():
            dist.broadcast(value, 0)
        return copies

    def model_of_first(self, model: BayesianLoRA, tokenizer) -> BayesianLoRA:
        """The model in the first process's subspace: no two devices compute one to the same bits."""
        if self.size == 1:
            return model
        tensors, values = subspace_of(model)
        tensors = self.from_first(tensors, model.device)
        if values["head_scale"] is not None:
            (values["head_scale"],) = self.sums([values["head_scale"] if self.first else 0.0], model.device)
        return in_same_subspace(model, tensors, values, model.size, tokenizer)

    def begin_alike(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Give every process the first one's parameters."""
        if self.size > 1:
            load_states(modules, self.from_first(states(modules), device))

    def check_alike(self, identity: Mapping[str, str], device: torch.device) -> None:
        """Raise a ValueError unless all processes were called with the same.

        Args:
            identity: hexadecimal digests by what they are of.
        """
        if self.size == 1:
            return
        mine = torch.stack([torch.tensor(list(bytes.fromhex(d)), dtype=torch.uint8) for d in identity.values()])
        mine = mine.to(device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        for rank, other in enumerate(everyone):
            different = [name for name, same in zip(identity, (other == everyone[0]).all(-1), strict=True) if not same]
            if different:
                raise ValueError(
                    f"expected every process to call with the same model, data and arguments, got other {different} in "
                    f"process {rank}; give all rows to each (no DistributedSampler, no accelerator.prepare): batches "
                    "are divided here"
                )

    def _with_own_noise(self, program: Callable) -> Callable:
        def run(batch):
            # From the common stream, which dropout, drawn for rows that differ, must not move.
            seed = int(torch.randint(2**62, ())) + self.rank
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return program(batch)

        return run


class _OwnRows(Messenger):
    """Draws "_latents" for every row of the batch, as one process would, and keeps those of this process's rows."""

    def __init__(self, workers: Workers, guide, antithetic: bool):
        super().__init__()
        self._workers, self._guide, self._antithetic = workers, guide, antithetic

    def _pyro_sample(self, msg):
        if msg["name"] == "_latents":
            rows = self._guide.distribution().expand(torch.Size([self._workers.rows]))
            msg["value"] = (mirrored(rows) if self._antithetic else rows.rsample())[self._workers.mine]
            msg["done"] = True


def _inside(messenger: Callable[[], Messenger], program: Callable) -> Callable:
    def run(batch):
        with messenger():
            return program(batch)

    return run
