"""Projector layers of several token sets, forward and backward: every layer is one launch for all sets (on AMD
one for each).

The forward pass is two launches, H = GELU(X·W1ᵀ + b1) and H·W2ᵀ + b2. The backward pass, with G the incoming
gradient and P the input of the GELU, is

    column sums of G                              for b2
    D = (G·W2) ∘ GELU'(P), sums of D, GELU(P)     for b1; H is written again here, not kept since the forward pass
    Gᵀ·H and Dᵀ·X, of both layers in one launch   for W2 and W1
    D·W1                                          for X

and a launch that adds up what programs summed in parts. Every sum has one fixed order.

Bytes and FLOPs in bfloat16, of a projector K → 4096 → 4096 on T tokens: forward 2·T·4096·(K + 4096) FLOPs on
weights of 8192·(K + 4096) bytes and tokens of 2·T·(K + 3·4096), and 2·4096·T more where P is kept; backward
with all gradients twice the FLOPs. On 600 TFLOP/s and 4.3 TB/s that is, forward,

    tokens    1024→4096→4096                       2880→4096→4096
       576     24 GFLOP,  57 MB:   40 µs (FLOPs)    33 GFLOP,  75 MB:   55 µs (FLOPs)
     4,608    193 GFLOP, 165 MB:  322 µs (FLOPs)   263 GFLOP, 197 MB:  439 µs (FLOPs)
    18,432    773 GFLOP, 533 MB: 1288 µs (FLOPs)  1053 GFLOP, 616 MB: 1756 µs (FLOPs)

and the 100 objects of a picture, 2880→4096→4096, are 5.7 GFLOP on 60 MB: 14 µs, set by the bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mgllava_kernels._triton.launch import Target, half, launch, multiple, odd, target_of
from mgllava_kernels._triton.matmul import (
    add_bias,
    add_product,
    descriptors_fit,
    gelu,
    gelu_derivative,
    grouped_tile,
    halves,
    launch_product,
    matrix_layout,
    tile_offsets,
)
from mgllava_kernels._triton.precision import dot_precision
from mgllava_kernels.configs import Config, Sizes, Space, choose

# Values of a config's ROUTE: this file's kernel, or torch's own matrix products where a table says they win.
TRITON, TORCH = 1, 2
# Values of a config's DESCRIPTORS.
POINTERS, TMA = 1, 2
# The value of a config's PROGRAMS that leaves every tile to a program of its own.
ONE_A_TILE = 1 << 16
# Rows whose column sums one program makes, and the rows and columns it holds at a time.
SUM_ROWS, BLOCK_ROWS, BLOCK_COLUMNS = 128, 32, 128
# Elements a thread takes through GELU at a time, by backend: of twice as many registers spill.
PIECES = {"cuda": 32, "hip": 16, "interpreter": 32}


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """GELU(x · weightᵀ + bias), and with `save` what the GELU was applied to, else an empty tensor."""
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    pre_activation = torch.empty_like(output) if save else x.new_empty(0)
    second = _rows(pre_activation) if save else None
    _multiply(LINEAR, "bias_gelu", [_Product(_rows(x), weight, _rows(output), bias=bias, second=second)])
    return output, pre_activation


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre_activation: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    need_x, need_weight, need_bias = needed
    flat = _rows(x)
    grad_pre = x.new_empty(len(flat), weight.shape[0])
    sums = _column_sums([_rows(grad).contiguous()], [_rows(pre_activation).contiguous()], [grad_pre])
    results = []
    if need_x:
        results.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        _multiply(INPUT_GRADIENT, "none", [_Product(grad_pre, weight.T, _rows(results[-1]))])
    if need_weight:
        results.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
        _multiply(WEIGHT_GRADIENT, "none", [_Product(grad_pre.T, flat.T, results[-1])])
    if need_bias:
        results.append(x.new_empty(weight.shape[0]))
        _add_parts([(sums[0], results[-1])])
    return results


def grouped_mlp_projector(
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    b1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    b2s: Sequence[Tensor],
    save: bool,
) -> list[Tensor]:
    """The outputs of all groups, then (with `save`) the inputs of their GELUs."""
    hidden = [x.new_empty(*x.shape[:-1], w1.shape[0]) for x, w1 in zip(xs, w1s, strict=True)]
    pre_activations = [torch.empty_like(value) for value in hidden] if save else []
    outputs = [x.new_empty(*x.shape[:-1], w2.shape[0]) for x, w2 in zip(xs, w2s, strict=True)]
    kept: Sequence[Tensor | None] = [_rows(value) for value in pre_activations] or [None] * len(xs)
    first = [
        _Product(_rows(x), w1, _rows(value), bias=b1, second=pre_activation)
        for x, w1, b1, value, pre_activation in zip(xs, w1s, b1s, hidden, kept, strict=True)
    ]
    second = [
        _Product(_rows(value), w2, _rows(output), bias=b2)
        for value, w2, b2, output in zip(hidden, w2s, b2s, outputs, strict=True)
    ]
    _multiply(LINEAR, "bias_gelu", first)
    _multiply(LINEAR, "bias", second)
    return outputs + pre_activations


def grouped_mlp_projector_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    pre_activations: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed ones of each group's gradients to (x, w1, b1, w2, b2), group after group."""
    sets = range(len(xs))
    needs = [list(needed[5 * i : 5 * i + 5]) for i in sets]
    flat_grads = [_rows(grad).contiguous() for grad in grads]
    flat_xs = [_rows(x) for x in xs]
    flat_pre = [_rows(value).contiguous() for value in pre_activations]
    results = [
        [
            w1.new_empty(shape) if need else w1.new_empty(0)
            for shape, need in zip(shapes, need_all, strict=True)
        ]
        for x, w1, w2, need_all in zip(xs, w1s, w2s, needs, strict=True)
        for shapes in [(x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])]
    ]
    sums = []
    with_b2 = [i for i in sets if needs[i][4]]
    parts = _column_sums([flat_grads[i] for i in with_b2])
    sums += [(part, results[i][4]) for i, part in zip(with_b2, parts, strict=True)]

    through = [i for i in sets if any(needs[i][:3])]
    keep_hidden = any(needs[i][3] for i in through)
    grad_pre = {i: torch.empty_like(flat_pre[i]) for i in through}
    hidden = {i: torch.empty_like(flat_pre[i]) for i in through if keep_hidden}
    hidden |= {i: F.gelu(flat_pre[i]) for i in sets if needs[i][3] and i not in through}
    parts = _multiply(
        INPUT_GRADIENT,
        "gelu_backward",
        [
            _Product(
                *(flat_grads[i], w2s[i].T, grad_pre[i]), pre_activation=flat_pre[i], second=hidden.get(i)
            )
            for i in through
        ],
    )
    sums += [(part, results[i][2]) for i, part in zip(through, parts, strict=True) if needs[i][2]]

    of_w2 = [_Product(flat_grads[i].T, hidden[i].T, results[i][3]) for i in sets if needs[i][3]]
    of_w1 = [_Product(grad_pre[i].T, flat_xs[i].T, results[i][1]) for i in sets if needs[i][1]]
    _multiply(WEIGHT_GRADIENT, "none", of_w2 + of_w1)
    of_x = [_Product(grad_pre[i], w1s[i].T, _rows(results[i][0])) for i in sets if needs[i][0]]
    _multiply(INPUT_GRADIENT, "none", of_x)
    _add_parts(sums)
    return [value for i in sets for value, need in zip(results[i], needs[i], strict=True) if need]


