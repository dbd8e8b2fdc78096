"""Policy and bookkeeping of kvfold: pure, standard library only."""
