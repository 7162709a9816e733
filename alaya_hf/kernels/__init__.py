"""The arithmetic: exact attention, host kernels, partials and their merge."""
