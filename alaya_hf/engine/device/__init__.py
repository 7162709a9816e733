"""Decoding that the device drives: keys, values and counts that kernels read and write without asking the host.

`plan` says what the kernels are asked for, `shared` holds what the layers of a cache have in common, `tokens` the tokens of
one layer. Nothing is imported here: the kernels need Triton, and only caches with ``engine="device"`` need the kernels.
"""
