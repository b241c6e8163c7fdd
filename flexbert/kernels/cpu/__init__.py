"""All code that is for CPUs alone, behind one door: matrix products, attention by tiles, torch's own attention.

What stays here gains 3 % or more of a step's time or memory on the CPU that is named beside it.
"""

from flexbert.kernels.cpu.products import factor, factor_, lacks, linear, product, softmax_
from flexbert.kernels.cpu.sdpa import prefers_float32, sdpa
from flexbert.kernels.cpu.tiles import tiled, tiles_are_fastest

__all__ = [
    "factor",
    "factor_",
    "lacks",
    "linear",
    "prefers_float32",
    "product",
    "sdpa",
    "softmax_",
    "tiled",
    "tiles_are_fastest",
]
