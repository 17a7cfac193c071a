"""What is attached to the network: which latents it has and how a layer uses them."""

from .lora import LoRA
from .lora_xs import LoRAXS

__all__ = ["LoRA", "LoRAXS"]
