"""Search spaces and the Optuna study of a sweep; only search_hyperparams.py imports it."""
