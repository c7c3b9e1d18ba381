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