@dataclass(frozen=True)
class _Product:
    """out (M, N) = a (M, K) · b (N, K)ᵀ and what the epilogue reads and writes beside; `out` is contiguous."""

    a: Tensor
    b: Tensor
    out: Tensor
    bias: Tensor | None = None
    pre_activation: Tensor | None = None
    second: Tensor | None = None

    @property
    def work(self) -> int:
        return self.out.numel() * self.a.shape[1]


def _rows(x: Tensor) -> Tensor:
    """All tokens as the rows of one matrix, a view wherever strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _multiply(space: Space, epilogue: str, products: Sequence[_Product]) -> list[Tensor]:
    """Compute every product, in one launch where their operands lie in memory alike.

    Epilogues: "bias" adds it, "bias_gelu" applies GELU after it and writes the sum to `second` if there is
    one, "gelu_backward" multiplies by GELU'(pre_activation) and writes GELU(pre_activation) to `second` if
    there is one, "none" does nothing.

    Returns:
        For "gelu_backward" column sums of the results in parts, (parts, N) float32 each; else nothing.
    """
    if not products:
        return []
    largest = max(products, key=lambda one: one.work)
    target, dtype = target_of(largest.out.device), largest.out.dtype
    if space is WEIGHT_GRADIENT:
        sizes, count = dict(zip(("M", "N"), largest.out.shape, strict=True)), largest.a.shape[1]
    else:
        sizes, count = (
            dict(zip(("N", "K"), largest.b.shape, strict=True)),
            sum(len(one.a) for one in products),
        )
    config = choose(space, target, dtype, sizes, count)
    blocks = dict(config.blocks)
    if blocks["ROUTE"] == TORCH:
        return [part for one in products for part in _multiply_in_torch(one, epilogue)]
    sums = [
        torch.empty(
            *(triton.cdiv(len(one.out), blocks["BLOCK_M"]), one.out.shape[1]),
            dtype=torch.float32,
            device=one.out.device,
        )
        for one in products
        if epilogue == "gelu_backward"
    ]
    for one in products:
        if epilogue == "none" and one.a.shape[1] == 0:
            one.out.zero_()
    working = [
        i for i, one in enumerate(products) if one.out.numel() and (epilogue != "none" or one.a.shape[1])
    ]
    for alike in _alike(target, products, working):
        _launch(
            config, target, epilogue, [products[i] for i in alike], [sums[i] for i in alike] if sums else []
        )
    return sums


def _alike(target: Target, products: Sequence[_Product], working: Sequence[int]) -> list[list[int]]:
    """`working` in groups of one launch: their operands have one layout each, and where a matrix has two, as one
    row does, that of the others. On AMD each is alone: the numbers of several spill scalar registers.
    """

    def layouts(group: Sequence[int]) -> tuple[str, str]:
        a_layout, _ = matrix_layout([products[i].a for i in group])
        return a_layout, matrix_layout([products[i].b for i in group])[0]

    if target.backend == "hip" or len(working) < 2:
        return [[i] for i in working]
    if "strided" not in layouts(working):
        return [list(working)]
    groups: dict[tuple[str, str], list[int]] = {}
    for i in working:
        groups.setdefault(layouts([i]), []).append(i)
    return list(groups.values())


def _launch(
    config: Config, target: Target, epilogue: str, products: Sequence[_Product], sums: Sequence[Tensor]
) -> None:
    device, dtype = products[0].out.device, products[0].out.dtype
    blocks = dict(config.blocks)
    del blocks["ROUTE"]
    resident = blocks.pop("PROGRAMS") * target.multiprocessors
    wants_descriptors = blocks.pop("DESCRIPTORS") == TMA
    a, b, out = ([getattr(one, name) for one in products] for name in ("a", "b", "out"))
    across = [_tiles(one, blocks) for one in products]
    parts = [1] * len(products)
    partials = list(sums) or out
    if epilogue == "none":
        parts = [_parts(one, sum(across), target.multiprocessors, blocks) for one in products]
        partials = [
            torch.empty(*(part, one.out.numel()) if part > 1 else (0,), dtype=torch.float32, device=device)
            for one, part in zip(products, parts, strict=True)
        ]
    biases = [one.out if one.bias is None else one.bias.contiguous() for one in products]
    pre = [one.out if one.pre_activation is None else one.pre_activation for one in products]
    second = [one.out if one.second is None else one.second for one in products]
    (a_layout, a_align), (b_layout, b_align) = matrix_layout(a), matrix_layout(b)
    tiles = sum(number * part for number, part in zip(across, parts, strict=True))
    launch_product(
        _product_kernel,
        min(tiles, resident),
        device,
        (
            *(tuple(a), tuple(b), tuple(biases), tuple(pre), tuple(out), tuple(second), tuple(partials)),
            tuple(
                odd(*one.out.shape, one.a.shape[1], *one.a.stride(), *one.b.stride(), part)
                for one, part in zip(products, parts, strict=True)
            ),
        ),
        A_LAYOUT=a_layout,
        B_LAYOUT=b_layout,
        A_ALIGN=a_align,
        B_ALIGN=b_align,
        OUT_ALIGN=matrix_layout([*out, *pre, *second])[1],
        ITEM_BYTES=dtype.itemsize,
        EPILOGUE=epilogue,
        SECOND=products[0].second is not None,
        PIECE=max(16, PIECES[target.backend] * config.num_warps * target.warp_size // blocks["BLOCK_M"]),
        PRECISION=dot_precision(dtype, target),
        USE_DESCRIPTORS=wants_descriptors and descriptors_fit(target, a, b),
        **blocks,
        **_register_limit(target),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _add_parts(
        [(partial, one.out) for partial, one, part in zip(partials, products, parts, strict=True) if part > 1]
    )


def _register_limit(target: Target) -> dict[str, int]:
    """Registers of a thread: the assembler left alone spills some to run more programs at once."""
    return {"maxnreg": 255} if target.capability else {}


def _tiles(one: _Product, blocks: dict[str, int]) -> int:
    return triton.cdiv(len(one.out), blocks["BLOCK_M"]) * triton.cdiv(one.out.shape[1], blocks["BLOCK_N"])


def _parts(one: _Product, tiles: int, programs: int, blocks: dict[str, int]) -> int:
    """Parts that the depth of a product is cut into, so that a launch of few `tiles` fills the device.

    A part of less than eight steps does not earn the tile of partial sums it writes.
    """
    return max(1, min(programs // tiles, one.a.shape[1] // (8 * blocks["BLOCK_K"])))


def _multiply_in_torch(one: _Product, epilogue: str) -> list[Tensor]:
    """What `_multiply` returns for one product, by torch's matrix products."""
    if one.bias is not None:
        sums = torch.addmm(one.bias, one.a, one.b.T, out=one.out if one.second is None else one.second)
        if epilogue == "bias_gelu":
            torch.ops.aten.gelu.out(sums, out=one.out)
    elif epilogue == "none":
        torch.mm(one.a, one.b.T, out=one.out)
    else:
        grad = torch.mm(one.a, one.b.T)
        torch.ops.aten.gelu_backward.grad_input(grad, one.pre_activation, grad_input=one.out)
        if one.second is not None:
            torch.ops.aten.gelu.out(one.pre_activation, out=one.second)
        return _column_sums([one.out])
    return []


