"""What a run is, what its settings may hold, and what follows from them. No torch."""
