"""A rank for every module under one budget of latents (after AdaLoRA's idea, arXiv 2303.10512; ours is one-shot)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def allocate_ranks(spectra: Mapping[str, Sequence[float]], budget: int, smallest: int = 1) -> dict[str, int]:
    """The rank of every module, greedy in squared singular value gained per latent spent.

    Rank r costs r^2 latents and captures the sum of the r leading squared singular values; going from r to r + 1 gains
    sigma_{r+1}^2 for 2 r + 1 latents. Steps are taken in the order of that ratio until one does not fit the budget.
    Within a module the ratio falls with r, so what is captured is the most that the latents spent can capture, and
    misses the most that the budget could by less than the gain of the step that did not fit (Dantzig 1957). No rank
    falls when the budget grows.

    Args:
        spectra: module -> singular values of its summed loss gradient, descending; their number is the largest rank.
        budget: the largest sum of r^2 over modules.
        smallest: every module has at least this rank.

    Raises:
        ValueError: the budget does not cover the smallest rank in every module.
    """
    spent = len(spectra) * smallest**2
    if budget < spent:
        raise ValueError(
            f"expected a budget that gives each of {len(spectra)} modules rank {smallest}, got budget={budget}; "
            f"write budget={spent} or more"
        )
    ranks = dict.fromkeys(spectra, smallest)
    steps = [
        (sigma**2 / (2 * rank + 1), name)
        for name, spectrum in spectra.items()
        for rank, sigma in enumerate(spectrum)
        if rank >= smallest and sigma > 0
    ]
    # Stable: where ratios are equal, the order of the modules decides.
    for _, name in sorted(steps, key=lambda step: -step[0]):
        cost = 2 * ranks[name] + 1
        if spent + cost > budget:
            break
        ranks[name], spent = ranks[name] + 1, spent + cost
    return ranks
