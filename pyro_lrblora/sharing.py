"""A posterior with a model card, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from torch import nn

from .formatting import shown
from .posterior import Posterior
from .provenance import LIBRARIES, ROWS, data_hash, versions
from .storage import FILES, describe, load, save

_DISTRIBUTION = """\
A posterior over the weights of a LoRA, made with `pyro_lrblora`: not one adapter but a distribution of them, for the
base it was fitted on. Predictions are averaged over its draws."""
_POINT = "A LoRA, made with `pyro_lrblora`: one adapter, a point without a distribution, for the base it was fitted on."
_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ about }}

```python
import pyro_lrblora as lb

network = ...  # {{ network }}, loaded from {{ base }}
posterior = lb.Posterior.from_pretrained("{{ source }}", network, tokenizer=tokenizer{{ own }})
prediction = lb.predict(posterior, data, draws=32)
```

The files are JSON and safetensors; nothing is unpickled. The head is in them, the base is not.

## How it was fitted

{{ fit }}
{% if comparison %}
## Scores

{{ comparison }}
{% endif %}"""


def save_pretrained(
    posterior: Posterior,
    folder,
    *,
    base_model: str | None = None,
    license: str | None = None,
    comparison: pd.DataFrame | None = None,
    data=None,
    source: str | None = None,
    **metadata,
) -> None:
    """Write what Posterior.save writes, and a model card as README.md.

    Args:
        posterior: what a fit returned.
        folder: made if it is not there; a posterior and a README.md there are replaced.
        base_model: the base's id on the hub; None takes the name the network was loaded by, unless that is a folder.
        license: as the hub spells it, such as "apache-2.0"; None writes none.
        comparison: what compare returned, as a table in the card.
        data: the training rows, for their hash in the card, see pyro_lrblora.provenance.data_hash; None takes what the
            fit recorded, which it does of a datasets.Dataset.
        source: what to load it from, as the card shows it; None is the folder's name.
        **metadata: further entries of huggingface_hub.ModelCardData, such as datasets=["sst2"], language="en".
    """
    if wrong := sorted({"push_to_hub", "repo_id", "safe_serialization"} & set(metadata)):
        raise TypeError(f"expected entries of a model card, got {wrong}; write posterior.push_to_hub('owner/name')")
    card = model_card(
        posterior,
        base_model=base_model,
        license=license,
        comparison=comparison,
        data=data,
        source=source or Path(folder).resolve().name,
        **metadata,
    )
    save(posterior, folder)
    card.save(Path(folder) / "README.md")


def from_pretrained(
    source,
    network: nn.Module,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir=None,
    **options,
) -> Posterior:
    """A posterior from a folder, or from a repository on the hub where there is no such folder.

    Args:
        source: a folder, or "owner/name" on the hub.
        network: the base, freshly loaded, see pyro_lrblora.storage.load.
        revision: branch, tag or commit on the hub.
        token: of the hub; None takes the one that is logged in.
        cache_dir: where files from the hub are kept; None is the hub's own place.
        **options: tokenizer, prior, likelihood, guide of pyro_lrblora.storage.load.

    Raises:
        ValueError: neither a folder nor a name that the hub could have; files missing, corrupt, or of another base.
        ConnectionError: the hub cannot be reached.
        OSError: the hub has no such repository or revision, or does not show it to this user.
    """
    if Path(source).is_dir():
        return load(source, network, **options)
    from huggingface_hub import snapshot_download

    with _hub_errors(
        f"expected {str(source)!r} to be a folder, or a repository on the hub",
        'download it where there is a connection and write Posterior.from_pretrained("folder/", network)',
    ):
        # Only these: a repository may hold anything.
        folder = snapshot_download(
            str(source), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(FILES)
        )
    return load(folder, network, **options)


