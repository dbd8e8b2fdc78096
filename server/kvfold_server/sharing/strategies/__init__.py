"""Search strategies: one per file, all behind one protocol, all nested."""
