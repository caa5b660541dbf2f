"""Scores of checkpoints against steps, and of averages against their width."""
