"""Programs that make shards; run from the clone, never installed."""
