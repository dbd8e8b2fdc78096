"""The engine: the loop that plans, computes and commits steps, and what it computes with."""
