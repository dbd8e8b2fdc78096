"""Attention backends: one interface, and one file for each backend."""
