"""The high-resolution tower: stem and stages of a timm ConvNeXt, all four stage outputs kept."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mgllava import MGLlavaHighResConfig


class MGLlavaHighResTower(nn.Module):
    """CLIP ConvNeXt without its final norm and head (paper section 3.1).

    Parameters keep timm's names (`stem.*`, `stages.*`), so open_clip weights load by prefix alone.

    Raises:
        ValueError: if timm has no such ConvNeXt, or its widths are not `config.stage_widths`.
    """

    def __init__(self, config: MGLlavaHighResConfig):
        super().__init__()
        # timm imports torchvision, which a mismatched build breaks; nothing else here needs either.
        import timm
        from timm.models.convnext import ConvNeXt

        if not timm.is_model(config.architecture):
            raise ValueError(
                f"high_res_config.architecture is {config.architecture!r}; timm knows no such model"
            )
        trunk = timm.create_model(config.architecture, pretrained=False, **(config.model_kwargs or {}))
        if not isinstance(trunk, ConvNeXt):
            raise ValueError(
                f"high_res_config.architecture is {config.architecture!r}; expected a timm ConvNeXt, "
                f"got {type(trunk).__name__}"
            )
        widths = [info["num_chs"] for info in trunk.feature_info]
        if widths != list(config.stage_widths):
            raise ValueError(
                f"{config.architecture} has stage widths {widths}; high_res_config.stage_widths says "
                f"{list(config.stage_widths)}"
            )
        self.config = config
        self.stem = trunk.stem
        self.stages = trunk.stages

    @property
    def dtype(self) -> torch.dtype:
        return self.stem[0].weight.dtype

    def forward(self, pixel_values_high_res: Tensor) -> list[Tensor]:
        """Encode canvases.

        Args:
            pixel_values_high_res: (B, 3, S_h, S_h), normalised, in the tower's dtype.

        Returns:
            The stages' outputs, finest first, each (B, C_l, H_l, W_l).
        """
        features = self.stem(pixel_values_high_res)
        stages = []
        for stage in self.stages:
            features = stage(features)
            stages.append(features)
        return stages

    def reset_parameters(self) -> None:
        """Initialise as ConvNeXt does (arXiv 2201.03545, appendix A)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                init.trunc_normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif getattr(module, "weight", None) is not None:  # timm has several kinds of norms
                init.ones_(module.weight)
                if getattr(module, "bias", None) is not None:
                    init.zeros_(module.bias)
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                init.constant_(module.gamma, self.config.layer_scale_init)
