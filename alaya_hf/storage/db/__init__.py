"""Contexts on disk: vector files, the catalog of their prefixes, and what keeps both whole."""
