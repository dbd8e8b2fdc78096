"""Between text and tokens: tokenizing, chat templates, incremental detokenizing, stop strings.

No torch, no transformers.
"""
