"""What tuned tables send to torch though its op runs on Triton, for `active_backend`."""

from torch import Tensor

from mgllava_kernels import configs
from mgllava_kernels.configs import tables


def products_in_torch(tensor: Tensor) -> str | None:
    """The projectors' matrix products that torch computes on the device of `tensor` in its dtype, or None.

    Named as in the tables: kernel, sizes of the weight, tokens. A call with another number of tokens takes the
    entry with the nearest one; one of several token sets that of the largest product, at the tokens of all sets.

    Raises:
        ValueError: a table that cannot be used, as the ops raise.
    """
    from mgllava_kernels._triton.launch import target_of
    from mgllava_kernels._triton.projector import INPUT_GRADIENT, LINEAR, TORCH, WEIGHT_GRADIENT

    target = target_of(tensor.device)
    tokens: dict[str, set[int]] = {}
    for space in (LINEAR, INPUT_GRADIENT, WEIGHT_GRADIENT):
        paths = [tables.path_of(folder, space.kernel, target.name) for folder in tables.folders()]
        for entry in (entry for path in paths if path.is_file() for entry in tables.read(path).entries):
            if entry.dtype != tensor.dtype:
                continue
            # Of two tables with an entry for these sizes one counts: `choose` knows which.
            config = configs.choose(space, target, entry.dtype, dict(entry.sizes), entry.count)
            if dict(config.blocks)["ROUTE"] == TORCH:
                product = " ".join((space.kernel, *(f"{name}={size}" for name, size in entry.sizes)))
                tokens.setdefault(product, set()).add(entry.count)
    if not tokens:
        return None
    products = (f"{product} at {', '.join(map(str, sorted(of)))} tokens" for product, of in tokens.items())
    return f"tuned tables send to torch: {'; '.join(products)}"
