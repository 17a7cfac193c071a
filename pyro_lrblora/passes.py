"""A progress bar over a pass over the data, where it is long."""

from __future__ import annotations

from tqdm.auto import tqdm

_SHOWN_AFTER = 2.0  # seconds: a shorter pass needs no bar


def watched(batches, what: str, progress: bool) -> tqdm:
    """The batches, with a progress bar once two seconds have passed, which leaves nothing behind.

    Args:
        batches: with a length.
        what: the bar's name.
        progress: False shows none.
    """
    return tqdm(batches, desc=what, unit="batch", delay=_SHOWN_AFTER, leave=False, disable=not progress)
