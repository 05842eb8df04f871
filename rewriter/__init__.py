"""fastlora: a compiler pass that finds LoRA adapters, norms, rotary embeddings, MLPs and losses and fuses them."""
