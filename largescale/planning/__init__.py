"""What a run costs and whether it fits, before it is started."""
