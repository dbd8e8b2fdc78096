"""Models: finding and loading any decoder of transformers, and patching it without touching its forward."""
