"""Merges the shards of a DeepSpeed ZeRO checkpoint into full fp32 weights.

The layout is that of `deepspeed.utils.zero_to_fp32`. Each rank's `*_optim_states.pt` holds flat fp32 vectors:
- stages 1 and 2 (`single_partition_of_fp32_groups`): per parameter group, the group's parameters laid end to
  end and cut into equal parts, one per rank, with padding at the very end;
- stage 3 (`fp32_flat_groups`): every parameter cut into as many equal parts as there are ranks, padded at its
  own end; each rank lays its parts end to end, groups after one another.
`*_model_states.pt` names the parameters and shapes of each group in order, and has what is not partitioned.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .pickles import read_pickle
from .tensors import ConversionError, LazyTensor

_OPTIMIZER_FILES = "*_optim_states.pt"
_MODEL_FILES = "*_model_states.pt"


def is_deepspeed_folder(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in (_OPTIMIZER_FILES, _MODEL_FILES))


def open_deepspeed_folder(folder: Path) -> tuple[dict[str, LazyTensor], torch.dtype | None]:
    """The weights of a DeepSpeed checkpoint folder.

    Returns:
        the tensors, fp32 where shards were merged; and the dtype the model was trained in, if it says.

    Raises:
        ConversionError: if shards are missing, disagree with the parameters' shapes, or the model itself was
            split over ranks (tensor parallelism).
    """
    model_files = _by_rank(folder.glob(_MODEL_FILES))
    if not model_files:
        raise ConversionError(f"{folder.name} is incomplete: no {_MODEL_FILES} in it")
    parallel = [file.name for file in model_files if not re.search(r"mp_rank_00_model_states", file.name)]
    if parallel:
        raise ConversionError(
            f"{folder.name} was trained with tensor parallelism, which is not supported: {parallel}"
        )
    states = [_read_dict(file) for file in model_files]
    module = states[0].get("module")
    if not isinstance(module, dict):
        raise ConversionError(
            f"{model_files[0].name} in {folder.name} is no DeepSpeed model state: no 'module'"
        )
    module = {str(name): value for name, value in module.items() if isinstance(value, LazyTensor)}
    trained_in = next((value.dtype for value in module.values() if value.dtype.is_floating_point), None)

    # Stage 3 leaves empty placeholders in `module`; what has elements is whole.
    tensors = {name: value for name, value in module.items() if value.numel}
    tensors |= _frozen(states, folder)
    optimizer_files = _by_rank(folder.glob(_OPTIMIZER_FILES))
    if optimizer_files:
        tensors |= _merged(states[0], [_read_dict(file) for file in optimizer_files], folder)
    _add_shared(tensors, states[0].get("shared_params") or {})

    absent = sorted(set(module) - set(tensors))
    if absent:
        raise ConversionError(
            f"{folder.name} is incomplete: no shard has the values of {len(absent)} parameters, for example "
            f"{absent[0]}; its {_OPTIMIZER_FILES} files are needed"
        )
    return tensors, trained_in


def _read_dict(file: Path) -> dict:
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise ConversionError(f"{file.name} is no DeepSpeed state: it does not hold a dict")
    return content


def _by_rank(files: Iterable[Path]) -> list[Path]:
    """Sorted by the numbers in the names: rank 10 comes after rank 9."""
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _merged(model_state: dict, optimizer_states: list[dict], folder: Path) -> dict[str, LazyTensor]:
    groups = model_state.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups
    states = [
        state["optimizer_state_dict"]
        for state in optimizer_states
        if isinstance(state.get("optimizer_state_dict"), dict)
    ]
    if not groups or len(states) != len(optimizer_states):
        raise ConversionError(
            f"{folder.name} is no ZeRO checkpoint: no parameter shapes or no optimizer state in it"
        )
    ranks = states[0].get("partition_count")
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if isinstance(ranks, int) and ranks != len(states):
        raise ConversionError(
            f"{folder.name} is incomplete: {ranks} ranks wrote {_OPTIMIZER_FILES}, "
            f"{len(states)} files are there"
        )
    # The stage itself is stored as an enum of DeepSpeed, which is not read; the key tells as much.
    if all("single_partition_of_fp32_groups" in state for state in states):
        parts = [state["single_partition_of_fp32_groups"] for state in states]
        return _merge_groups(groups, parts, folder)
    if all("fp32_flat_groups" in state for state in states):
        parts = [state["fp32_flat_groups"] for state in states]
        return _merge_parameters(groups, parts, folder)
    raise ConversionError(
        f"{folder.name}: its {_OPTIMIZER_FILES} hold no fp32 weights of ZeRO stage 1, 2 or 3"
    )


def _merge_groups(groups: list[dict], parts: list[list[LazyTensor]], folder: Path) -> dict[str, LazyTensor]:
    """Stages 1 and 2. `parts[rank][group]` is one flat vector."""
    tensors = {}
    if any(len(rank) != len(groups) for rank in parts):
        raise ConversionError(
            f"{folder.name}: the shards do not have the {len(groups)} groups the model state names"
        )
    for number, shapes in enumerate(groups):
        vectors = [rank[number] for rank in parts]
        start = 0
        for name, shape in shapes.items():
            tensors[name] = _pieces(vectors, start, shape, folder)
            start += math.prod(shape)
        available = sum(vector.numel for vector in vectors)
        # DeepSpeed pads the group to a multiple of twice the number of ranks, on either side of the cut.
        if available - start > 4 * len(parts) or start > available:
            raise ConversionError(
                f"{folder.name}: group {number} has {start} elements by its shapes, {available} in its shards"
            )
    return tensors


def _merge_parameters(
    groups: list[dict], parts: list[list[LazyTensor]], folder: Path
) -> dict[str, LazyTensor]:
    """Stage 3. `parts[rank]` are flat vectors that are one after the other."""
    ranks = len(parts)
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    lengths = {name: math.ceil(math.prod(shape) / ranks) for name, shape in shapes.items()}
    needed = sum(lengths.values())
    for rank, vectors in enumerate(parts):
        available = sum(vector.numel for vector in vectors)
        if available != needed:
            raise ConversionError(
                f"{folder.name}: rank {rank} has {available} elements, its shapes need {needed}"
            )
    tensors, start = {}, 0
    for name, shape in shapes.items():
        length = lengths[name]

        def read(start=start, length=length, shape=shape) -> torch.Tensor:
            whole = torch.cat([_slice(vectors, start, length) for vectors in parts])
            return whole[: math.prod(shape)].view(shape)

        tensors[name] = LazyTensor(shape, torch.float32, folder.name, read)
        start += length
    return tensors


def _pieces(vectors: Sequence[LazyTensor], start: int, shape: Sequence[int], folder: Path) -> LazyTensor:
    shape = tuple(shape)
    return LazyTensor(
        shape, torch.float32, folder.name, lambda: _slice(vectors, start, math.prod(shape)).view(shape)
    )


def _slice(vectors: Sequence[LazyTensor], start: int, length: int) -> torch.Tensor:
    """Elements [start, start + length) of the concatenated vectors, in fp32."""
    pieces = []
    for vector in vectors:
        if start < vector.numel and length > 0:
            piece = vector.read()[start : start + length].float()
            pieces.append(piece)
            length -= piece.numel()
        start = max(start - vector.numel, 0)
    return torch.cat(pieces) if pieces else torch.empty(0)


def _frozen(states: list[dict], folder: Path) -> dict[str, LazyTensor]:
    """Frozen parameters: whole in every rank's model state, or (stage 3) in equal parts over the ranks."""
    shapes = states[0].get("frozen_param_shapes") or {}
    fragments = [state.get("frozen_param_fragments") or {} for state in states]
    tensors = {}
    for name, shape in shapes.items():
        parts = [rank[name] for rank in fragments if isinstance(rank.get(name), LazyTensor)]
        numel = math.prod(shape)
        if sum(part.numel for part in parts) < numel:
            raise ConversionError(f"{folder.name} is incomplete: the shards of the frozen {name} are too few")

        def read(parts=parts, numel=numel, shape=tuple(shape)) -> torch.Tensor:
            return torch.cat([part.read().flatten() for part in parts])[:numel].view(shape)

        tensors[name] = LazyTensor(tuple(shape), parts[0].dtype, folder.name, read)
    return tensors


def _add_shared(tensors: dict[str, LazyTensor], pairs: dict[str, str] | list) -> None:
    """Names that share one parameter: only the partner was partitioned."""
    for name, partner in pairs.items() if isinstance(pairs, dict) else pairs:
        if partner in tensors:
            tensors[name] = tensors[partner]
