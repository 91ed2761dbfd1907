"""Facial-expression-recognition systems on the operators of fer_kernels. None are built yet."""

from fer_kernels import __version__

__all__ = ["__version__"]
