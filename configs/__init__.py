"""Shipped as ``alaya_hf.configs``: one YAML file per system, model and ablation."""
