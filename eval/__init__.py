"""Programs that sample from trained models and score the samples. They run where DeepSpeed is not
installed."""

# First of all, since it names the extra that a missing package is in.
import largescale as largescale
