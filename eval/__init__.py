"""Programs that sample from trained models and score the samples. They run where DeepSpeed is not
installed."""
