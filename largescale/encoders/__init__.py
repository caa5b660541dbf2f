"""Frozen networks that turn images and captions into what a shard stores."""
