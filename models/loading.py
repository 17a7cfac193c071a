"""What every script loads from a folder or the hub, and one message where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from transformers import AutoTokenizer


@contextmanager
def from_hub(name: str, what: str) -> Iterator[None]:
    """Turn what the hub's clients raise into one message and exit code 1.

    Args:
        name: a folder, or a name on the hub.
        what: the flag it was given by.

    Raises:
        SystemExit: nothing was found by that name.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        if Path(name).exists():
            raise
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        # "Not in the cache" is how the clients say that they got no answer; a refusal is an answer.
        silent = (LocalEntryNotFoundError, ConnectionError, TimeoutError)
        answered = any(isinstance(e, HfHubHTTPError) and not isinstance(e, silent) for e in causes)
        expected = f"expected {what} to be a folder or a name on the hub that can be loaded, got {name!r}"
        if answered or not any(isinstance(e, silent) for e in causes):
            raise SystemExit(
                f"{expected}: {' '.join(str(error).split())}; write a folder that exists, or owner/name as on the hub"
            ) from None
        if constants.HF_HUB_OFFLINE:
            why, instead = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        else:
            why, instead = type(causes[-1]).__name__, "try again where there is a connection"
        raise SystemExit(f"{expected}; the hub cannot be reached ({why}): write a folder, or {instead}") from None


def tokenizer_of(base: str):
    """The tokenizer of a base; one that cannot pad, as of most language models, pads with its end-of-text token."""
    with from_hub(base, "--base"):
        tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
