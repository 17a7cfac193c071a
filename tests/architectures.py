"""Tiny networks of every kind of transformer a user brings, and batches for them."""

import copy
from dataclasses import dataclass

import torch
import transformers as hf
from conftest import random_latents

import pyro_lrblora as lb

ROWS, LENGTH, END = 4, 8, 1

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": END}
DEBERTA = SIZES | {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8, "num_labels": 3, "initializer_range": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A tiny config, how many modules each target means, and names of those that see more than the batch's rows."""

    config: hf.PretrainedConfig
    attention: int
    mlp: int
    all_linear: int
    mixing: tuple[str, ...] = ()


ARCHITECTURES = {
    # Per layer q, k, v, o and two in the MLP; the pooler is linear too.
    "bert": Architecture(hf.BertConfig(**SIZES), 8, 4, 13),
    "roberta": Architecture(hf.RobertaConfig(**SIZES), 8, 4, 12),
    # One set of layer weights, run twice, behind a projection of the embeddings and before a pooler.
    "albert": Architecture(hf.AlbertConfig(**SIZES, embedding_size=8), 4, 2, 8),
    # DeBERTa's positions have projections of their own, or (v3) share the rows'.
    "deberta-v2": Architecture(
        hf.DebertaV2Config(**DEBERTA), 12, 4, 16, ("pos_key_proj", "pos_query_proj")
    ),
    "deberta-v3": Architecture(
        hf.DebertaV2Config(**DEBERTA, share_att_key=True), 8, 4, 12, ("key_proj", "query_proj")
    ),
    "modernbert": Architecture(
        hf.ModernBertConfig(**SIZES, bos_token_id=2, eos_token_id=END, cls_token_id=2, sep_token_id=END), 4, 4, 8
    ),
    # Time stands in the first axis; attention is made of parameters, not modules.
    "xlnet": Architecture(
        hf.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=4, d_inner=24, num_labels=3,
                       initializer_range=0.3, pad_token_id=0, dropout=0.0), 0, 4, 4, ("layer_1", "layer_2"),
    ),
    "gpt2": Architecture(
        hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0,
                      bos_token_id=2, eos_token_id=END, initializer_range=0.3), 4, 4, 8,
    ),
    "llama": Architecture(hf.LlamaConfig(**GROUPED), 8, 6, 14),
    "qwen2": Architecture(hf.Qwen2Config(**GROUPED), 8, 6, 14),
    "qwen3": Architecture(hf.Qwen3Config(**GROUPED, head_dim=8), 8, 6, 14),
    "mistral": Architecture(hf.MistralConfig(**GROUPED), 8, 6, 14),
    "gemma": Architecture(hf.GemmaConfig(**GROUPED, head_dim=8), 8, 6, 14),
    "gemma2": Architecture(hf.Gemma2Config(**GROUPED, head_dim=8), 8, 6, 14),
    # q, k, v in one module, gate and up in another.
    "phi3": Architecture(hf.Phi3Config(**GROUPED), 4, 4, 8),
    # The experts are one stacked parameter, and their router is not a linear module.
    "mixtral": Architecture(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), 8, 0, 8),
    # Two encoder layers, and a decoder layer whose attention is there twice: to itself and to the encoder.
    "t5": Architecture(
        hf.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=4,
                    num_labels=3, pad_token_id=0, eos_token_id=END, decoder_start_token_id=0), 16, 6, 22,
    ),
    "bart": Architecture(
        hf.BartConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
                      num_labels=3, pad_token_id=0, bos_token_id=2, eos_token_id=END, decoder_start_token_id=END,
                      init_std=0.3), 16, 6, 22,
    ),
    "vit": Architecture(hf.ViTConfig(**IMAGE), 8, 4, 12),
}  # fmt: skip
NAMES = list(ARCHITECTURES)
DECODERS = ["gpt2", "llama", "qwen2", "mistral", "gemma2", "phi3"]

all_linear = lb.LoRAXS(2, targets="all-linear")


def build(name, **options):
    """A fresh network of an architecture, the same at every call."""
    torch.manual_seed(3)
    # A copy: building a network writes into its config.
    config = copy.deepcopy(ARCHITECTURES[name].config)
    kind = hf.AutoModelForImageClassification if name == "vit" else hf.AutoModelForSequenceClassification
    return kind.from_config(config, **options).eval()


def batch_of(name, seed=0, left=False):
    """Four images, or four texts of 8, 6, 5 and 3 tokens, padded on the right or the left."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 0])
    if name == "vit":
        return {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator), "labels": labels}
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((8, 6, 5, 3)):
        tokens = torch.randint(3, 60, (length,), generator=generator)
        tokens[-1] = END
        places = slice(LENGTH - length, None) if left else slice(length)
        ids[row, places], mask[row, places] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(network, batch):
    """The logits of a network that carries nothing."""
    with torch.no_grad():
        return network(**{name: value for name, value in batch.items() if name != "labels"}).logits


def latents_of(model, *rows, scale=0.3):
    return {name: scale * value for name, value in random_latents(model, *rows).items()}
