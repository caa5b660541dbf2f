"""Training methods compared: runs, statistics, report."""
