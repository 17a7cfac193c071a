"""Tiny networks, exact targets, and the real data and weights where a machine has them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyro
import pyro.distributions as dist
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora import probe

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

# The id of a parametrised case, the same in every process.
label = lambda value: getattr(value, "__name__", repr(value))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded_and_store_untouched():
    """Every test starts from one seed; what it leaves in Pyro's param store goes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _probes_of_one_scale(request, monkeypatch):
    """Choosing the scale of a head takes longer than most tests: those that are about it are marked."""
    if "chosen_head_scale" not in request.keywords:
        # Not 1, which a model that lost its scale would take.
        monkeypatch.setattr(probe, "choose_scale", lambda *arguments: 0.9)


@pytest.fixture
def shared():
    """The folder of real data and weights."""
    if not (SHARED / "data").exists():
        pytest.skip("no folder shared/ with real data and weights beside the repository")
    return SHARED


def tiny_bert(classes: int = 3, seed: int = 1, width: int = 16, intermediate: int = 24) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=intermediate,
        max_position_embeddings=32,
        num_labels=classes,
        initializer_range=1.2 / width**0.5,
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def bert():
    return tiny_bert()


WORDS = ["good", "bad", "film", "the", "was", "plot", "very", "not", "great", "dull"]


def tiny_tokenizer(pad: bool = True):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]" if pad else None, unk_token="[UNK]", model_max_length=16
    )


def tiny_reviews(rows: int = 40, classes: int = 3, seed: int = 0) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high, size: torch.randint(high, (size,), generator=generator).tolist()
    texts = [" ".join(WORDS[i] for i in pick(len(WORDS), 2 + n)) for n in pick(6, rows)]
    return datasets.Dataset.from_dict({"text": texts, "label": pick(classes, rows)})


def token_batches(rows: int = 40, batch_size: int = 8, classes: int = 3, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, rows, batch_size):
        size = min(batch_size, rows - start)
        batches.append(
            {
                "input_ids": torch.randint(1, 60, (size, 7), generator=generator),
                "attention_mask": torch.ones(size, 7, dtype=torch.long),
                "labels": torch.randint(classes, (size,), generator=generator),
            }
        )
    return batches


def random_latents(model, *rows):
    """Standard normal values of every site, one draw or one per row."""
    return {name: torch.randn(*rows, *shape) for name, shape in model.sites.shapes.items()}


def state(network):
    """What must be the same after anything the library does: values, flags, modes and hooks."""
    return {name: value.clone() for name, value in network.state_dict().items()} | {
        "flags": [p.requires_grad for p in network.parameters()],
        "modes": [m.training for m in network.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


class LinearNetwork(nn.Module):
    """y = W x + W' |x| + ...: linear in R, so that the posterior under Gaussian noise is known exactly."""

    def __init__(self, outputs: int = 6, inputs: int = 7, modules: int = 1):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)
        for number in range(1, modules):
            self.add_module(f"layer_{number}", nn.Linear(inputs, outputs, bias=False))

    def inputs(self, x):
        """What each layer sees: correlated, so that the modules' posteriors are too."""
        return [x, *(x + 0.5 * x.roll(number, -1).abs() for number in range(1, len(self._modules)))]

    def forward(self, x):
        return sum(layer(seen) for layer, seen in zip(self._modules.values(), self.inputs(x), strict=True))


class GaussianNoise:
    """A user's own likelihood: labels (B, m) around the outputs with known noise."""

    def __init__(self, sd: torch.Tensor):  # (m,)
        self.sd = sd

    def __call__(self, outputs, batch):
        return pyro.sample("labels", dist.Normal(outputs, self.sd).to_event(1), obs=batch.get("labels"))


class LinearGaussian:
    """A linear-Gaussian problem and its exact posterior over the D = modules r^2 latents, in float64."""

    def __init__(self, rank: int = 4, rows: int = 24, prior_scale: float = 0.7, seed: int = 0, modules: int = 1):
        torch.manual_seed(seed)
        network = LinearNetwork(modules=modules).requires_grad_(False)
        # Strongly correlated inputs make a correlated posterior.
        mixing = torch.randn(7, 7) * torch.logspace(0.2, -0.6, 7)
        x = torch.randn(rows, 7) @ mixing
        noise = torch.logspace(-0.6, 0.4, 6)  # a different one for each output, or eigenvalues would come in fours
        self.model = lb.BayesianLoRA(
            network,
            lb.LoRAXS(rank, lb.projections.Random(), targets="all-linear"),
            lb.priors.Normal(prior_scale),
            GaussianNoise(noise),
            size=rows,
        )
        jacobian = torch.cat(
            [
                torch.einsum("mr,sn,bn->bmrs", basis.B, basis.A, seen).reshape(rows * 6, rank**2)
                for basis, seen in zip(self.model.adapted.bases.values(), network.inputs(x), strict=True)
            ],
            dim=1,
        ).double()
        truth = prior_scale * torch.randn(modules * rank**2).double()
        clean = network(x).detach().reshape(-1).double() + jacobian @ truth
        sd = noise.repeat(rows).double()
        y = (clean + sd * torch.randn(rows * 6)).float()
        self.batch = {"x": x, "labels": y.reshape(rows, 6)}
        self.size, self.rows = modules * rank**2, rows
        residual = y.double() - network(x).detach().reshape(-1).double()
        weighted = jacobian / sd[:, None] ** 2
        self.fisher = jacobian.T @ weighted
        self.precision = self.fisher + torch.eye(self.size).double() / prior_scale**2
        self.mean = torch.linalg.solve(self.precision, weighted.T @ residual)
        marginal = jacobian @ jacobian.T * prior_scale**2 + torch.diag(sd**2)
        self.log_evidence = float(
            torch.distributions.MultivariateNormal(torch.zeros_like(residual), marginal).log_prob(residual)
        )

    def reverse_kl(self, mean, covariance) -> float:
        """KL(Normal(mean, covariance) || exact posterior) in nats."""
        q = torch.distributions.MultivariateNormal(mean.double(), covariance.double())
        p = torch.distributions.MultivariateNormal(self.mean, precision_matrix=self.precision)
        return float(torch.distributions.kl_divergence(q, p))

    def batches(self, size: int) -> list[dict]:
        return [
            {name: value[start : start + size] for name, value in self.batch.items()}
            for start in range(0, self.rows, size)
        ]
