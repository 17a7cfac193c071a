"""The plate over the rows of a batch."""

from __future__ import annotations

from contextlib import contextmanager

import pyro
import torch


class DataPlate(pyro.plate):
    """The data plate, which latents may enter too: a row's draw then counts 1/N, a prior's own sites stay outside.

    Args:
        size: N.
        rows: B, the rows of this batch.
        latents: the names of the sites that enter it per row.
    """

    def __init__(self, size: int, rows: int, latents: set[str]):
        super().__init__("data", size=size, subsample=torch.arange(rows), dim=-1)
        self._names, self._for_latents = latents, False

    @contextmanager
    def latents(self):
        """The plate as the latents see it."""
        self._for_latents = True
        try:
            with self:
                yield
        finally:
            self._for_latents = False

    def _process_message(self, msg):
        if not self._for_latents:
            super()._process_message(msg)
        elif msg["name"] in self._names:
            super()._process_message(msg)
            msg["scale"] = msg["scale"] / self.size
