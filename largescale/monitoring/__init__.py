"""Logs, times and the record of each start."""
