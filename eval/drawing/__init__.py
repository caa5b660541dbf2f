"""What samples are conditioned on, and where they are stored."""
