"""Paged attention on GPUs: the kernels in Triton, and the plan of a step that they follow.

The modules `attention`, `merge` and `write` import triton, the others do not.
"""
