"""The SVD projection beside sklearn's TruncatedSVD, and the linearised predictive in plain forwards.

96 weights of RoBERTa-large's shapes, four of each of 24 layers: query, value and output 1024 x 1024, one of the
feed-forward pair 4096 x 1024. One weight of each shape is timed, the 96 are the sum.

python tests/benchmarks/linear_algebra.py        # prints Markdown
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import TruncatedSVD
from step_and_prediction import plain_forward, quiet, table

import pyro_lrblora as lb
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.reviews import reviews

MODULES = {(1024, 1024): 72, (4096, 1024): 24}


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    """A random matrix with singular values that fall as those of trained weights do: noise on a decaying spectrum."""
    torch.manual_seed(0)
    factors = torch.randn(shape[0], 64), torch.randn(64, shape[1])
    return torch.randn(shape) + factors[0] * torch.linspace(3, 0.3, 64) @ factors[1]


def ours(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """A (r, n), the leading right singular vectors."""
    return lb.projections.SVD()(weight, rank, {}, torch.Generator().manual_seed(0)).A


def sklearns(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The same by ten power iterations."""
    return torch.as_tensor(TruncatedSVD(rank, n_iter=10, random_state=0).fit(weight.numpy()).components_)


METHODS = {"SVD()": ours, "TruncatedSVD(n_iter=10)": sklearns}


def svd(rank: int, repeats: int) -> pd.DataFrame:
    """Seconds of one weight of each shape, and of all 96 from them."""
    rows, total = {}, dict.fromkeys(METHODS, 0.0)
    for shape, count in MODULES.items():
        weight = weight_of(shape)
        calls = {name: partial(method, weight, rank) for name, method in METHODS.items()}
        seconds = table(calls, repeats, "").iloc[:, 0]
        for name in METHODS:
            total[name] += count * seconds[name]
            rows[f"{name}, {shape[0]} x {shape[1]}"] = {"seconds": seconds[name]}
    for name, seconds in total.items():
        rows[f"{name}, all {sum(MODULES.values())}"] = {"seconds": seconds}
    rows["sklearn's over ours"] = {"seconds": total["TruncatedSVD(n_iter=10)"] / total["SVD()"]}
    return pd.DataFrame(rows).T


def accuracy(rank: int) -> pd.DataFrame:
    """What is found of MiniLM's 36 weights: the share of the best rank-r norm, and the worst direction's cosine."""
    layers = builtin_base(2)[0].encoder.encoder.layer
    weights = [module.weight.detach() for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    rows = {}
    for name, method in METHODS.items():
        shares, cosines = [], []
        for weight in weights:
            exact, found = torch.linalg.svd(weight, full_matrices=False), method(weight, rank)
            shares.append(float((weight @ found.T).norm() / exact.S[:rank].norm()))
            cosines.append(float(torch.linalg.svdvals(exact.Vh[:rank] @ found.T).min()))
        rows[name] = {
            "share of the best norm": np.mean(shares),
            "least": min(shares),
            "least cosine": min(cosines),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def linearised(repeats: int, rows: int) -> pd.DataFrame:
    """The linearised and the probit predictive of two classes, and 10 draws, beside one forward of the bare network."""
    network, tokenizer = builtin_base(2)
    network.eval()
    batch = next(iter(lb.Batches(reviews(rows), tokenizer, batch_size=rows)))
    model = lb.BayesianLoRA(network, lb.LoRAXS(8, targets="all-linear"), size=1000)
    spec = lb.guides.LowRankPrecision(8)
    posterior, batches = lb.Posterior(model, spec(model), spec), lb.data.as_batches([batch])
    calls = {"one plain forward": torch.no_grad()(plain_forward(network, batch))}
    for method in ("linearised", "probit"):
        calls[method] = lambda method=method: lb.predict(posterior, batches, draws=10, method=method)
    calls["10 draws"] = lambda: lb.predict(posterior, batches, draws=10)
    return table(calls, repeats, "prediction").iloc[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, median of {args.repeats} rounds, r = {args.rank}\n")
    print(svd(args.rank, args.repeats).to_markdown(floatfmt=".3f"), "\n", flush=True)
    print(accuracy(args.rank).to_markdown(floatfmt=".4f"), "\n", flush=True)
    print(linearised(args.repeats, args.rows).to_markdown(floatfmt=".2f"))


if __name__ == "__main__":
    main()