def push_to_hub(
    posterior: Posterior,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a posterior",
    **options,
) -> str:
    """Upload what save_pretrained writes, as one commit, to a repository that is made if it is not there.

    Args:
        posterior: what a fit returned.
        repo_id: "owner/name".
        private: of a new repository; None is the owner's default.
        revision: an existing branch; None is main.
        token: of the hub; None takes the one that is logged in.
        commit_message: of the commit.
        **options: of save_pretrained.

    Returns:
        The commit's address.

    Raises:
        ValueError: a name that the hub cannot have.
        ConnectionError: the hub cannot be reached.
        OSError: the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(posterior, folder, **{"source": repo_id} | options)
        with _hub_errors(
            f"expected to upload to {repo_id!r}",
            'write posterior.save_pretrained("folder/") now, and `hf upload` that folder where there is a connection',
        ):
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
    return str(commit.commit_url)


def model_card(posterior: Posterior, *, base_model, license, comparison, data, source: str, **metadata):
    """The huggingface_hub.ModelCard that save_pretrained writes; the arguments are the same."""
    from huggingface_hub import ModelCard, ModelCardData

    if not (comparison is None or isinstance(comparison, pd.DataFrame)):
        raise TypeError(f"expected what lb.compare returned for comparison=, got {type(comparison).__name__}")
    model = posterior.model
    base_model = base_model or _hub_name(model.network)
    settings = {name: value for name, value in posterior.settings.items() if value is not None}
    record = settings.pop("fitted_with", {})
    rows, made = record.get(ROWS) if data is None else data_hash(data), record or versions(model.device)
    if rows != record.get(ROWS, rows):
        raise ValueError(
            f"expected data= to be the rows that were fitted, of hash {record[ROWS]}, got {rows}; leave it out"
        )
    facts = {
        "base": base_model or "not named",
        "network": type(model.network).__name__,
        "adapter": model.adapter,
        "modules": len(model.modules),
        "latents D": model.sites.size,
        "prior": model.prior,
        "likelihood": model.likelihood,
        "head": model.head,
        "guide": posterior.guide_spec,
        **{name: settings[name] for name in sorted(settings, key=lambda name: (name not in ("method", "seed"), name))},
        "training rows N": model.size or "not known",
        **({} if rows is None else {ROWS: rows}),
        **_last_epoch(posterior),
        # Of the fit; of a posterior that does not know its own, of the process that writes the card.
        "versions" if record else "saved with": ", ".join(f"{name} {made[name]}" for name in LIBRARIES),
    }
    rows = pd.DataFrame([[name, _cell(value)] for name, value in facts.items()], columns=["", "value"])
    # A user's own parts are not in the files.
    parts = {"prior": model.prior, "likelihood": model.likelihood, "guide": posterior.guide_spec}
    own = [name for name, part in parts.items() if _has_own(describe(part))]
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            license=license,
            **{"library_name": "pyro_lrblora", "tags": ["bayesian", "lora", "uncertainty"]} | metadata,
        ),
        template_str=_CARD,
        title=source,
        about=_POINT if posterior.is_point else _DISTRIBUTION,
        source=source,
        network=type(model.network).__name__,
        base=base_model or "the base it was fitted on",
        own="".join(f", {name}=..." for name in own),
        fit=rows.to_markdown(index=False, disable_numparse=True),
        comparison=None if comparison is None else _scores(comparison),
    )


def _hub_name(network: nn.Module) -> str | None:
    """The id the base was loaded by; None for a folder, whose name means nothing elsewhere."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for module in (network, getattr(network, "base_model", None)):
        name = getattr(module, "name_or_path", "")
        if name and not Path(name).exists():
            try:
                validate_repo_id(name)
            except HFValidationError:
                continue
            return name
    return None


def _has_own(described) -> bool:
    """Whether a part, or one within it, is a user's own."""
    if isinstance(described, list):
        return any(map(_has_own, described))
    return isinstance(described, dict) and ("own" in described or any(map(_has_own, described.values())))


def _last_epoch(posterior: Posterior) -> dict[str, str]:
    if not posterior.history:
        return {}
    row = posterior.history[-1]
    if "kl" in row and (not posterior.has_bound or "point fit" in posterior.settings):
        names = {"elbo": "log joint/row", "kl": "-log prior"}
        row = {names.get(name, name): value for name, value in row.items()}
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    told = [f"{name} {value if isinstance(value, int) else f'{value:.5g}'}" for name, value in numbers.items()]
    return {"last epoch": ", ".join(told)}


def _cell(value) -> str:
    text = json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def _scores(comparison: pd.DataFrame) -> str:
    # A count stands in a column of floats where another row lacks it.
    written = lambda value: shown(value).removesuffix(".000")
    table = pd.DataFrame(comparison).dropna(axis=1, how="all").map(written)
    table.index = [str(name).replace("|", "\\|") for name in table.index]
    sides = ["left", *["right"] * table.shape[1]]
    notes = "\n".join(f"- {note}" for note in comparison.attrs.get("notes", []))
    return f"{table.to_markdown(colalign=sides, disable_numparse=True)}\n\n{notes}".strip()


@contextmanager
def _hub_errors(expected: str, instead: str):
    """One error that says what to do, in the place of those of the hub's client and its HTTP library."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{expected}, got a name that the hub cannot have: {error}") from None
    except (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        # "Not in the cache", which is what a download says that got no answer, counts as an answer in older clients.
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise OSError(f"{expected}; the hub answered: {' '.join(str(error).split())}") from None
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise ConnectionError(f"{expected}; the hub cannot be reached ({why}): {instead}") from None
