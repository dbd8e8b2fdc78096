"""The native attention library: its C++ sources, how it is built, and how it is loaded."""
