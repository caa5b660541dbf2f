"""A run as a page: one HTML file that needs no network. No torch."""
