"""NeuroAda inside other libraries. Each is imported on its own, by who has that library."""
