"""When a module may hand its layers' parameters to a fused op."""

from collections.abc import Mapping
from types import MethodType

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def fusion_obstacle(layers: Mapping[str, nn.Module], *inputs: Tensor) -> str | None:
    """Why `layers` must be called rather than fused, naming each in the way; None if they can be fused.

    A layer can be fused if it does what its weight and bias say. Quantised replacements, adapters, offloading
    hooks, layers that FSDP2 shards one by one and tensor subclasses act inside the layer's own call. A module
    that is sharded as a whole has its weights gathered, as plain parameters, when its own forward runs.

    Args:
        layers: by the names to use in the answer.
        inputs: what the module was called with.
    """
    answers = [(name, _layer_obstacle(layer, inputs)) for name, layer in layers.items()]
    return "; ".join(f"{name} {answer}" for name, answer in answers if answer is not None) or None


def call_obstacle(module: nn.Module, *inputs: Tensor) -> str | None:
    """Why calling `module` does more than the forward of its class, or None."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return "is hooked"
    if "forward" in module.__dict__ and not _is_merely_placed(module, inputs):
        return "has a forward of its own (patched, offloaded or placed on another device)"
    return None


def _layer_obstacle(layer: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"is of type {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d) and (obstacle := _convolution_obstacle(layer)) is not None:
        return obstacle
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if type(value) not in (nn.Parameter, Tensor, FakeTensor):
            return f"has a {name} of type {type(value).__name__}"
    return call_obstacle(layer, *inputs)


def _convolution_obstacle(layer: nn.Conv2d) -> str | None:
    """Why a convolution is none that the fused ops compute: 1x1, or depthwise 7x7 that keeps the size."""
    pointwise = (
        layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "same", "valid") and layer.groups == 1
    )
    depthwise = layer.kernel_size == (7, 7) and layer.padding in ((3, 3), "same")
    depthwise = depthwise and layer.groups == layer.in_channels == layer.out_channels
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if plain and (pointwise or depthwise):
        return None
    return f"is {layer}, neither 1x1 nor depthwise 7x7 with padding 3"


def _is_merely_placed(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the forward was replaced by accelerate alone, with a hook that has nothing to move.

    A device map puts an AlignDevicesHook on every module, offloaded or not. If it does not offload, and the
    inputs and parameters are on one device, it hands both on unchanged.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is None or type(hook).__name__ != "AlignDevicesHook" or hook.offload:
        return False
    # A patch older than accelerate's is the method that accelerate keeps, a newer one hides accelerate's.
    outermost = getattr(module.__dict__["forward"], "func", None)
    innermost = module.__dict__.get("_old_forward")
    if getattr(outermost, "__module__", None) != "accelerate.hooks":
        return False
    if not isinstance(innermost, MethodType) or innermost.__func__ is not type(module).forward:
        return False
    return all(value.device == parameter.device for value in inputs for parameter in module.parameters())
