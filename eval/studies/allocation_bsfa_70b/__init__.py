"""Allocation strategy, prefill, context and batch on the shape of Llama-3-70B."""
