"""Conv-Gate fusion without the projected maps, forward and backward; the algebra is that of the torch path.

Forward, seven launches: taps of the convolution side by side; f = GELU(depthwise) and s = GELU(pointwise), both
with column sums; their means; the gate's two matrix-vector products; the output. The output is one dual product:
low + f·W_lowᵀ + b_low + g·(s·W_highᵀ + b_high), whose accumulator is scaled by g between its halves.

Backward, with G the incoming gradient, G_low and G_high its parts: the gate's derivative is, of each picture,
dg = <G_highᵀ·s, W_high> + <Σ_n G_high, b_high>, a by-product of the gradient of W_high, which is computed first.
Through the means it comes back as one constant row a picture on dl and dh, which the epilogues of the products
that make d(GELU input) add before they multiply by GELU'. f and s are computed again from what the forward pass
kept, the inputs of the GELUs. Where all gradients are needed there are 25 launches, 18 without a gate. Every sum
has one fixed order.

Bytes and FLOPs a picture at published sizes (D 1024, C 1536, 24x24 tokens) in bfloat16, forward: 1.2 MB low and
1.8 MB high read, 1.2 MB written, f and s, 1.2 and 1.8 MB, written and read once more, and 12.2 MB of weights for
any number of pictures; 5.7 GFLOP in matrix products and 0.06 in the convolution. At 4.3 TB/s and 600 TFLOP/s the
floor for 1, 8 and 32 pictures is 9.6, 77 and 306 µs, set by the matrix products. Backward, where all is needed:
each of them twice, 11.5 GFLOP a picture; 19, 153 and 612 µs.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.depthwise import (
    convolution_parameter_gradients,
    convolve_gelu,
    convolve_transposed,
    depthwise_conv_gelu,
    depthwise_conv_gelu_backward,
)
from mgllava_kernels._triton.gate_head import (
    GateWeights,
    gate_arguments,
    gate_gradients,
    gate_head,
    gate_of,
    gate_parameter_gradients,
)
from mgllava_kernels._triton.launch import Target, launch, multiple, target_of
from mgllava_kernels._triton.matmul import (
    add_bias,
    add_product,
    descriptors_fit,
    gelu,
    gelu_derivative,
    grouped_tile,
    halves,
    launch_product,
    tile_offsets,
)
from mgllava_kernels._triton.precision import dot_precision
from mgllava_kernels._triton.tokens import column_sums, gelu_of, token_layout, token_sums
from mgllava_kernels.configs import Config, Sizes, Space, choose
from mgllava_kernels.conv_gate import WEIGHT_NAMES

__all__ = [
    "conv_gate_fusion",
    "conv_gate_fusion_backward",
    "depthwise_conv_gelu",
    "depthwise_conv_gelu_backward",
]

# Values of DESCRIPTORS: how tiles are copied from global memory.
POINTERS, TMA = 1, 2
# Elements of the accumulator in a thread that an epilogue takes at once.
PIECE = 32
# Elements of the gate's hidden layer, and of a bias, that a program takes at once; and of a sum of parts.
BLOCK_H = 512
BLOCK_BIAS = 64
BLOCK_ADD_M, BLOCK_ADD_N = 8, 128


def conv_gate_fusion(
    low_res: Tensor, high_res: Tensor, weights: Sequence[Tensor], variant: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    tokens = low_res.shape[1]
    height, width = high_res.shape[2:]
    gated = variant != "concat_projected"
    f, low_pre, low_sums = convolve_gelu(
        *(low_res, named["low_res_conv_weight"], named["low_res_conv_bias"], height, width, save, gated)
    )
    s, high_pre, high_sums = _pointwise_gelu(
        *(_as_tokens(high_res), named["high_res_conv_weight"].flatten(1), named["high_res_conv_bias"]),
        *(save, gated),
    )
    column_means, gate = low_res.new_empty(0), None
    if gated:
        column_means = column_sums([low_sums, high_sums], 1.0 / max(tokens, 1))
        gate_weights = _gate_weights(named)
        gate = gate_arguments(gate_head(column_means, gate_weights), gate_weights)
    fused = _dual_product(low_res, f, s, named, variant, gate)
    if not save:
        column_means = low_res.new_empty(0)
    return fused, low_pre, high_pre, column_means


def conv_gate_fusion_backward(
    grad: Tensor,
    low_res: Tensor,
    high_res: Tensor,
    weights: Sequence[Tensor],
    low_pre: Tensor,
    high_pre: Tensor,
    column_means: Tensor,
    variant: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    named = dict(zip(WEIGHT_NAMES, weights, strict=False))
    need = dict(zip(("low_res", "high_res", *WEIGHT_NAMES), needed, strict=False))
    low_dim = low_res.shape[2]
    height, width = high_res.shape[2:]
    if token_layout([grad])[0] == "strided":
        grad = grad.contiguous()
    low_weight, high_weight = (named[f"{name}_res_proj_weight"].flatten(1) for name in ("low", "high"))
    grad_low, grad_high = (grad, grad) if variant == "gate_sum" else grad.split(low_dim, dim=-1)
    grads: dict[str, Tensor] = {}

    gate = row_low = row_high = row_f = row_s = mean_f = mean_s = None
    grad_sums = None
    if variant != "concat_projected":
        mean_f, mean_s = column_means[:, low_dim : 2 * low_dim], column_means[:, 2 * low_dim :]
        gate_weights = _gate_weights(named)
        head = gate_head(column_means, gate_weights)
        grad_sums = token_sums(grad)
        parts, dots = _weight_products(
            grad_high, gelu_of(high_pre), high_weight, gate_arguments(head, gate_weights)
        )
        through = gate_gradients(head, dots, grad_sums[:, -low_dim:], gate_weights)
        gate, row_f, row_s = through.gate, through.mean_f, through.mean_s
        row_low, row_high = through.means.split(low_dim, dim=1)
        if need["high_res_proj_weight"]:
            grads["high_res_proj_weight"] = _add_parts(parts, high_weight.dtype, row_high, mean_s)
        if any(need[name] for name in need if name.startswith("gate")):
            grads.update(gate_parameter_gradients(head, through, gate_weights))
    elif need["high_res_proj_weight"]:
        grads["high_res_proj_weight"] = _weight_gradient(grad_high, gelu_of(high_pre))
    if need["low_res_proj_weight"]:
        grads["low_res_proj_weight"] = _weight_gradient(grad_low, gelu_of(low_pre), row_low, mean_f)
    if need["low_res_proj_bias"] or need["high_res_proj_bias"]:
        grad_sums = token_sums(grad) if grad_sums is None else grad_sums
        grads.update(_projection_bias_gradients(grad_sums, low_dim, gate, row_low, row_high, grad.dtype))

    if need["high_res"] or need["high_res_conv_weight"] or need["high_res_conv_bias"]:
        conv_weight = named["high_res_conv_weight"].flatten(1)
        grad_pre, sums = _gelu_input_gradient(grad_high, high_weight, high_pre, gate, row_s)
        grads["high_res_conv_bias"] = column_sums([sums.flatten(0, 1).unsqueeze(0)], dtype=grad.dtype)
        if need["high_res"]:
            grads["high_res"] = _multiply(conv_weight.T.unsqueeze(0), grad_pre)
        if need["high_res_conv_weight"]:
            grads["high_res_conv_weight"] = _weight_gradient(grad_pre, _as_tokens(high_res))
    if need["low_res"] or need["low_res_conv_weight"] or need["low_res_conv_bias"]:
        conv_weight = named["low_res_conv_weight"]
        grad_pre, _ = _gelu_input_gradient(grad_low, low_weight, low_pre, None, row_f)
        if need["low_res"]:
            grads["low_res"] = convolve_transposed(grad_pre, conv_weight, height, width, grad_low, row_low)
        if need["low_res_conv_weight"] or need["low_res_conv_bias"]:
            grads["low_res_conv_weight"], grads["low_res_conv_bias"] = convolution_parameter_gradients(
                grad_pre, low_res, conv_weight, height, width
            )

    inputs = {"low_res": low_res, "high_res": high_res, **named}
    return [grads[name].reshape(value.shape) for name, value in inputs.items() if need[name]]


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _gate_weights(named: dict[str, Tensor]) -> GateWeights:
    return GateWeights(
        *(named["low_res_proj_weight"].flatten(1), named["low_res_proj_bias"]),
        *(named["high_res_proj_weight"].flatten(1), named["high_res_proj_bias"]),
        *(named["gate_in_weight"], named["gate_in_bias"]),
        *(named["gate_out_weight"], named["gate_out_bias"]),
    )


def _pointwise_gelu(
    high: Tensor, weight: Tensor, bias: Tensor, save: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(high · weightᵀ + bias) of tokens (B, N, C); GELU's input if `save`; sums over tokens if `sums`.

    The sums (B, P, C), float32, are partial, over P, and of the result before it is rounded.
    """
    output = torch.empty(*high.shape[:2], len(weight), dtype=high.dtype, device=high.device)
    pre_activation = torch.empty_like(output) if save else output.new_empty(0)
    partials = _product(
        high, weight.unsqueeze(0), output, "bias_gelu", bias=bias, pre=pre_activation, save=save, sums=sums
    )
    return output, pre_activation, partials


