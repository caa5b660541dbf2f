"""Ranks, what they agree on every step, and the watchdog that ends a run when one is gone."""
