"""The process and its machine: launchers, signals, memory, files. No torch."""
