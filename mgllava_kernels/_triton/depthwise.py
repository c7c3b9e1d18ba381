"""Depthwise 7x7 convolution of tokens and GELU, forward and backward, without a transposed copy.

Channels lie across lanes; a thread computes ROWS outputs below each other from the ROWS + 6 inputs of a column,
so that an input is read 7·(ROWS + 6)/ROWS times, from the L1 cache, instead of 49 times. The convolution reads
its taps side by side for neighbouring channels, (49, D); of a weight (D, 1, 7, 7) as it is, every tap of every
channel would be a load of its own in every program, several times the loads that there are. Laying them out is a
launch, or the side job of a product that precedes the convolution. Every sum has one fixed order.
"""

# ruff: noqa: RUF005 — Triton compiles no starred elements

from collections.abc import Iterable, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import Target, half, launch, multiple, odd, target_of
from mgllava_kernels._triton.matmul import gelu, matrix_layout
from mgllava_kernels._triton.products import Side, run
from mgllava_kernels._triton.tokens import GeluGradient, gelu_gradients
from mgllava_kernels.configs import Config, Sizes, Space, choose

TAPS = 49
# Channels of a program that lays out taps or sums their gradients, and parts that it adds at a time.
BLOCK_TAPS_D = tl.constexpr(32)
BLOCK_SUMS_D = 8


