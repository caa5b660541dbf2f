"""Shards, their order, and the loader that feeds one rank."""
