"""Programs that make shards."""

# First of all, since it names the extra that a missing package is in.
import largescale as largescale