def _column_sums(
    grads: Sequence[Tensor], pre_activations: Sequence[Tensor] = (), results: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Column sums of contiguous matrices in parts, (parts, N) float32 each.

    With `pre_activations` those of grad · GELU'(pre_activation), which is written to `results`.
    """
    parts = [
        torch.empty(
            *(triton.cdiv(len(grad), SUM_ROWS), grad.shape[1]), dtype=torch.float32, device=grad.device
        )
        for grad in grads
    ]
    working = [i for i, grad in enumerate(grads) if grad.numel()]
    if not working:
        return parts
    used = [grads[i] for i in working]
    activated = [pre_activations[i] for i in working] if pre_activations else used
    written = [results[i] for i in working] if results else used
    launch(
        _column_sums_kernel,
        sum(len(parts[i]) * triton.cdiv(grads[i].shape[1], BLOCK_COLUMNS) for i in working),
        used[0].device,
        (
            *(tuple(used), tuple(activated), tuple(written), tuple(parts[i] for i in working)),
            tuple(odd(*grad.shape) for grad in used),
        ),
        GELU=bool(pre_activations),
        ALIGN=matrix_layout([*used, *activated, *written])[1],
        ITEM_BYTES=used[0].element_size(),
        ROWS=SUM_ROWS,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_N=BLOCK_COLUMNS,
        num_warps=4,
    )
    return parts


def _add_parts(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """result = Σ_s parts[s] in the order of s, for pairs of parts (S, ...) and contiguous result."""
    for parts, result in sums:
        if len(parts) == 0:
            result.zero_()
    working = [(parts, result) for parts, result in sums if parts.numel()]
    if not working:
        return
    # Sums of columns are few and long, parts of matrices many and short.
    few = max(len(parts) for parts, _ in working) <= 16
    block, block_parts = (512, 4) if few else (128, 16)
    launch(
        _add_parts_kernel,
        sum(triton.cdiv(result.numel(), block) for _, result in working),
        working[0][1].device,
        (
            *(tuple(parts for parts, _ in working), tuple(result for _, result in working)),
            tuple(odd(result.numel(), len(parts)) for parts, result in working),
        ),
        ALIGN=math.gcd(4, *(result.numel() for _, result in working)),
        BLOCK=block,
        BLOCK_PARTS=block_parts,
        num_warps=4,
    )


@triton.jit
def _finish_tile(
    accumulator,
    row,
    column,
    rows,
    columns,
    parts,
    bias_ptr,
    pre_ptr,
    out_ptr,
    second_ptr,
    partial_ptr,
    OUT_ALIGN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SECOND: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The epilogue of the tile at (row, column), PIECE columns at a time."""
    BLOCK_M: tl.constexpr = accumulator.shape[0]
    BLOCK_N: tl.constexpr = accumulator.shape[1]
    if BLOCK_N > PIECE:
        left, right = halves(accumulator)
        _finish_tile(
            *(left, row, column, rows, columns, parts, bias_ptr, pre_ptr, out_ptr, second_ptr, partial_ptr),
            *(OUT_ALIGN, EPILOGUE, SECOND, PIECE),
        )
        _finish_tile(
            *(right, row, column + BLOCK_N // 2, rows, columns, parts),
            *(bias_ptr, pre_ptr, out_ptr, second_ptr, partial_ptr),
            *(OUT_ALIGN, EPILOGUE, SECOND, PIECE),
        )
    else:
        offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, OUT_ALIGN)
        if EPILOGUE == "bias" or EPILOGUE == "bias_gelu":
            accumulator = add_bias(accumulator, bias_ptr, column, columns)
        if EPILOGUE == "bias_gelu":
            if SECOND:
                tl.store(second_ptr + offsets, accumulator.to(second_ptr.dtype.element_ty), mask=inside)
            accumulator = gelu(accumulator)
        if EPILOGUE == "gelu_backward":
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if SECOND:
                tl.store(second_ptr + offsets, gelu(pre).to(second_ptr.dtype.element_ty), mask=inside)
            accumulator *= gelu_derivative(pre)
            n = column + tl.arange(0, BLOCK_N)
            sums = partial_ptr + (row // BLOCK_M).to(tl.int64) * columns + n
            tl.store(sums, tl.sum(accumulator, axis=0), mask=n < columns)
        if EPILOGUE == "none" and parts > 1:
            tl.store(partial_ptr + offsets, accumulator, mask=inside)
        else:
            tl.store(out_ptr + offsets, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    as_,
    bs,
    biases,
    pre_activations,
    outs,
    seconds,
    partials,
    numbers,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SECOND: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = A · Bᵀ and an epilogue, of several matrices, each with its own sizes.

    `numbers` holds for each M, N, K, the four strides and the parts that K is cut into. The tiles of all
    products are dealt to the programs in turn.

    Bytes: (M·K + N·K)·itemsize read where the L2 cache holds what neighbouring tiles share, M·N·itemsize
    written, twice with SECOND, and read once by "gelu_backward". FLOPs: 2·M·N·K.
    """
    tile = tl.program_id(0)
    programs = tl.num_programs(0)
    for problem in range(len(numbers)):
        a_address = as_[0].to(tl.int64)
        b_address = bs[0].to(tl.int64)
        bias_address = biases[0].to(tl.int64)
        pre_address = pre_activations[0].to(tl.int64)
        out_address = outs[0].to(tl.int64)
        second_address = seconds[0].to(tl.int64)
        rows = half(numbers[0][0])
        columns = half(numbers[0][1])
        depth = half(numbers[0][2])
        stride_am = tl.cast(half(numbers[0][3]), tl.int64)
        stride_ak = tl.cast(half(numbers[0][4]), tl.int64)
        stride_bn = tl.cast(half(numbers[0][5]), tl.int64)
        stride_bk = tl.cast(half(numbers[0][6]), tl.int64)
        parts = half(numbers[0][7])
        partial_address = partials[0].to(tl.int64)
        for i in tl.static_range(1, len(numbers)):
            if problem == i:
                a_address = as_[i].to(tl.int64)
                b_address = bs[i].to(tl.int64)
                bias_address = biases[i].to(tl.int64)
                pre_address = pre_activations[i].to(tl.int64)
                out_address = outs[i].to(tl.int64)
                second_address = seconds[i].to(tl.int64)
                rows = half(numbers[i][0])
                columns = half(numbers[i][1])
                depth = half(numbers[i][2])
                stride_am = tl.cast(half(numbers[i][3]), tl.int64)
                stride_ak = tl.cast(half(numbers[i][4]), tl.int64)
                stride_bn = tl.cast(half(numbers[i][5]), tl.int64)
                stride_bk = tl.cast(half(numbers[i][6]), tl.int64)
                parts = half(numbers[i][7])
                partial_address = partials[i].to(tl.int64)
        a_ptr = tl.multiple_of(a_address.to(as_[0].dtype), A_ALIGN * ITEM_BYTES)
        b_ptr = tl.multiple_of(b_address.to(bs[0].dtype), B_ALIGN * ITEM_BYTES)
        bias_ptr = bias_address.to(biases[0].dtype)
        pre_ptr = tl.multiple_of(pre_address.to(pre_activations[0].dtype), OUT_ALIGN * ITEM_BYTES)
        out_ptr = tl.multiple_of(out_address.to(outs[0].dtype), OUT_ALIGN * ITEM_BYTES)
        second_ptr = tl.multiple_of(second_address.to(seconds[0].dtype), OUT_ALIGN * ITEM_BYTES)
        partial_ptr = tl.multiple_of(partial_address.to(partials[0].dtype), 16)

        row_tiles = tl.cdiv(rows, BLOCK_M)
        column_tiles = tl.cdiv(columns, BLOCK_N)
        tiles = row_tiles * column_tiles * parts
        part_depth = tl.cdiv(tl.cdiv(depth, BLOCK_K), parts) * BLOCK_K
        for one in range(tile, tiles, programs):
            part = one % parts
            row_tile, column_tile = grouped_tile(one // parts, row_tiles, column_tiles, GROUP)
            row = row_tile * BLOCK_M
            column = column_tile * BLOCK_N
            first = part * part_depth
            last = tl.minimum(first + part_depth, depth)
            accumulator = add_product(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                *(a_ptr, b_ptr, row, column, rows, columns, depth, first, last),
                *(stride_am, stride_ak, stride_bn, stride_bk),
                *(A_LAYOUT, B_LAYOUT, A_ALIGN, B_ALIGN, USE_DESCRIPTORS, BLOCK_K, PRECISION),
            )
            _finish_tile(
                *(accumulator, row, column, rows, columns, parts),
                *(bias_ptr, pre_ptr, out_ptr, second_ptr),
                partial_ptr + part.to(tl.int64) * rows * multiple(columns, OUT_ALIGN),
                *(OUT_ALIGN, EPILOGUE, SECOND, PIECE),
            )
        tile += tl.cdiv(tl.maximum(tiles - tile, 0), programs) * programs - tiles


@triton.jit
def _column_sums_kernel(
    grads,
    pre_activations,
    results,
    partials,
    numbers,
    GELU: tl.constexpr,
    ALIGN: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Column sums over ROWS rows of matrices, or of grad ∘ GELU'(pre_activation), which is written as well.

    `numbers` holds M and N of each. Bytes: M·N·itemsize read, with GELU twice that and as many written.
    """
    tile = tl.program_id(0)
    grad_address = grads[0].to(tl.int64)
    pre_address = pre_activations[0].to(tl.int64)
    result_address = results[0].to(tl.int64)
    partial_ptr = partials[0]
    rows = half(numbers[0][0])
    columns = half(numbers[0][1])
    next_tile = tl.cdiv(rows, ROWS) * tl.cdiv(columns, BLOCK_N)
    tile_begin = 0
    for i in tl.static_range(1, len(numbers)):
        if tile >= next_tile:
            grad_address = grads[i].to(tl.int64)
            pre_address = pre_activations[i].to(tl.int64)
            result_address = results[i].to(tl.int64)
            partial_ptr = partials[i]
            rows = half(numbers[i][0])
            columns = half(numbers[i][1])
            tile_begin = next_tile
            next_tile += tl.cdiv(rows, ROWS) * tl.cdiv(columns, BLOCK_N)
    grad_ptr = tl.multiple_of(grad_address.to(grads[0].dtype), ALIGN * ITEM_BYTES)
    pre_ptr = tl.multiple_of(pre_address.to(pre_activations[0].dtype), ALIGN * ITEM_BYTES)
    result_ptr = tl.multiple_of(result_address.to(results[0].dtype), ALIGN * ITEM_BYTES)
    across = tl.cdiv(columns, BLOCK_N)
    part = (tile - tile_begin) // across
    column = (tile - tile_begin) % across * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, rows), BLOCK_M):
        offsets, inside = tile_offsets(row, column, rows, columns, BLOCK_M, BLOCK_N, ALIGN)
        values = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            values *= gelu_derivative(pre)
            tl.store(result_ptr + offsets, values.to(result_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(values, axis=0)
    tl.store(partial_ptr + part.to(tl.int64) * columns + n, total, mask=n < columns)


@triton.jit
def _add_parts_kernel(
    partials, results, numbers, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """result[i] = Σ_s partials[s, i], in one order of s. `numbers` holds the elements and parts of each.

    Bytes: 4 for each element of each part; FLOPs: as many as elements.
    """
    tile = tl.program_id(0)
    partial_address = partials[0].to(tl.int64)
    result_address = results[0].to(tl.int64)
    elements = half(numbers[0][0])
    parts = half(numbers[0][1])
    tile_begin = 0
    next_tile = tl.cdiv(elements, BLOCK)
    for i in tl.static_range(1, len(numbers)):
        if tile >= next_tile:
            partial_address = partials[i].to(tl.int64)
            result_address = results[i].to(tl.int64)
            elements = half(numbers[i][0])
            parts = half(numbers[i][1])
            tile_begin = next_tile
            next_tile += tl.cdiv(elements, BLOCK)
    partial_ptr = tl.multiple_of(partial_address.to(partials[0].dtype), 16)
    result_ptr = tl.multiple_of(result_address.to(results[0].dtype), 16)
    elements = multiple(elements, ALIGN)
    element = (tile - tile_begin) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        values = partial_ptr + part[:, None].to(tl.int64) * elements + element[None, :]
        total += tl.sum(tl.load(values, mask=(part[:, None] < parts) & inside[None, :], other=0.0), axis=0)
    tl.store(result_ptr + element, total.to(result_ptr.dtype.element_ty), mask=inside)


def _linear_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return _heuristic(target, dtype, sizes, count, sizes["N"])


def _weight_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return _heuristic(target, dtype, sizes, sizes["M"], sizes["N"])


def _heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, rows: int, columns: int) -> Config:
    """The largest tile of which there are enough to keep three quarters of the multiprocessors busy."""
    if any(size * dtype.itemsize % 16 for size in sizes.values()) and target.backend != "interpreter":
        # Element by element every load has an address of its own: large tiles spill.
        return _config(target, (64, 64, 32) if dtype.itemsize == 2 else (64, 32, 16), 4, 2)
    shapes = _shapes(target, dtype)
    for shape in shapes:
        (block_m, block_n, _), *_ = shape
        if triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) >= 0.75 * target.multiprocessors:
            break
    return _config(target, *shape)


def _shapes(target: Target, dtype: torch.dtype) -> list[tuple[tuple[int, int, int], int, int]]:
    """Rows, columns and depth of tiles, with warps and stages, largest first; none spills in any epilogue."""
    shapes = _shapes_by_instructions(target, dtype)
    return [
        (tile, warps, stages)
        for tile, warps, stages in shapes
        if _shared_memory(_config(target, tile, warps, stages), dtype) <= target.shared_memory
    ]


def _shapes_by_instructions(
    target: Target, dtype: torch.dtype
) -> list[tuple[tuple[int, int, int], int, int]]:
    if target.backend == "interpreter":
        return [((64, 64, 32), 4, 1)]
    if dtype == torch.float32:
        # IEEE products are no matrix instructions on NVIDIA: operands are unrolled over the depth in registers.
        return [((128, 64 if target.capability >= 90 else 128, 16), 8, 3)]
    if target.backend == "hip":
        return [((128, 128, 64), 8, 2), *(((64, columns, 64), 4, 2) for columns in (128, 64, 32))]
    if target.capability >= 90:
        widest = [((128, 256, 64), 8, 3), ((128, 128, 64), 8, 4)]
        return [*widest, *(((64, columns, 64), 4, 4) for columns in (128, 64, 32))]
    return [((128, 128, 64), 8, 3), ((64, 128, 32), 4, 4), ((64, 64, 64), 4, 4), ((64, 32, 64), 4, 4)]


def _config(
    target: Target,
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    *,
    group: int = 8,
    descriptors: int | None = None,
    programs: int | None = None,
    route: int = TRITON,
) -> Config:
    """Rows, columns and depth of a tile; warps, stages; tile rows of a group; POINTERS or TMA; programs of a
    multiprocessor at a time, of which each takes one tile after the other; TRITON or TORCH.
    """
    hopper = target.capability >= 90
    blocks = {
        **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True)),
        "GROUP": group,
        "DESCRIPTORS": descriptors or (TMA if hopper else POINTERS),
        "PROGRAMS": programs or (1 if hopper else ONE_A_TILE),
        "ROUTE": route,
    }
    return Config(tuple(blocks.items()), warps, stages)


def _candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterable[Config]:
    shapes = _shapes(target, dtype)
    for tile, warps, stages in shapes:
        for more in (stages - 1, stages, stages + 1):
            if more:
                yield _config(target, tile, warps, more)
        for group in (4, 16):
            yield _config(target, tile, warps, stages, group=group)
        if target.capability >= 90:
            for programs in (2, ONE_A_TILE):
                yield _config(target, tile, warps, stages, programs=programs)
            yield _config(target, tile, warps, stages, descriptors=POINTERS, programs=ONE_A_TILE)
    yield _config(target, *shapes[0], route=TORCH)


def _shared_memory(config: Config, dtype: torch.dtype) -> int:
    """A tile of each operand for every stage."""
    blocks = dict(config.blocks)
    return config.num_stages * blocks["BLOCK_K"] * (blocks["BLOCK_M"] + blocks["BLOCK_N"]) * dtype.itemsize


LINEAR = Space("linear", _linear_heuristic, _candidates, _shared_memory)
INPUT_GRADIENT = Space("linear_input_gradient", _linear_heuristic, _candidates, _shared_memory)
WEIGHT_GRADIENT = Space("linear_weight_gradient", _weight_heuristic, _candidates, _shared_memory)
