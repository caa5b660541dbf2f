"""Diffusion objectives, guidance and samplers."""
