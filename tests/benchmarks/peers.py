"""Training step, 10-draw prediction, set-up and peak memory of this library beside other people's, in one run.

Same network, modules, batch and threads; the candidates take turns. They are not the same method: what each does is in
its function's docstring, which is printed beside the figures. A library that is not installed is left out and named.

make bench-peers        # builds .venv-bench, runs this there, prints Markdown
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import inspect
import math
import time
from collections.abc import Callable

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from diagnostics_memory import peak
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from step_and_prediction import our_step, peft_lora, peft_step, plain_forward, quiet, table
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.reviews import reviews

DRAWS, SIZE, PRIOR_SD = 10, 1000, 0.1


def peft_alone(network, batch, names, rank):
    """The floor: deterministic PEFT LoRA and its head under Adam. Its "prediction" is 1 forward."""
    return peft_step(peft_lora(network, names, rank), batch)


def ours(network, batch, names, rank):
    """LoRA-XS, a LowRankPrecision(8) normal over all modules together, closed-form KL, a draw per row, point head."""
    return our_step(network, batch, lb.LoRAXS(rank, targets=names), lb.guides.LowRankPrecision(8), True)


def ours_lora(network, batch, names, rank):
    """LoRA with both factors latent, a Diagonal normal, shared draws: the family of posteriors' vi.diag and of IVON."""
    return our_step(network, batch, lb.LoRA(rank, targets=names), lb.guides.Diagonal(), False)


def naive_pyro(network, batch, names, rank):
    """LoRA-XS as PyroSample sites, one per module, after to_pyro_module_; AutoLowRankMultivariateNormal(rank=8), SVI.

    As to_pyro_module_ leaves it, frozen base weights are Pyro parameters and get gradients and Adam steps (pyro#3438).
    """
    adapted = lb.LoRAXS(rank).bind({name: network.get_submodule(name) for name in names}, {}, torch.Generator())
    network.requires_grad_(False)
    for name in names:
        basis = adapted.bases[name]
        network.set_submodule(name, NaiveXS(network.get_submodule(name), basis.A, basis.B))
    pyro.nn.module.to_pyro_module_(network)
    for name in names:
        prior = dist.Normal(0.0, PRIOR_SD).expand([rank, rank]).to_event(2)
        network.get_submodule(name).R = pyro.nn.PyroSample(prior)

    def program(batch):
        logits = plain_forward(network, batch)().logits
        with pyro.plate("data", SIZE, subsample=torch.arange(len(logits))):
            return pyro.sample("labels", dist.Categorical(logits=logits), obs=batch.get("labels"))

    guide = AutoLowRankMultivariateNormal(program, rank=8)
    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 1e-4}), pyro.infer.Trace_ELBO())
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    predictive = pyro.infer.Predictive(program, guide=guide, num_samples=DRAWS)
    return lambda: svi.step(batch), lambda: predictive(unlabelled)