def _gelu_input_gradient(
    grad: Tensor, weight: Tensor, pre: Tensor, gate: Tensor | None, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(g·grad·weight + row / N) · GELU'(pre), for tokens `grad` (B, N, D) and weight (D, C), and its partial sums
    over tokens (B, P, C); gate (B,) and row (B, C) in float32 where there are any."""
    output = torch.empty_like(pre)
    partials = _product(
        grad, weight.T.unsqueeze(0), output, "gelu_backward", pre=pre, gate=gate, row=row, sums=True
    )
    return output, partials


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ of batches (B, M, K) and (B, N, K), one of which may have one matrix for all pictures."""
    images = max(len(a), len(b)) if len(a) and len(b) else 0
    output = torch.empty(images, a.shape[1], b.shape[1], dtype=a.dtype, device=a.device)
    _product(a, b, output, "none")
    return output


def _product(
    a: Tensor,
    b: Tensor,
    output: Tensor,
    epilogue: str,
    *,
    bias: Tensor | None = None,
    pre: Tensor | None = None,
    gate: Tensor | None = None,
    row: Tensor | None = None,
    save: bool = False,
    sums: bool = False,
) -> Tensor:
    """Write a · bᵀ with an epilogue to the contiguous `output` (B, M, N); partial sums (B, P, N) if `sums`."""
    images, rows, columns = output.shape
    depth, device, dtype = a.shape[2], a.device, a.dtype
    target = target_of(device)
    config = choose(PRODUCT, target, dtype, {"N": columns, "K": depth}, max(1, images * rows))
    blocks = dict(config.blocks)
    wants_descriptors = blocks.pop("DESCRIPTORS") == TMA
    row_tiles = triton.cdiv(rows, blocks["BLOCK_M"])
    partials = torch.empty(images, row_tiles if sums else 0, columns, dtype=torch.float32, device=device)
    (a_layout, a_align), (b_layout, b_align) = token_layout([a]), token_layout([b])
    launch_product(
        _product_kernel,
        images * row_tiles * triton.cdiv(columns, blocks["BLOCK_N"]),
        device,
        (
            *(a, b, output if bias is None else bias, output if pre is None else pre, output, partials),
            *(partials if gate is None else gate, partials if row is None else row),
            *(rows, columns, depth, images * row_tiles, row_tiles),
            *(_picture_stride(a), *a.stride()[1:], _picture_stride(b), *b.stride()[1:]),
            *(0 if row is None else row.stride(0), 1.0 / max(rows, 1)),
        ),
        A_LAYOUT=a_layout,
        B_LAYOUT=b_layout,
        A_ALIGN=a_align,
        B_ALIGN=b_align,
        OUT_ALIGN=token_layout([output])[1],
        EPILOGUE=epilogue,
        SAVE=save,
        SUMS=sums,
        GATE=gate is not None,
        ROW=row is not None,
        PIECE=_piece(config, target),
        PRECISION=dot_precision(dtype, target),
        USE_DESCRIPTORS=wants_descriptors and _describable(target, a, b),
        **blocks,
        **_register_limit(target, dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partials


def _dual_product(
    low: Tensor,
    f: Tensor,
    s: Tensor,
    named: dict[str, Tensor],
    variant: str,
    gate: tuple[Tensor | int, ...] | None,
) -> Tensor:
    """low + f·W_lowᵀ + b_low and g·(s·W_highᵀ + b_high), added or side by side by `variant`."""
    (images, tokens, low_dim), high_dim = low.shape, s.shape[2]
    side_by_side = variant != "gate_sum"
    out = torch.empty(images, tokens, (1 + side_by_side) * low_dim, dtype=low.dtype, device=low.device)
    low_weight, high_weight = (
        named[f"{name}_res_proj_weight"].flatten(1).unsqueeze(0) for name in ("low", "high")
    )
    target = target_of(low.device)
    sizes = {"D": low_dim, "C": high_dim, "OUT": out.shape[2]}
    config = choose(DUAL, target, low.dtype, sizes, max(1, images * tokens))
    blocks = dict(config.blocks)
    wants_descriptors = blocks.pop("DESCRIPTORS") == TMA
    row_tiles = triton.cdiv(tokens, blocks["BLOCK_M"])
    (token_kind, token_align), (weight_kind, weight_align) = (
        token_layout([f, s]),
        token_layout([low_weight, high_weight]),
    )
    low_kind, low_align = token_layout([low, out])
    launch_product(
        _dual_product_kernel,
        images * row_tiles * (1 + side_by_side) * triton.cdiv(low_dim, blocks["BLOCK_N"]),
        low.device,
        (
            *(s, high_weight, named["high_res_proj_bias"].contiguous()),
            *(f, low_weight, named["low_res_proj_bias"].contiguous(), low, out),
            *((f, f, f, 0) if gate is None else gate),
            *(tokens, low_dim, high_dim, images * row_tiles, row_tiles),
            *(*high_weight.stride()[1:], *low_weight.stride()[1:], *low.stride()),
        ),
        TOKEN_LAYOUT=token_kind,
        TOKEN_ALIGN=token_align,
        WEIGHT_LAYOUT=weight_kind,
        WEIGHT_ALIGN=weight_align,
        ADJACENT=low_kind == "row",
        OUT_ALIGN=low_align if low_kind == "row" else 1,
        SIDE_BY_SIDE=side_by_side,
        GATE=gate is not None,
        BLOCK_H=BLOCK_H,
        PIECE=_piece(config, target),
        PRECISION=dot_precision(low.dtype, target),
        USE_DESCRIPTORS=wants_descriptors and _describable(target, f, s, low_weight, high_weight),
        **blocks,
        **_register_limit(target, low.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _weight_gradient(
    grad: Tensor, x: Tensor, rows: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Σ_b grad_bᵀ·x_b + rows_bᵀ·means_b of tokens (B, N, M) and (B, N, K), in their dtype.

    `rows` (B, M) and `means` (B, K) in float32, both or none.
    """
    parts, _ = _weight_products(grad, x, final=rows is None)
    return _add_parts(parts, grad.dtype, rows, means)


def _weight_products(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    gate: tuple[Tensor | int, ...] | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """Σ_b g_b·grad_bᵀ·x_b in parts (P, M, K), and with a gate Σ <grad_bᵀ·x_b, weight> in parts (B, Q), float32.

    One part is in the dtype of `grad` if it is `final`, the result itself.
    """
    device, dtype = grad.device, grad.dtype
    if gate is None:
        grad, x = _joined(grad, x)
    (images, tokens, rows), columns = grad.shape, x.shape[2]
    target = target_of(device)
    sizes = {"M": rows, "N": columns, "GATED": int(gate is not None)}
    config = choose(WEIGHT, target, dtype, sizes, max(1, images * tokens))
    blocks = dict(config.blocks)
    wants_descriptors = blocks.pop("DESCRIPTORS") == TMA
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_N"])
    wanted = max(1, blocks.pop("WAVES") * target.multiprocessors // max(tiles, 1))
    steps = max(1, triton.cdiv(tokens, blocks["BLOCK_K"]))
    part_images, part_steps = max(1, triton.cdiv(images, wanted)), steps
    if images == 1 and gate is None:
        # A part of less than eight steps does not earn the tile of partial sums it writes.
        part_steps = triton.cdiv(steps, max(1, min(wanted, steps // 8)))
    depth_parts = triton.cdiv(steps, part_steps)
    count = max(1, triton.cdiv(images, part_images)) * depth_parts
    parts = torch.empty(
        *(count, rows, columns), dtype=dtype if final and count == 1 else torch.float32, device=device
    )
    dots = torch.empty(*(images, tiles if gate is not None else 0), dtype=torch.float32, device=device)
    a, b = grad.transpose(1, 2), x.transpose(1, 2)
    (a_layout, a_align), (b_layout, b_align) = token_layout([a]), token_layout([b])
    factor = parts[0] if weight is None else weight.contiguous()
    launch_product(
        _weight_product_kernel,
        tiles * count,
        device,
        (
            *(a, b, parts, dots, factor),
            *((grad, grad, grad, 0) if gate is None else gate),
            *(images, rows, columns, tokens, tiles, depth_parts, part_images),
            *(part_steps * blocks["BLOCK_K"], *a.stride(), *b.stride()),
        ),
        A_LAYOUT=a_layout,
        B_LAYOUT=b_layout,
        A_ALIGN=a_align,
        B_ALIGN=b_align,
        OUT_ALIGN=token_layout([parts, factor.unsqueeze(0)])[1],
        GATE=gate is not None,
        BLOCK_H=BLOCK_H,
        PIECE=_piece(config, target),
        PRECISION=dot_precision(dtype, target),
        USE_DESCRIPTORS=wants_descriptors and _describable(target, a, b),
        **blocks,
        **_register_limit(target, dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return parts, dots


def _joined(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """All pictures as one where their tokens follow each other in memory."""
    if len(grad) > 1 and all(one.stride(0) == one.shape[1] * one.stride(1) for one in (grad, x)):
        return grad.flatten(0, 1).unsqueeze(0), x.flatten(0, 1).unsqueeze(0)
    return grad, x


def _add_parts(
    parts: Tensor, dtype: torch.dtype, rows: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Σ_p parts[p] + Σ_b rows[b] ⊗ means[b], in `dtype`."""
    if len(parts) == 1 and rows is None:
        return parts[0]
    count, height, width = parts.shape
    output = torch.empty(height, width, dtype=dtype, device=parts.device)
    launch(
        _add_parts_kernel,
        triton.cdiv(height, BLOCK_ADD_M) * triton.cdiv(width, BLOCK_ADD_N),
        parts.device,
        (
            *(parts, parts if rows is None else rows, parts if means is None else means, output),
            *(count, height, width, 0 if rows is None else len(rows)),
            *(0 if rows is None else rows.stride(0), 0 if means is None else means.stride(0)),
        ),
        ALIGN=token_layout([output.unsqueeze(0), parts])[1],
        BLOCK_M=BLOCK_ADD_M,
        BLOCK_N=BLOCK_ADD_N,
        num_warps=4,
    )
    return output


def _projection_bias_gradients(
    grad_sums: Tensor,
    low_dim: int,
    gate: Tensor | None,
    row_low: Tensor | None,
    row_high: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Σ_b Σ_n G_low + row_low and Σ_b g·Σ_n G_high + row_high from the sums over tokens of G, (B, D or 2D)."""
    low, high = (torch.empty(low_dim, dtype=dtype, device=grad_sums.device) for _ in range(2))
    launch(
        _projection_bias_kernel,
        triton.cdiv(low_dim, BLOCK_BIAS),
        grad_sums.device,
        (
            *(grad_sums, grad_sums[:, -low_dim:]),
            *(grad_sums if value is None else value for value in (gate, row_low, row_high)),
            *(low, high, len(grad_sums), low_dim, grad_sums.stride(0)),
            0 if row_low is None else row_low.stride(0),
        ),
        GATE=gate is not None,
        BLOCK=BLOCK_BIAS,
        num_warps=1,
    )
    return {"low_res_proj_bias": low, "high_res_proj_bias": high}


def _picture_stride(batch: Tensor) -> int:
    """0 for a matrix that all pictures share."""
    return batch.stride(0) if len(batch) > 1 else 0


def _piece(config: Config, target: Target) -> int:
    """Columns of a tile that its epilogue takes at once."""
    return max(16, PIECE * config.num_warps * target.warp_size // dict(config.blocks)["BLOCK_M"])


def _register_limit(target: Target, dtype: torch.dtype) -> dict[str, int]:
    """Registers of a thread, where the assembler left alone spills a few of them to run more programs at once.

    IEEE products are no matrix instructions on NVIDIA: operands are unrolled over the depth in registers.
    """
    return {"maxnreg": 224} if target.backend == "cuda" and dtype == torch.float32 else {}


def _describable(target: Target, *batches: Tensor) -> bool:
    """Whether every picture's matrix can be read through a tensor descriptor."""
    return all(
        batch.numel() and token_layout([batch])[1] * batch.element_size() >= 16 for batch in batches
    ) and descriptors_fit(target, *([batch[0]] for batch in batches))


@triton.jit
def _finish_tile(
    accumulator,
    bias_ptr,
    pre_ptr,
    out_ptr,
    partial_ptr,
    row_ptr,
    row,
    column,
    rows,
    columns,
    scale,
    OUT_ALIGN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE: tl.constexpr,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The epilogue of a picture's tile at (row, column), PIECE columns at a time."""
    BLOCK_M: tl.constexpr = accumulator.shape[0]
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(accumulator)
        _finish_tile(
            *(left, bias_ptr, pre_ptr, out_ptr, partial_ptr, row_ptr, row, column, rows, columns, scale),
            *(OUT_ALIGN, EPILOGUE, SAVE, SUMS, ROW, PIECE),
        )
        _finish_tile(
            *(right, bias_ptr, pre_ptr, out_ptr, partial_ptr, row_ptr),
            *(row, column + BLOCK_N // 2, rows, columns, scale),
            *(OUT_ALIGN, EPILOGUE, SAVE, SUMS, ROW, PIECE),
        )
    else:
        n = column + tl.arange(0, BLOCK_N)
        offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, OUT_ALIGN)
        if EPILOGUE == "bias_gelu":
            accumulator = add_bias(accumulator, bias_ptr, column, columns)
            if SAVE:
                tl.store(pre_ptr + offsets, accumulator.to(pre_ptr.dtype.element_ty), mask=inside)
            accumulator = gelu(accumulator)
        if EPILOGUE == "gelu_backward":
            if ROW:
                constant = tl.load(row_ptr + n, mask=n < columns, other=0.0) * scale
                accumulator += constant[None, :]
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            accumulator *= gelu_derivative(pre)
        tl.store(out_ptr + offsets, accumulator.to(out_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            sums = tl.sum(tl.where(inside, accumulator, 0.0), axis=0)
            tl.store(partial_ptr + n, sums, mask=n < columns)


@triton.jit(
    do_not_specialize=[
        *("rows", "columns", "depth", "all_row_tiles", "row_tiles"),
        *(
            "stride_ab",
            "stride_am",
            "stride_ak",
            "stride_bb",
            "stride_bn",
            "stride_bk",
            "stride_row",
            "scale",
        ),
    ]
)
def _product_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    pre_ptr,
    out_ptr,
    partials_ptr,
    gate_ptr,
    row_ptr,
    rows,
    columns,
    depth,
    all_row_tiles,
    row_tiles,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bn,
    stride_bk,
    stride_row,
    scale,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE: tl.constexpr,
    SUMS: tl.constexpr,
    GATE: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of out_b = A_b · B_bᵀ and its epilogue; a tile has rows of one picture only.

    Bytes: A, B and out once where the L2 cache holds what neighbouring tiles share, and the input of GELU where
    it is saved or needed. FLOPs: 2·M·N·K a picture. The pointwise convolution at published sizes in bfloat16:
    1.8 MB read and 1.8 (3.5 with SAVE) written a picture beside 4.7 MB of weights, 2.7 GFLOP; on 4.3 TB/s and
    600 TFLOP/s a floor of 4.5, 36 and 145 µs for 1, 8 and 32 pictures, set by the FLOPs.
    """
    tile, column_tile = grouped_tile(tl.program_id(0), all_row_tiles, tl.cdiv(columns, BLOCK_N), GROUP)
    image = (tile // row_tiles).to(tl.int64)
    row = tile % row_tiles * BLOCK_M
    column = column_tile * BLOCK_N
    accumulator = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        a_ptr + image * multiple(stride_ab.to(tl.int64), A_ALIGN),
        b_ptr + image * multiple(stride_bb.to(tl.int64), B_ALIGN),
        *(row, column, rows, columns, depth, 0, depth),
        *(stride_am.to(tl.int64), stride_ak.to(tl.int64), stride_bn.to(tl.int64), stride_bk.to(tl.int64)),
        *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
    )
    if GATE:
        accumulator *= tl.load(gate_ptr + image)
    before = image * rows * multiple(columns, OUT_ALIGN)
    _finish_tile(
        accumulator,
        *(bias_ptr, pre_ptr + before, out_ptr + before, partials_ptr + tile.to(tl.int64) * columns),
        *(row_ptr + image * stride_row, row, column, rows, columns, scale),
        *(OUT_ALIGN, EPILOGUE, SAVE, SUMS, ROW, PIECE),
    )


@triton.jit
def _finish_dual_tile(
    accumulator,
    bias_ptr,
    low_ptr,
    out_ptr,
    row,
    column,
    rows,
    columns,
    low_columns,
    stride_n,
    stride_d,
    stride_out,
    PIECE: tl.constexpr,
):
    """Bias and residual, of the first `low_columns` columns alone, PIECE columns at a time."""
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(accumulator)
        _finish_dual_tile(
            *(left, bias_ptr, low_ptr, out_ptr, row, column, rows, columns, low_columns),
            *(stride_n, stride_d, stride_out, PIECE),
        )
        _finish_dual_tile(
            *(right, bias_ptr, low_ptr, out_ptr, row, column + BLOCK_N // 2, rows, columns, low_columns),
            *(stride_n, stride_d, stride_out, PIECE),
        )
    else:
        m = (row + tl.arange(0, accumulator.shape[0])).to(tl.int64)[:, None]
        n = column + tl.arange(0, BLOCK_N)[None, :]
        accumulator = add_bias(accumulator, bias_ptr, column, low_columns)
        inside = (m < rows) & (n < low_columns)
        low = tl.load(low_ptr + m * stride_n + n * stride_d, mask=inside, other=0.0)
        accumulator += low.to(tl.float32)
        inside = (m < rows) & (n < columns)
        tl.store(out_ptr + m * stride_out + n, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("gate_size", "tokens", "low_dim", "high_dim", "all_row_tiles", "row_tiles"),
        *("stride_hn", "stride_hk", "stride_ln", "stride_lk", "stride_b", "stride_n", "stride_d"),
    ]
)
def _dual_product_kernel(
    s_ptr,
    high_weight_ptr,
    high_bias_ptr,
    f_ptr,
    low_weight_ptr,
    low_bias_ptr,
    low_ptr,
    out_ptr,
    hidden_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    gate_size,
    tokens,
    low_dim,
    high_dim,
    all_row_tiles,
    row_tiles,
    stride_hn,
    stride_hk,
    stride_ln,
    stride_lk,
    stride_b,
    stride_n,
    stride_d,
    TOKEN_LAYOUT: tl.constexpr,
    TOKEN_ALIGN: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    ADJACENT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the output of one picture: g·(s·W_highᵀ + b_high), then + f·W_lowᵀ + b_low + low on top of it.

    SIDE_BY_SIDE a tile has one of the two summands, and the loop over the other has no steps.

    Bytes: s, f, low and the output once, 5.3 MB a picture in bfloat16 at published sizes, and 5.2 MB of weights;
    FLOPs: 2·N·D·(C + D), 3.0 GFLOP a picture. On 4.3 TB/s and 600 TFLOP/s a floor of 5.0, 40 and 161 µs for 1, 8
    and 32 pictures, set by the FLOPs.
    """
    column_tiles = tl.cdiv(low_dim, BLOCK_N)
    tile, column_tile = grouped_tile(
        tl.program_id(0), all_row_tiles, column_tiles * (1 + SIDE_BY_SIDE), GROUP
    )
    image = (tile // row_tiles).to(tl.int64)
    row = tile % row_tiles * BLOCK_M
    column = column_tile % column_tiles * BLOCK_N
    low_dim = multiple(low_dim, OUT_ALIGN)
    low_columns = low_dim
    high_columns = low_dim
    high_depth = high_dim
    low_depth = low_dim
    start = 0 * low_dim
    stride_out = low_dim.to(tl.int64)
    if SIDE_BY_SIDE:
        stride_out = low_dim.to(tl.int64) * 2
        is_high = column_tile >= column_tiles
        high_depth = tl.where(is_high, high_dim, 0)
        low_depth = tl.where(is_high, 0, low_dim)
        high_columns = tl.where(is_high, low_dim, 0)
        low_columns = multiple(tl.where(is_high, 0, low_dim), OUT_ALIGN)
        start = multiple(tl.where(is_high, low_dim, 0), OUT_ALIGN)
    accumulator = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        s_ptr + image * tokens * multiple(high_dim, TOKEN_ALIGN),
        high_weight_ptr,
        *(row, column, tokens, low_dim, high_dim, 0, high_depth),
        *(high_dim.to(tl.int64), 1, stride_hn.to(tl.int64), stride_hk.to(tl.int64)),
        *(TOKEN_LAYOUT, WEIGHT_LAYOUT, TOKEN_ALIGN, WEIGHT_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
    )
    accumulator = add_bias(accumulator, high_bias_ptr, column, high_columns)
    if GATE:
        accumulator *= gate_of(hidden_ptr, gate_weight_ptr, gate_bias_ptr, image, gate_size, BLOCK_H)
    accumulator = add_product(
        accumulator,
        f_ptr + image * tokens * multiple(low_dim, TOKEN_ALIGN),
        low_weight_ptr,
        *(row, column, tokens, low_dim, low_dim, 0, low_depth),
        *(low_dim.to(tl.int64), 1, stride_ln.to(tl.int64), stride_lk.to(tl.int64)),
        *(TOKEN_LAYOUT, WEIGHT_LAYOUT, TOKEN_ALIGN, WEIGHT_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
    )
    if ADJACENT:
        stride_d = 1
    _finish_dual_tile(
        *(accumulator, low_bias_ptr, low_ptr + image * multiple(stride_b.to(tl.int64), OUT_ALIGN)),
        *(out_ptr + image * tokens * stride_out + start, row, column, tokens, low_dim, low_columns),
        *(multiple(stride_n.to(tl.int64), OUT_ALIGN), stride_d, stride_out, PIECE),
    )


@triton.jit(
    do_not_specialize=[
        *("gate_size", "images", "rows", "columns", "depth", "tiles", "depth_parts"),
        *("part_images", "part_depth", "stride_ab", "stride_am", "stride_ak"),
        *("stride_bb", "stride_bn", "stride_bk"),
    ]
)
def _weight_product_kernel(
    a_ptr,
    b_ptr,
    parts_ptr,
    dots_ptr,
    factor_ptr,
    hidden_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    gate_size,
    images,
    rows,
    columns,
    depth,
    tiles,
    depth_parts,
    part_images,
    part_depth,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bn,
    stride_bk,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of one part of Σ_b g_b · A_b·B_bᵀ, A_b (M, N) and B_b (K, N) a picture's gradients and tokens.

    With GATE also <A_b·B_bᵀ, factor> over the tile, the share of the tile in dg_b.

    Bytes: the gradients and tokens once where the L2 cache holds what neighbouring tiles share, 4·P·M·K written;
    FLOPs: 2·N·M·K a picture. At published sizes 1.8 (high_res_proj), 1.2 (low_res_proj) and 2.7 GFLOP
    (high_res_conv) a picture, at 600 TFLOP/s 3.0, 2.0 and 4.5 µs.
    """
    part = tl.program_id(0) // tiles
    row_tile, column_tile = grouped_tile(
        tl.program_id(0) % tiles, tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP
    )
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    first = part % depth_parts * part_depth
    last = tl.minimum(first + part_depth, depth)
    first_image = part // depth_parts * part_images
    stride_ab = multiple(stride_ab.to(tl.int64), A_ALIGN)
    stride_bb = multiple(stride_bb.to(tl.int64), B_ALIGN)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for image in range(first_image, tl.minimum(first_image + part_images, images)):
        picture = tl.cast(image, tl.int64)
        if GATE:
            one = add_product(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                *(a_ptr + picture * stride_ab, b_ptr + picture * stride_bb),
                *(row, column, rows, columns, depth, first, last),
                *(stride_am.to(tl.int64), stride_ak.to(tl.int64)),
                *(stride_bn.to(tl.int64), stride_bk.to(tl.int64)),
                *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
            )
            gate = gate_of(hidden_ptr, gate_weight_ptr, gate_bias_ptr, image, gate_size, BLOCK_H)
            accumulator += gate * one
            dot = _inner_product(one, factor_ptr, row, column, rows, columns, OUT_ALIGN, PIECE)
            tl.store(dots_ptr + picture * tiles + tl.program_id(0) % tiles, dot)
        else:
            accumulator = add_product(
                accumulator,
                *(a_ptr + picture * stride_ab, b_ptr + picture * stride_bb),
                *(row, column, rows, columns, depth, first, last),
                *(stride_am.to(tl.int64), stride_ak.to(tl.int64)),
                *(stride_bn.to(tl.int64), stride_bk.to(tl.int64)),
                *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
            )
    out_ptr = parts_ptr + part.to(tl.int64) * rows * multiple(columns, OUT_ALIGN)
    offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, OUT_ALIGN)
    tl.store(out_ptr + offsets, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _inner_product(
    tile, factor_ptr, row, column, rows, columns, OUT_ALIGN: tl.constexpr, PIECE: tl.constexpr
):
    """<tile, factor> over the tile at (row, column) of the contiguous (rows, columns) factor."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(tile)
        first = _inner_product(left, factor_ptr, row, column, rows, columns, OUT_ALIGN, PIECE)
        second = _inner_product(
            right, factor_ptr, row, column + BLOCK_N // 2, rows, columns, OUT_ALIGN, PIECE
        )
        return first + second
    else:
        offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, OUT_ALIGN)
        factor = tl.load(factor_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        return tl.sum(tile * factor)


@triton.jit(do_not_specialize=["count", "height", "width", "images", "stride_rows", "stride_means"])
def _add_parts_kernel(
    parts_ptr,
    rows_ptr,
    means_ptr,
    out_ptr,
    count,
    height,
    width,
    images,
    stride_rows,
    stride_means,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of Σ_p parts[p] + Σ_b rows[b] ⊗ means[b]. Bytes: 4·P·M·N read, M·N·itemsize written."""
    width = multiple(width, ALIGN)
    across = tl.cdiv(width, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < height) & (n[None, :] < width)
    offsets = m[:, None].to(tl.int64) * width + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part_ptr = parts_ptr + offsets
    for _ in range(count):
        total += tl.load(part_ptr, mask=inside, other=0.0)
        part_ptr += height.to(tl.int64) * width
    for image in range(images):
        row = tl.load(rows_ptr + image * stride_rows + m, mask=m < height, other=0.0)
        mean = tl.load(means_ptr + image * stride_means + n, mask=n < width, other=0.0)
        total += row[:, None] * mean[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "low_dim", "stride_sums", "stride_row"])
def _projection_bias_kernel(
    low_sums_ptr,
    high_sums_ptr,
    gate_ptr,
    low_row_ptr,
    high_row_ptr,
    low_ptr,
    high_ptr,
    images,
    low_dim,
    stride_sums,
    stride_row,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_b low_sums[b] + low_row[b] and Σ_b g_b·high_sums[b] + high_row[b]. Bytes: 16·D a picture."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < low_dim
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for image in range(images):
        low += tl.load(low_sums_ptr + image * stride_sums + d, mask=inside, other=0.0)
        sums = tl.load(high_sums_ptr + image * stride_sums + d, mask=inside, other=0.0)
        if GATE:
            low += tl.load(low_row_ptr + image * stride_row + d, mask=inside, other=0.0)
            sums = sums * tl.load(gate_ptr + image)
            sums += tl.load(high_row_ptr + image * stride_row + d, mask=inside, other=0.0)
        high += sums
    tl.store(low_ptr + d, low.to(low_ptr.dtype.element_ty), mask=inside)
    tl.store(high_ptr + d, high.to(high_ptr.dtype.element_ty), mask=inside)


def _product_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return _config(*_blocks(target, dtype, count * sizes["N"]))


def _dual_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return _config(*_blocks(target, dtype, count * sizes["OUT"]))


def _blocks(target: Target, dtype: torch.dtype, elements: int) -> tuple[int, ...]:
    """Tiles as large as leave enough of them for every multiprocessor."""
    if target.backend == "interpreter":
        return 32, 64, 32, 2, POINTERS, 4, 1
    if dtype.itemsize == 4:
        return 128, 64, 16, 8, POINTERS, 8, 3
    if target.backend == "hip":
        return 128, 128, 64, 8, POINTERS, 4, 2
    if elements // (128 * 128) < 2 * target.multiprocessors:
        return 64, 128, 64 if target.capability >= 90 else 32, 8, POINTERS, 8, 4
    return 128, 128, 64, 8, POINTERS, 8, 4 if target.capability >= 90 else 3


def _weight_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _weight_config(64, 64, 64, 2, POINTERS, 1, 4, 1)
    if dtype.itemsize == 4:
        return _weight_config(*(64, 32) if sizes["GATED"] else (128, 64), 16, 8, POINTERS, 2, 8, 3)
    if target.backend == "hip":
        return _weight_config(128, 64, 64, 8, POINTERS, 1, 4, 2)
    return _weight_config(128, 64 if sizes["GATED"] else 128, 64, 8, POINTERS, 1, 8, 3)


def _config(*numbers: int) -> Config:
    """Rows, columns and depth of a tile, rows of tiles in a group, POINTERS or TMA; warps, stages."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "DESCRIPTORS")
    return Config(tuple(zip(names, numbers[:5], strict=True)), *numbers[5:])


def _weight_config(*numbers: int) -> Config:
    """As of `_config`, and between POINTERS or TMA and warps the programs of a multiprocessor that are wanted."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "DESCRIPTORS", "WAVES")
    return Config(tuple(zip(names, numbers[:6], strict=True)), *numbers[6:])


def _product_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    copies = (POINTERS, TMA) if target.capability >= 90 else (POINTERS,)
    if dtype.itemsize == 4:
        tiles = product((32, 64, 128), (32, 64), (16, 32), (8,))
    else:
        tiles = product((64, 128), (64, 128, 256), (32, 64), (8,))
    return (_config(*tile, *rest) for tile, *rest in product(tiles, copies, (4, 8), (2, 3, 4)))


def _weight_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    for config in _product_candidates(target, dtype, sizes, count):
        for waves in (1, 2):
            blocks = (*config.blocks, ("WAVES", waves))
            yield Config(blocks, config.num_warps, config.num_stages)


def _shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Tiles of both operands for every stage."""
    blocks = dict(config.blocks)
    across = blocks["BLOCK_M"] + blocks["BLOCK_N"]
    return config.num_stages * across * blocks["BLOCK_K"] * dtype.itemsize


PRODUCT = Space("conv_gate_product", _product_heuristic, _product_candidates, _shared_memory)
DUAL = Space("conv_gate_dual_product", _dual_heuristic, _product_candidates, _shared_memory)
WEIGHT = Space("conv_gate_weight_gradient", _weight_heuristic, _weight_candidates, _shared_memory)
