"""Which texts a language model finds likely, one by one."""

from __future__ import annotations

import pandas as pd

from ..predictions import TokenPrediction


def text_scores(prediction: TokenPrediction) -> pd.DataFrame:
    """A row per text: its scored tokens, NLL in nats, NLL per token, and how far the draws differ on the whole text.

    Args:
        prediction: of given texts.

    Returns:
        Columns tokens, NLL, NLL per token, and sd over draws, that of the text's log probability in nats.
    """
    tokens = prediction.scored.sum(-1)
    losses = -prediction.log_probs.double().sum(-1)
    return pd.DataFrame(
        {
            "tokens": tokens.numpy(),
            "NLL": losses.numpy(),
            "NLL per token": (losses / tokens).numpy(),
            "sd over draws": prediction.log_likelihood.double().std(0, correction=0).numpy(),
        }
    ).rename_axis("text")
