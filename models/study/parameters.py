"""What a posterior costs in numbers beside LoRA r = 8 on the same modules, from the shapes of known networks alone.

python models/study/parameters.py        # prints Markdown; no weights, no download
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from transformers import AutoModel, BertConfig, LlamaConfig, RobertaConfig

from pyro_lrblora.adapters.lora import lora_parameters
from pyro_lrblora.adapters.targets import find_targets, weight_shape

# Name: the config, and the modules that the papers adapt ("all-linear" for MiniLM, as in the study).
NETWORKS = {
    "MiniLM-L6": (BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
                  "all-linear"),
    "RoBERTa-large": (RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                    intermediate_size=4096),
                      ("query", "value", "attention.output.dense", "output.dense")),
    "Llama-2-7B": (LlamaConfig(), "all-linear"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--columns", type=int, nargs="+", default=[2, 10])
    args = parser.parse_args(argv)
    print(pd.DataFrame(rows(args.ranks, args.columns)).set_index("network").to_markdown(intfmt=","))


def rows(ranks: Sequence[int], columns: Sequence[int]) -> Iterator[dict[str, object]]:
    """A row per network, rank r and K of a low-rank guide, D (K + 2) numbers."""
    for name, (config, targets) in NETWORKS.items():
        with torch.device("meta"):
            network = AutoModel.from_config(config)
        shapes = [weight_shape(module) for module in find_targets(network, targets, exclude=("pooler.dense",)).values()]
        lora = lora_parameters(shapes)
        for rank in ranks:
            # A and B have as many numbers as LoRA of that rank.
            latents, frozen = len(shapes) * rank**2, lora_parameters(shapes, rank)
            for k in columns:
                yield {
                    "network": name,
                    "modules": len(shapes),
                    "r": rank,
                    "K": k,
                    "D": latents,
                    "posterior": latents * (k + 2),
                    "of LoRA r=8": f"{latents * (k + 2) / lora:.1%}",
                    "with A and B stored": f"{(latents * (k + 2) + frozen) / lora:.1%}",
                }


if __name__ == "__main__":
    main()
