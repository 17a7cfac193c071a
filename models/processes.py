"""Under `torchrun --nproc-per-node 4 ...` or `accelerate launch ...`, processes that share the rows of every batch."""

from __future__ import annotations

import os


class Processes:
    """The processes that were launched together, joined for lb.fit; without a launcher this one alone.

    Args:
        device: of the fits; each process has a GPU of its own unless it is "cpu".
    """

    def __init__(self, device: str):
        self._state = None
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            import accelerate

            self._state = accelerate.PartialState(cpu=device == "cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self._state is None or self._state.is_main_process

    def part(self) -> None:
        """Leave the group after the last fit; all processes but the first end here."""
        if self._state is not None:
            first = self.first
            self._state.destroy_process_group()
            self._state = None
            if not first:
                raise SystemExit(0)
