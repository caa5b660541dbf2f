"""DeepSpeed, and the optimizer that it drives."""
