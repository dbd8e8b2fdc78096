"""Measuring what folding costs, and the text to measure it on."""
