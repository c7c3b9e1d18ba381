"""How matrix products of float32 operands are computed."""

import torch

from mgllava_kernels._triton.launch import Target


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """`input_precision` of tl.dot: tf32 where the user allowed it, as for torch's own matrix products.

    `torch.backends.cuda.matmul.fp32_precision` (also set by `torch.set_float32_matmul_precision`) decides;
    it has no meaning for 16-bit operands.
    """
    allowed = target.capability >= 80 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def interpolation_precision(target: Target) -> str:
    """`input_precision` for float32 weights of samples, whatever the user allows of matrix products.

    tf32x3 makes three products of operands split in two numbers of 11 bits each: 22 of float32's 24 bits, on
    tensor cores. CDNA3 multiplies float32 matrices as they are.
    """
    return "tf32x3" if target.capability >= 80 else "ieee"
