"""Evaluation from a checkout: ``python -m eval --help``."""
