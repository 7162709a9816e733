"""The decode step on a GPU: one kernel family per file, each a custom operator beside its plain torch reference.

`layout` says how the low-bit copy lies in memory, `step` puts the kernels in order. Nothing is imported here: Triton is
needed by the kernels alone.
"""
