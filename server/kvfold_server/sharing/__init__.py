"""Sharing plans: searching them (KVSharer and better rules), measuring them, and the files that hold them."""
