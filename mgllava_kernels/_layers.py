"""When a module may hand its layers' parameters to a fused op."""

from torch import Tensor, nn


def are_plain(*layers: nn.Module) -> bool:
    """Whether each layer does what its weight and bias say.

    Quantised replacements, adapters, offloading hooks and tensor subclasses act inside the layer's own call;
    a module that finds one composes its layers instead of fusing them.
    """
    return all(
        type(layer) in (nn.Linear, nn.Conv2d)
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and type(layer.weight) in (nn.Parameter, Tensor)
        for layer in layers
    )
