"""The exception of the PTX interpreter."""

__all__ = ["PtxFault"]


class PtxFault(AssertionError):
    """A fault of a kernel, or an instruction that the interpreter does not support."""