def ivon(network, batch, names, rank):
    """PEFT LoRA under the IVON optimiser (mean-field normal, one draw per step); predictions at draws of all of it."""
    from ivon import IVON

    lora = peft_lora(network, names, rank)
    optimiser, forward = (
        IVON([p for p in lora.parameters() if p.requires_grad], lr=0.1, ess=SIZE),
        plain_forward(lora, batch),
    )

    def step():
        with torch.enable_grad(), optimiser.sampled_params(train=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(forward().logits, batch["labels"]).backward()
        optimiser.step()

    @torch.no_grad()
    def predict():
        for _ in range(DRAWS):
            with optimiser.sampled_params():
                forward()

    return step, predict


def posteriors_vi(network, batch, names, rank):
    """PEFT LoRA's parameters and head under posteriors.vi.diag (mean-field normal, a draw per step, torchopt Adam)."""
    import posteriors
    import torchopt

    lora = peft_lora(network, names, rank)
    trained = {name: p.detach().clone() for name, p in lora.named_parameters() if p.requires_grad}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = lambda params: torch.func.functional_call(lora, params, kwargs=inputs).logits

    def log_posterior(params, batch):
        likelihood = -torch.nn.functional.cross_entropy(logits(params), batch["labels"])
        prior = posteriors.diag_normal_log_prob(params, sd_diag=PRIOR_SD, normalize=False)
        return likelihood + prior / SIZE, torch.empty(0)

    transform = posteriors.vi.diag.build(
        log_posterior, torchopt.adam(lr=1e-4), temperature=1 / SIZE, init_log_sds=math.log(0.01)
    )
    held = [transform.init(trained)]

    def step():
        held[0], _ = transform.update(held[0], batch)

    @torch.no_grad()
    def predict():
        for _ in range(DRAWS):
            logits(posteriors.vi.diag.sample(held[0]))

    return step, predict


def laplace_torch(network, batch, names, rank):
    """PEFT LoRA's parameters and head, already trained, under laplace-torch's kron (Curvlinops GGN).

    It has no training step: the figure is its pass over one batch, which a fit makes once for each batch of the data
    after training. Predictions are at 10 draws of the weights (pred_type="nn"). Its diag takes no batches of dicts
    with one backend, and fails on PEFT's trained head with the other.
    """
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    model = LogitsOf(peft_lora(network, names, rank))
    settings = {"prior_precision": PRIOR_SD**-2, "backend": CurvlinopsGGN, "dict_key_y": "labels"}
    build = lambda: Laplace(model, "classification", "all", "kron", **settings)
    fitted, loader = build(), OneBatch(batch)
    fitted.fit(loader)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    predict = lambda: fitted(unlabelled, pred_type="nn", link_approx="mc", n_samples=DRAWS)
    return lambda: build().fit(loader), predict


CANDIDATES: dict[str, tuple[Callable, str | None]] = {
    "PEFT LoRA": (peft_alone, None),
    "ours, LoRA-XS": (ours, None),
    "ours, LoRA Diagonal": (ours_lora, None),
    "naive Pyro": (naive_pyro, None),
    "IVON": (ivon, "ivon-opt"),
    "posteriors": (posteriors_vi, "posteriors"),
    "laplace-torch": (laplace_torch, "laplace-torch"),
}


class NaiveXS(nn.Module):
    """A linear layer with W0 + B R A, as one would write it."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.base = base
        self.register_buffer("A", a)
        self.register_buffer("B", b)

    def forward(self, inputs):
        return self.base(inputs) + inputs @ self.A.T @ self.R.T @ self.B.T


class LogitsOf(nn.Module):
    """What laplace-torch calls: a batch in, logits out."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch):
        return plain_forward(self.network, batch)().logits


class OneBatch:
    """A data loader of one batch, with the attribute that laplace-torch reads N from."""

    def __init__(self, batch):
        self.batch, self.dataset = batch, range(len(batch["labels"]))

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([dict(self.batch)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    network, tokenizer = builtin_base(2)
    network.eval()
    batch = next(iter(lb.Batches(reviews(args.batch_size), tokenizer, batch_size=args.batch_size)))
    names = list(lb.BayesianLoRA(network, lb.LoRA(args.rank, "all-linear")).modules)
    build = lambda make: make(copy.deepcopy(network), batch, names, args.rank)
    usable, missing = installed()
    print(
        f"MiniLM, {len(names)} modules, r = {args.rank}, batch {args.batch_size} x {batch['input_ids'].shape[1]} "
        f"tokens, one thread, median of {args.repeats} rounds; {versions()}\n"
    )
    rows, steps, predictions = {}, {}, {"one plain forward": torch.no_grad()(plain_forward(network, batch))}
    for name, make in usable.items():
        rows[name] = {"peak MB, training": peak(lambda make=make: three_steps(build(make)))[0]}
    for name, make in usable.items():
        begun = time.process_time()
        steps[name], predictions[name] = build(make)
        rows[name]["set-up, s"] = time.process_time() - begun
    step, prediction = table(steps, args.repeats, "training step"), table(predictions, args.repeats, "prediction")
    for name in usable:
        rows[name]["step / PEFT LoRA"] = step.iloc[:, 1][name]
        rows[name]["10 draws / plain forward"] = prediction.iloc[:, 1][name]
    print(pd.DataFrame(rows).T.iloc[:, [2, 3, 1, 0]].to_markdown(floatfmt=("", ".2f", ".2f", ".2f", ".0f")), "\n")
    for name, make in usable.items():
        print(f"- {name}: {' '.join(inspect.getdoc(make).split())}")
    for name, package in missing.items():
        print(f"- {name}: left out, {package} is not installed (make bench-peers installs it)")


def three_steps(candidate) -> None:
    step, _ = candidate
    for _ in range(3):
        step()


def installed() -> tuple[dict[str, Callable], dict[str, str]]:
    """The candidates that can run here; and of the others, the missing package."""
    usable, missing = {}, {}
    for name, (make, package) in CANDIDATES.items():
        module = {"ivon-opt": "ivon", "laplace-torch": "laplace"}.get(package, package)
        if package is not None and importlib.util.find_spec(module) is None:
            missing[name] = package
        else:
            usable[name] = make
            # Imported here, so that no candidate's memory or set-up counts an import.
            importlib.import_module(module or "pyro_lrblora")
    return usable, missing


def versions() -> str:
    packages = ("torch", "pyro-ppl", "transformers", "peft", "ivon-opt", "posteriors", "laplace-torch")
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
