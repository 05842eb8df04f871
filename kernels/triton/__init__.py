"""Triton implementations of the ops, for NVIDIA GPUs of compute capability 7.0 and newer.

There is one file per op, named like the file in `kernels/formulas/` that documents the op's math. The docstring of a
kernel says what one program computes. Importing this package registers the implementations with their ops.
"""

from fastlora.kernels.triton import (
    dequantize as dequantize,
)
from fastlora.kernels.triton import (
    dropout as dropout,
)
from fastlora.kernels.triton import (
    glu as glu,
)
from fastlora.kernels.triton import (
    layer_norm as layer_norm,
)
from fastlora.kernels.triton import (
    linear_cross_entropy as linear_cross_entropy,
)
from fastlora.kernels.triton import (
    lora_group as lora_group,
)
from fastlora.kernels.triton import (
    lora_linear as lora_linear,
)
from fastlora.kernels.triton import (
    lora_mlp as lora_mlp,
)
from fastlora.kernels.triton import (
    rms_norm as rms_norm,
)
from fastlora.kernels.triton import (
    rotary as rotary,
)
