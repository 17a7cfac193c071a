"""Built-in text: short generated reviews whose label probabilities are known exactly.

Each review is one to three remarks about parts of a thing. A remark carries a weight, in log-odds; the label is drawn
with the probability that the weights add up to. So a model can be scored against the truth, not only against labels,
and some reviews are ambiguous by construction.
"""

from __future__ import annotations

import datasets
import numpy as np

_PARTS = {
    "films": "plot, acting, soundtrack, dialogue, ending, pacing, script, camera, cast, villain, first scene, humour",
    "hotels": "room, breakfast, staff, bed, pool, bathroom, location, lobby, view, service, restaurant, check-in",
}
_REMARKS = {
    "films": {
        3.0: ["a masterpiece", "breathtaking", "unforgettable", "flawless", "stunning"],
        1.8: ["gripping", "very moving", "clever", "a real treat", "charming", "thrilling"],
        0.8: ["decent", "watchable", "better than expected", "pleasant enough", "solid"],
        0.0: [
            "rather long",
            "unusual",
            "loud",
            "much like the book",
            "old-fashioned",
            "about what I expected",
        ],
        -0.8: ["a bit flat", "forgettable", "predictable", "uneven", "nothing special"],
        -1.8: ["boring", "clumsy", "a letdown", "painfully slow", "shallow", "irritating"],
        -3.0: ["a disaster", "unwatchable", "atrocious", "an insult", "horrible"],
    },
    "hotels": {
        3.0: ["perfect", "spotless", "superb", "the best we ever had", "outstanding"],
        1.8: ["lovely", "very comfortable", "welcoming", "excellent value", "peaceful", "generous"],
        0.8: ["fine", "clean enough", "acceptable", "better than the photos", "handy"],
        0.0: [
            "on the third floor",
            "large",
            "near the station",
            "like any other",
            "recently changed",
            "busy",
        ],
        -0.8: ["dated", "a bit noisy", "cramped", "slow", "overpriced"],
        -1.8: ["dirty", "rude", "disappointing", "freezing", "badly kept", "stale"],
        -3.0: ["filthy", "a nightmare", "disgusting", "unacceptable", "infested"],
    },
}
_FIRST = [
    "The {part} was {remark}",
    "I found the {part} {remark}",
    "{Remark}, that is my word for the {part}",
]
_JOIN = {
    1: [", and the {part} was {remark}", "; the {part} was also {remark}"],
    -1: [", but the {part} was {remark}"],
}
_LAST = [".", "!", ", I have to say.", ", in my opinion.", ". My friends agreed."]


def reviews(rows: int, seed: int = 0, domain: str = "films") -> datasets.Dataset:
    """Generated reviews with columns text, label (negative, positive) and p_true, the probability of "positive".

    Args:
        rows: how many, at least 1.
        seed: the same seed gives the same rows.
        domain: "films", or "hotels" as data from elsewhere (other parts, other remarks).
    """
    if rows < 1:
        raise ValueError(f"expected rows >= 1, got rows={rows}")
    if domain not in _PARTS:
        raise ValueError(f"expected domain to be one of {list(_PARTS)}, got {domain!r}")
    generator = np.random.default_rng([seed, list(_PARTS).index(domain)])
    texts, weights = zip(*(_review(generator, domain) for _ in range(rows)), strict=True)
    p_true = 1 / (1 + np.exp(-np.array(weights)))
    labels = (generator.random(rows) < p_true).astype(int)
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "p_true": datasets.Value("float64"),
        }
    )
    return datasets.Dataset.from_dict(
        {"text": list(texts), "label": labels.tolist(), "p_true": p_true.tolist()}, features=features
    )


def _review(generator: np.random.Generator, domain: str) -> tuple[str, float]:
    """A text and its log-odds of being positive."""
    count = generator.integers(1, 4)
    parts = generator.choice(_PARTS[domain].split(", "), size=count, replace=False)
    strengths = generator.choice(list(_REMARKS[domain]), size=count)
    text, total = "", 0.0
    for position, (part, strength) in enumerate(zip(parts, strengths, strict=True)):
        remark = str(generator.choice(_REMARKS[domain][strength]))
        joined = _JOIN[-1 if total * strength < 0 else 1]
        form = generator.choice(joined if position else _FIRST)
        text += form.format(part=part, remark=remark, Remark=remark[0].upper() + remark[1:])
        total += float(strength)
    return text + str(generator.choice(_LAST)), total
