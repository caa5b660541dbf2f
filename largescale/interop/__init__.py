"""Weights that other programs wrote, and weights for other programs."""
