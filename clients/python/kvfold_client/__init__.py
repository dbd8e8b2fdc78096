"""The client of kvfold."""
