"""The server of kvfold: everything with IO."""
