"""Kernels: hand-written PTX and compiled Python, with their contracts; one launcher."""
