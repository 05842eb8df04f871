"""Triton forms of the ops, for NVIDIA GPUs of compute capability 7.0 and newer.

One file per op, named after the file in `kernels/` that holds the op's formulas, which the kernels here compute. The
docstring of a kernel is what one program of it does. Importing this package registers the forms with their ops.
"""

from fastlora.kernels.gpu import rms_norm as rms_norm
