"""The trained nano model: data, tokenizer, differentiable model, training, and export in the hub's checkpoint format."""
