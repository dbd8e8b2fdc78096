"""The bytes of the KV cache: the arena, and attention over block tables. Bookkeeping is the scheduler's."""
