"""The native library, attention and layers' functions: its C++ sources, how it is built, and how it is loaded."""
