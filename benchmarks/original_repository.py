"""The fusion module of the original repository itself, on request: whoever runs this fetches that repository.

Its file imports half of a training framework that nobody has installed, so the one class is taken out of it.
"""

import ast
import functools
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgllava_kernels import ConvGateFusion

ENVIRONMENT_VARIABLE = "MGLLAVA_ORIGINAL_REPOSITORY"
KEPT = "_as_in_original_repository"
FILE, CLASS = Path("mg_llava/module/fuse_model.py"), "DualPathFuseModule"


def obstacle() -> str | None:
    """Why it does not run, or None."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if not folder:
        return f"on request: {ENVIRONMENT_VARIABLE} names a checkout of github.com/PhoenixZ810/MG-LLaVA"
    if not (Path(folder) / FILE).is_file():
        return f"{ENVIRONMENT_VARIABLE}: {Path(folder) / FILE} does not exist"
    return None


def conv_gate(low_res: Tensor, high_res: Tensor, fusion: ConvGateFusion) -> tuple[Tensor]:
    """The original's own forward pass with the parameters of `fusion`."""
    # Kept at the parameters themselves: sets of inputs take turns in timed calls, and go when they are measured.
    module = fusion.__dict__.get(KEPT)
    if module is None:
        module = fusion.__dict__[KEPT] = _module(fusion)
    return (module(low_res, high_res),)


def _module(fusion: ConvGateFusion) -> nn.Module:
    with torch.device("meta"):
        module = _class(Path(os.environ[ENVIRONMENT_VARIABLE]))(fusion.low_res_dim, fusion.high_res_dim)
    module.slow_conv, module.slow_proj = fusion.high_res_conv, fusion.high_res_proj
    module.fast_conv, module.fast_proj = fusion.low_res_conv, fusion.low_res_proj
    module.gate = nn.Sequential(fusion.gate_in, nn.GELU(), fusion.gate_out)
    return module


@functools.cache
def _class(folder: Path) -> type[nn.Module]:
    """The class alone, with the names that it uses.

    Raises:
        RuntimeError: the file has no such class.
    """
    tree = ast.parse((folder / FILE).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS]
    if not found:
        raise RuntimeError(f"{folder / FILE} has no class {CLASS}")
    names = {"torch": torch, "nn": nn, "F": F, "math": math}
    exec(compile(ast.Module(found, type_ignores=[]), str(FILE), "exec"), names)
    return names[CLASS]
