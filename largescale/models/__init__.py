"""Networks that predict noise from a noisy image, a timestep and a condition."""
