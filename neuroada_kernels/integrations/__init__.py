"""Integrations with other libraries. Each is imported explicitly and requires its library."""
