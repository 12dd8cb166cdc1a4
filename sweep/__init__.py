"""Search spaces, trials and their coordinator; only search_hyperparams.py imports it."""
