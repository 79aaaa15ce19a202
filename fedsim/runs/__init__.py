"""A run's folder: what it holds, and where it comes from."""
