"""What may be chosen for a kernel that multiplies matrices: its tiles, how they are copied, how many programs run.

Configs name BLOCK_M, BLOCK_N, BLOCK_K and GROUP, constexpr parameters of such a kernel; DESCRIPTORS and PROGRAMS,
which `programs_of` and `wants_descriptors` read on the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton

from mgllava_kernels._triton.launch import Target
from mgllava_kernels._triton.precision import dot_precision
from mgllava_kernels.configs import Config, Sizes, Space

# Values of DESCRIPTORS: how tiles are copied from global memory.
POINTERS, TMA = 1, 2
# The value of PROGRAMS that leaves every tile to a program of its own.
ONE_A_TILE = 1 << 16
# Elements a thread takes through GELU at a time, by backend: of twice as many registers spill.
PIECES = {"cuda": 32, "hip": 16, "interpreter": 32}


def token_space(kernel: str) -> Space:
    """Products of tokens and a weight (N, K); the count is that of tokens."""
    return Space(kernel, _token_heuristic, candidates, shared_memory)


def weight_space(kernel: str) -> Space:
    """Products of size (M, N), a weight's gradient, summed over tokens; the count is that of tokens."""
    return Space(kernel, _weight_heuristic, candidates, shared_memory)


def product_config(
    target: Target,
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    *,
    group: int = 8,
    descriptors: int | None = None,
    programs: int | None = None,
) -> Config:
    """Rows, columns and depth of a tile; warps, stages; tile rows of a group; POINTERS or TMA; programs of a
    multiprocessor at a time, of which each takes one tile after the other.
    """
    hopper = target.capability >= 90
    blocks = {
        **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True)),
        "GROUP": group,
        "DESCRIPTORS": descriptors or (TMA if hopper else POINTERS),
        "PROGRAMS": programs or (1 if hopper else ONE_A_TILE),
    }
    return Config(tuple(blocks.items()), warps, stages)


def programs_of(config: Config, target: Target, tiles: int) -> int:
    """Programs that `tiles` are dealt to."""
    programs = dict(config.blocks)["PROGRAMS"]
    return tiles if programs == ONE_A_TILE else min(tiles, programs * target.multiprocessors)


def wants_descriptors(config: Config) -> bool:
    return dict(config.blocks)["DESCRIPTORS"] == TMA


def piece_of(config: Config, target: Target) -> int:
    """Columns of a tile that an epilogue takes at a time."""
    blocks = dict(config.blocks)
    across = PIECES[target.backend] * config.num_warps * target.warp_size // blocks["BLOCK_M"]
    return min(blocks["BLOCK_N"], max(16, across))


def kernel_options(config: Config, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the launch of a product.

    They are tiles, whether a program takes several (PERSISTENT), the columns of them that an epilogue takes at a
    time (PIECE), the precision of products, and Triton's own options.
    """
    blocks = {name: value for name, value in config.blocks if name.startswith("BLOCK") or name == "GROUP"}
    # The assembler left alone spills some registers to run more programs at once.
    limit = {"maxnreg": 255} if target.capability else {}
    return {
        **blocks,
        **limit,
        "PERSISTENT": dict(config.blocks)["PROGRAMS"] != ONE_A_TILE,
        "PIECE": piece_of(config, target),
        "PRECISION": dot_precision(dtype, target),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def aligned(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether the rows of matrices of these sizes are whole multiples of 16 bytes."""
    return not any(size * dtype.itemsize % 16 for size in sizes)


def heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, rows: int, columns: int) -> Config:
    """The largest tile of which there are enough to keep three quarters of the multiprocessors busy.

    The result is (rows, columns); `sizes` are those of a model, which decide how operands are aligned.
    """
    if not aligned(dtype, *sizes.values()) and target.backend != "interpreter":
        # Element by element every load has an address of its own: large tiles spill.
        return product_config(
            target, *(((64, 64, 32), 8, 2) if dtype.itemsize == 2 else ((64, 32, 16), 4, 2))
        )
    shapes = _shapes(target, dtype)
    for shape in shapes:
        (block_m, block_n, _), *_ = shape
        if triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) >= 0.75 * target.multiprocessors:
            break
    return product_config(target, *shape)


def _token_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return heuristic(target, dtype, sizes, count, sizes["N"])


def _weight_heuristic(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Config:
    return heuristic(target, dtype, sizes, sizes["M"], sizes["N"])


def _shapes(target: Target, dtype: torch.dtype) -> list[tuple[tuple[int, int, int], int, int]]:
    """Rows, columns and depth of tiles, with warps and stages, largest first; none spills in any epilogue."""
    shapes = _shapes_by_instructions(target, dtype)
    return [
        (tile, warps, stages)
        for tile, warps, stages in shapes
        if shared_memory(product_config(target, tile, warps, stages), dtype) <= target.shared_memory
    ]


def _shapes_by_instructions(
    target: Target, dtype: torch.dtype
) -> list[tuple[tuple[int, int, int], int, int]]:
    if target.backend == "interpreter":
        return [((64, 64, 32), 4, 1)]
    if dtype == torch.float32:
        # IEEE products are no matrix instructions on NVIDIA: operands are unrolled over the depth in registers.
        return [((128, 64, 16), 8, 3)]
    if target.backend == "hip":
        return [((128, 128, 64), 8, 2), *(((64, columns, 64), 4, 2) for columns in (128, 64, 32))]
    if target.capability >= 90:
        widest = [((128, 256, 64), 8, 3), ((128, 128, 64), 8, 4)]
        return [*widest, *(((64, columns, 64), 4, 4) for columns in (128, 64, 32))]
    return [((128, 128, 64), 8, 3), ((64, 128, 32), 4, 4), ((64, 64, 64), 4, 4), ((64, 32, 64), 4, 4)]


def candidates(target: Target, dtype: torch.dtype, sizes: Sizes, count: int) -> Iterator[Config]:
    """What is worth measuring for any product."""
    for tile, warps, stages in _shapes(target, dtype):
        for more in (stages, stages - 1, stages + 1):
            yield product_config(target, tile, warps, max(1, more))
        if target.capability >= 90:
            yield product_config(target, tile, warps, stages, programs=ONE_A_TILE)
            yield product_config(target, tile, warps, stages, descriptors=POINTERS, programs=ONE_A_TILE)


def shared_memory(config: Config, dtype: torch.dtype) -> int:
    """A tile of each operand for every stage."""
    blocks = dict(config.blocks)
    return config.num_stages * blocks["BLOCK_K"] * (blocks["BLOCK_M"] + blocks["BLOCK_N"]) * dtype.itemsize