def depthwise_conv_gelu(
    tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, save: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    taps = lay_out_taps(weight)
    output, pre_activation, _ = convolve_gelu(tokens, taps, bias, height, width, save, sums=False)
    return output, pre_activation


def depthwise_conv_gelu_backward(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    pre_activation: Tensor,
    height: int,
    width: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Arguments and results as of the function of this name in `mgllava_kernels._torch.conv_gate`."""
    grad_pre = torch.empty_like(pre_activation)
    gelu_gradients([GeluGradient(grad.contiguous(), pre_activation, grad_pre)])
    grads = []
    if needed[0]:
        grads.append(convolve_transposed(grad_pre, lay_out_taps(weight), height, width))
    if needed[1] or needed[2]:
        by_parameter = convolution_parameter_gradients(grad_pre, tokens, weight, height, width)
        grads += [value for value, need in zip(by_parameter, needed[1:], strict=True) if need]
    return grads


def convolve_gelu(
    tokens: Tensor, taps: Tensor, bias: Tensor, height: int, width: int, save: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(convolution + bias) of tokens (B, N, D) with any strides; its input if `save`; partial sums if `sums`.

    Partial sums are (B, P, 2D) in float32: summed over P they are the sums over tokens of the input and of the
    result before it is rounded.
    """
    images, _, channels = tokens.shape
    device = tokens.device
    output = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
    pre_activation = torch.empty_like(output) if save else output.new_empty(0)
    config = _config(tokens, height, width)
    tiles = _tiles(config, height, width)
    partials = torch.empty(images, tiles if sums else 0, 2 * channels, dtype=torch.float32, device=device)
    layout, align = matrix_layout([tokens])
    launch(
        _convolution_kernel,
        images * tiles * triton.cdiv(channels, dict(config.blocks)["BLOCK_D"]),
        device,
        (
            *(tokens, taps, bias.contiguous(), output, pre_activation, partials),
            *(height, width, channels, tiles, *tokens.stride()),
        ),
        ADJACENT=layout == "row",
        ALIGN=align if layout == "row" else 1,
        SAVE=save,
        SUMS=sums,
        **config.options,
    )
    return output, pre_activation, partials


def convolve_transposed(
    grad: Tensor,
    taps: Tensor,
    height: int,
    width: int,
    direct: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Gradient of the convolution's input from that of its result, contiguous (B, N, D).

    Added to it are `direct`, (B, N, D) of any strides, and rows[b] · (1 / N), (B, D) in float32 with adjacent
    columns, where given.
    """
    images, count, channels = grad.shape
    output = torch.empty_like(grad)
    config = _config(grad, height, width)
    tiles = _tiles(config, height, width)
    other = grad if direct is None else direct
    layout, align = matrix_layout([grad, other])
    launch(
        _transposed_convolution_kernel,
        images * tiles * triton.cdiv(channels, dict(config.blocks)["BLOCK_D"]),
        grad.device,
        (
            *(grad, taps, output, other, grad if rows is None else rows),
            *(height, width, channels, tiles, *other.stride(), 0 if rows is None else rows.stride(0)),
            1.0 / max(count, 1),
        ),
        ADJACENT=layout == "row",
        ALIGN=align if layout == "row" else 1,
        DIRECT=direct is not None,
        CONSTANT=rows is not None,
        **config.options,
    )
    return output


def convolution_parameter_gradients(
    grad: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's weight (D, 1, 7, 7) and bias from that of its result, contiguous (B, N, D)."""
    images, _, channels = tokens.shape
    device, target = tokens.device, target_of(tokens.device)
    config = choose(WEIGHT, target, tokens.dtype, _sizes(tokens, height, width), max(images, 1))
    blocks = dict(config.blocks)
    waves = blocks.pop("WAVES")
    tiles = images * _tiles(config, height, width)
    across = triton.cdiv(channels, blocks["BLOCK_D"])
    parts = min(max(1, tiles), max(1, waves * target.multiprocessors // max(across, 1)))
    partials = torch.empty(parts, TAPS + 1, channels, dtype=torch.float32, device=device)
    layout, align = matrix_layout([tokens])
    launch(
        _weight_gradient_kernel,
        parts * across,
        device,
        (
            *(grad, tokens, partials, height, width, channels, tiles // max(images, 1), tiles),
            *(triton.cdiv(tiles, parts), *tokens.stride()),
        ),
        ADJACENT=layout == "row",
        ALIGN=align if layout == "row" else 1,
        **blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    grad_bias = torch.empty(channels, dtype=weight.dtype, device=device)
    launch(
        _add_taps_kernel,
        triton.cdiv(channels, BLOCK_SUMS_D),
        device,
        (partials, grad_weight, grad_bias, channels, parts),
        BLOCK_D=BLOCK_SUMS_D,
        num_warps=4,
    )
    return grad_weight, grad_bias


def lay_out_taps(weight: Tensor) -> Tensor:
    """Weights (D, 1, 7, 7) of any strides as (49, D)."""
    taps, side = taps_and_job(weight)
    run(side, weight.device)
    return taps


def taps_and_job(weight: Tensor) -> tuple[Tensor, Side]:
    """What `lay_out_taps` returns, still empty, and the job that fills it."""
    channels = weight.shape[0]
    taps = torch.empty(TAPS, channels, dtype=weight.dtype, device=weight.device)
    arguments = weight, taps, odd(channels, weight.stride(0), weight.stride(2), weight.stride(3))
    return taps, Side(_lay_out_taps, triton.cdiv(channels, BLOCK_TAPS_D.value), arguments)


def _sizes(tokens: Tensor, height: int, width: int) -> Sizes:
    return {"D": tokens.shape[2], "H": height, "W": width}


def _config(tokens: Tensor, height: int, width: int) -> Config:
    sizes = _sizes(tokens, height, width)
    return choose(CONVOLUTION, target_of(tokens.device), tokens.dtype, sizes, max(tokens.shape[0], 1))


def _tiles(config: Config, height: int, width: int) -> int:
    """Programs of one picture that compute the same channels."""
    blocks = dict(config.blocks)
    return triton.cdiv(triton.cdiv(height, blocks["ROWS"]) * width, blocks["BLOCK_Q"])


@triton.jit
def _lay_out_taps(program, arguments):
    """Bytes: 49·D read and written, 0.2 MB at the published size."""
    weight_ptr, taps_ptr, numbers = arguments
    channels = half(numbers[0])
    channel = program * BLOCK_TAPS_D + tl.arange(0, BLOCK_TAPS_D)
    tap = tl.arange(0, 64)
    weight = weight_ptr + channel[:, None].to(tl.int64) * half(numbers[1])
    weight += tap[None, :] // 7 * half(numbers[2]) + tap[None, :] % 7 * half(numbers[3])
    inside = (channel[:, None] < channels) & (tap[None, :] < 49)
    values = tl.load(weight, mask=inside, other=0.0)
    tl.store(taps_ptr + tap[None, :] * channels + channel[:, None], values, mask=inside)


@triton.jit(do_not_specialize=["channels", "parts"])
def _add_taps_kernel(partials_ptr, weight_ptr, bias_ptr, channels, parts, BLOCK_D: tl.constexpr):
    """Sums over parts (P, 50, D) as gradients (D, 1, 7, 7) and, of the last rows, (D,).

    Bytes: 200·P·D read, most of them from the cache.
    """
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = tl.arange(0, 64)
    present = channel[:, None] < channels
    total = tl.zeros((BLOCK_D, 64), tl.float32)
    partial = partials_ptr + tap[None, :] * channels + channel[:, None]
    for _ in tl.range(0, parts, loop_unroll_factor=4):
        total += tl.load(partial, mask=present & (tap[None, :] < 50), other=0.0)
        partial += 50 * channels
    values = total.to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + channel[:, None] * 49 + tap[None, :], values, mask=present & (tap[None, :] < 49))
    tl.store(bias_ptr + channel[:, None] + 0 * tap[None, :], values, mask=present & (tap[None, :] == 49))


@triton.jit
def _convolve(
    image_ptr,
    taps_ptr,
    top,
    x,
    channel,
    height,
    width,
    channels,
    stride_n,
    stride_d,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The convolution at rows top, ..., top + ROWS - 1 of columns x: a tuple of ROWS tiles in float32.

    TURNED turns the taps around, which makes it the transposed convolution.
    """
    present = channel[None, :] < channels
    tap_ptr = taps_ptr + channel[None, :]
    step = width.to(tl.int64) * stride_n
    sums = (tl.zeros((x.shape[0], channel.shape[0]), tl.float32),) * ROWS
    for across in range(7):
        column = x + across - 3
        inside = (column >= 0) & (column < width)
        taps: tl.tuple = ()
        for down in tl.static_range(7):
            tap = 48 - 7 * down - across if TURNED else 7 * down + across
            taps = taps + (tl.load(tap_ptr + tap * channels, mask=present, other=0.0).to(tl.float32),)
        first = ((top - 3) * width + column).to(tl.int64)
        at = image_ptr + first[:, None] * stride_n + channel[None, :] * stride_d
        for i in tl.static_range(ROWS + 6):
            here = inside & (top >= 3 - i) & (top < height + (3 - i))
            values = tl.load(at, mask=here[:, None] & present, other=0.0).to(tl.float32)
            at += step
            added: tl.tuple = ()
            for r in tl.static_range(ROWS):
                if i >= r and i < r + 7:
                    added = added + (sums[r] + values * taps[i - r],)
                else:
                    added = added + (sums[r],)
            sums = added
    return sums


@triton.jit(do_not_specialize=["height", "width", "channels", "tiles", "stride_b", "stride_n", "stride_d"])
def _convolution_kernel(
    tokens_ptr,
    taps_ptr,
    bias_ptr,
    out_ptr,
    pre_ptr,
    partials_ptr,
    height,
    width,
    channels,
    tiles,
    stride_b,
    stride_n,
    stride_d,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    SAVE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS outputs below each other in BLOCK_Q columns of one picture's strips, BLOCK_D channels.

    Bytes: the input and the output once, with SAVE the input of GELU too; in bfloat16 at 24x24 tokens of 1,024
    channels 2.4 (3.5 with SAVE) MB a picture, 0.55 (0.82) µs at 4.3 TB/s. FLOPs: 98 for each output, 58 MFLOP a
    picture, 0.9 µs at 67 TFLOP/s of float32: 0.9, 6.9 and 28 µs for 1, 8 and 32 pictures, set by the FMAs.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    tile = tl.program_id(0) // blocks
    image = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    top = place // width * ROWS
    x = place % width
    channels = multiple(channels, ALIGN)
    if ADJACENT:
        stride_d = 1
    else:
        stride_d = stride_d.to(tl.int64)
    stride_n = multiple(stride_n.to(tl.int64), ALIGN)
    image_ptr = tokens_ptr + image * multiple(stride_b.to(tl.int64), ALIGN)
    sums = _convolve(
        image_ptr, taps_ptr, top, x, channel, height, width, channels, stride_n, stride_d, False, ROWS
    )
    present = channel < channels
    bias = tl.load(bias_ptr + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    input_sum = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    output_sum = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for r in tl.static_range(ROWS):
        token = (top + r) * width + x
        inside = (top + r < height)[:, None] & present[None, :]
        pre = sums[r] + bias
        values = gelu(pre)
        at = (image * height * width + token[:, None]) * channels + channel[None, :]
        tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)
        if SAVE:
            tl.store(pre_ptr + at, pre.to(pre_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            low = image_ptr + token[:, None].to(tl.int64) * stride_n + channel[None, :] * stride_d
            input_sum += tl.load(low, mask=inside, other=0.0).to(tl.float32)
            output_sum += tl.where(inside, values, 0.0)
    if SUMS:
        partial = partials_ptr + (image * tiles + tile) * 2 * channels + channel
        tl.store(partial, tl.sum(input_sum, axis=0), mask=present)
        tl.store(partial + channels, tl.sum(output_sum, axis=0), mask=present)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "tiles"),
        *("stride_b", "stride_n", "stride_d", "stride_rows", "scale"),
    ]
)
def _transposed_convolution_kernel(
    grad_ptr,
    taps_ptr,
    out_ptr,
    direct_ptr,
    rows_ptr,
    height,
    width,
    channels,
    tiles,
    stride_b,
    stride_n,
    stride_d,
    stride_rows,
    scale,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    DIRECT: tl.constexpr,
    CONSTANT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of the input, tiled as the output of the forward pass; `stride_*` are those of `direct`.

    Bytes: the gradient in and out once, and `direct` with DIRECT, 2.4 (3.5) MB a picture in bfloat16 at the
    published size; FLOPs and floor as of the forward pass.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    tile = tl.program_id(0) // blocks
    image = (tile // tiles).to(tl.int64)
    tile = tile % tiles
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    top = place // width * ROWS
    x = place % width
    channels = multiple(channels, ALIGN)
    if ADJACENT:
        stride_d = 1
    else:
        stride_d = stride_d.to(tl.int64)
    stride_n = multiple(stride_n.to(tl.int64), ALIGN)
    image_ptr = grad_ptr + image * height * width * channels
    sums = _convolve(
        image_ptr, taps_ptr, top, x, channel, height, width, channels, channels.to(tl.int64), 1, True, ROWS
    )
    present = channel < channels
    constant = tl.zeros((BLOCK_D,), tl.float32)
    if CONSTANT:
        constant += tl.load(rows_ptr + image * stride_rows + channel, mask=present, other=0.0) * scale
    for r in tl.static_range(ROWS):
        token = (top + r) * width + x
        inside = (top + r < height)[:, None] & present[None, :]
        values = sums[r] + constant[None, :]
        if DIRECT:
            direct = direct_ptr + image * multiple(stride_b.to(tl.int64), ALIGN)
            direct += token[:, None].to(tl.int64) * stride_n + channel[None, :] * stride_d
            values += tl.load(direct, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + (image * height * width + token[:, None]) * channels + channel[None, :]
        tl.store(out, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "channels", "image_tiles", "tiles", "part_tiles"),
        *("stride_b", "stride_n", "stride_d"),
    ]
)
def _weight_gradient_kernel(
    grad_ptr,
    tokens_ptr,
    partials_ptr,
    height,
    width,
    channels,
    image_tiles,
    tiles,
    part_tiles,
    stride_b,
    stride_n,
    stride_d,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Partial gradients of 49 taps and the bias for BLOCK_D channels, over `part_tiles` tiles of tokens.

    The tiles are gone through for each of the 7 columns of taps: 7 sums fit into registers, 49 do not. The
    input comes from the L1 cache from the second time on, if the share of a program fits there.

    Bytes: the input and the gradient once, 2.4 MB a picture in bfloat16 at the published size; FLOPs: 98 for each
    token and channel, 58 MFLOP a picture: 0.9, 6.9 and 28 µs for 1, 8 and 32 pictures, set by the FMAs.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    part = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = multiple(channels, ALIGN)
    present = channel < channels
    if ADJACENT:
        stride_d = 1
    else:
        stride_d = stride_d.to(tl.int64)
    stride_b = multiple(stride_b.to(tl.int64), ALIGN)
    stride_n = multiple(stride_n.to(tl.int64), ALIGN)
    partial = partials_ptr + part.to(tl.int64) * 50 * channels + channel
    for across in range(7):
        sums = (tl.zeros((BLOCK_Q, BLOCK_D), tl.float32),) * 7
        bias_sum = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, tiles)):
            image = tl.cast(tile // image_tiles, tl.int64)
            place = tile % image_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
            top = place // width * ROWS
            x = place % width
            column = x + across - 3
            inside = (column >= 0) & (column < width)
            grad_image = grad_ptr + image * height * width * channels + channel[None, :]
            token_image = tokens_ptr + image * stride_b + channel[None, :] * stride_d
            grads: tl.tuple = ()
            for r in tl.static_range(ROWS):
                at = grad_image + ((top + r) * width + x).to(tl.int64)[:, None] * channels
                here = (top + r < height)[:, None] & present[None, :]
                grads = grads + (tl.load(at, mask=here, other=0.0).to(tl.float32),)
                bias_sum += grads[r]
            first = ((top - 3) * width + column).to(tl.int64)
            at = token_image + first[:, None] * stride_n
            for i in tl.static_range(ROWS + 6):
                here = inside & (top >= 3 - i) & (top < height + (3 - i))
                values = tl.load(at, mask=here[:, None] & present[None, :], other=0.0).to(tl.float32)
                at += width.to(tl.int64) * stride_n
                added: tl.tuple = ()
                for down in tl.static_range(7):
                    if i >= down and i < down + ROWS:
                        added = added + (sums[down] + values * grads[i - down],)
                    else:
                        added = added + (sums[down],)
                sums = added
        for down in tl.static_range(7):
            tl.store(partial + (7 * down + across) * channels, tl.sum(sums[down], axis=0), mask=present)
        tl.store(partial + 49 * channels, tl.sum(bias_sum, axis=0), mask=present)


def _convolution_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _convolution_config(16, 32, 2, 4)
    if _scattered(dtype, sizes):
        return _convolution_config(8, 32, 2, 4)
    columns = 16 if target.backend == "hip" else 8 * dtype.itemsize
    return _convolution_config(columns, 128 // dtype.itemsize, 4, 128 // target.warp_size)


def _weight_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    if target.backend == "interpreter":
        return _weight_config(16, 32, 2, 1, 4)
    if _scattered(dtype, sizes):
        return _weight_config(8, 32, 4, 4, 4)
    return _weight_config(16, 128 // dtype.itemsize, 4, 4, 128 // target.warp_size)


def _scattered(dtype: torch.dtype, sizes: Sizes) -> bool:
    """Whether each element has an address and a mask of its own, so that wider tiles spill."""
    return sizes["D"] * dtype.itemsize % 16 != 0


def _convolution_config(block_q: int, block_d: int, rows: int, warps: int) -> Config:
    """Columns and channels of a program, rows of a strip; warps."""
    return Config((("BLOCK_Q", block_q), ("BLOCK_D", block_d), ("ROWS", rows)), warps, 1)


def _weight_config(block_q: int, block_d: int, rows: int, waves: int, warps: int) -> Config:
    """Columns and channels that a program sums at once, rows of a strip, programs a multiprocessor; warps."""
    blocks = (("BLOCK_Q", block_q), ("BLOCK_D", block_d), ("ROWS", rows), ("WAVES", waves))
    return Config(blocks, warps, 1)


def _convolution_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    choices = (8, 16), (64 // dtype.itemsize, 128 // dtype.itemsize), (4, 6), (2, 4)
    return (_convolution_config(*choice) for choice in product(*choices))


def _weight_candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    choices = (8, 16), (64 // dtype.itemsize, 128 // dtype.itemsize), (4,), (2, 4), (2, 4)
    return (_weight_config(*choice) for choice in product(*choices))


def _shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Sums over columns meet there."""
    blocks = dict(config.blocks)
    return 4 * config.num_warps * blocks["BLOCK_D"]


CONVOLUTION = Space("depthwise_convolution", _convolution_heuristic, _convolution_candidates, _shared_memory)
WEIGHT = Space("depthwise_weight_gradient", _weight_heuristic, _weight_candidates, _shared_memory)
