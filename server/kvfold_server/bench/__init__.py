"""Measuring speed: the engine alone, transformers beside it, and the server under load."""
