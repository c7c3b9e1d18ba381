"""Oracles written as loops over scalars, from the definitions alone; they share no code with the package."""

import math

import torch
from torch import Tensor


def _gather(values, y: float, x: float):
    """Bilinear value of `values`, nested lists [row][column] of channel vectors, by RoIAlign's edge rules."""
    height, width = len(values), len(values[0])
    if y < -1 or y > height or x < -1 or x > width:
        return None
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = int(y), int(x)
    if top >= height - 1:
        top = bottom = height - 1
        y = float(top)
    else:
        bottom = top + 1
    if left >= width - 1:
        left = right = width - 1
        x = float(left)
    else:
        right = left + 1
    down, along = y - top, x - left
    return [
        (1 - down) * ((1 - along) * a + along * b) + down * ((1 - along) * c + along * d)
        for a, b, c, d in zip(
            values[top][left], values[top][right], values[bottom][left], values[bottom][right], strict=True
        )
    ]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign of (B, C, H, W) at boxes (K, 5), in Python floats (float64)."""
    maps = input.double().permute(0, 2, 3, 1).tolist()
    channels = input.shape[1]
    rows, columns = output_size
    output = torch.zeros(len(boxes), channels, rows, columns, dtype=torch.float64)
    shift = 0.5 if aligned else 0.0
    for k, (image, x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = x1 * spatial_scale - shift, y1 * spatial_scale - shift
        box_width, box_height = x2 * spatial_scale - shift - left, y2 * spatial_scale - shift - top
        if not aligned:
            box_width, box_height = max(box_width, 1.0), max(box_height, 1.0)
        bin_height, bin_width = box_height / rows, box_width / columns
        points_y = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_height)
        points_x = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_width)
        for row in range(rows):
            for column in range(columns):
                total = [0.0] * channels
                for i in range(points_y):
                    for j in range(points_x):
                        y = top + row * bin_height + (i + 0.5) * bin_height / points_y
                        x = left + column * bin_width + (j + 0.5) * bin_width / points_x
                        value = _gather(maps[int(image)], y, x)
                        if value is not None:
                            total = [a + b for a, b in zip(total, value, strict=True)]
                samples = max(points_y, 0) * max(points_x, 0)
                for channel in range(channels):
                    output[k, channel, row, column] = total[channel] / max(samples, 1)
    return output


def upsample(map_: Tensor, height: int, width: int) -> Tensor:
    """Bilinear upsampling (align_corners=False) of (B, C, h, w) to (B, C, height, width)."""
    batch, channels, old_height, old_width = map_.shape
    output = torch.zeros(batch, channels, height, width, dtype=torch.float64)
    for row in range(height):
        y = max((row + 0.5) * old_height / height - 0.5, 0.0)
        top = min(int(y), old_height - 1)
        bottom = min(top + 1, old_height - 1)
        for column in range(width):
            x = max((column + 0.5) * old_width / width - 0.5, 0.0)
            left = min(int(x), old_width - 1)
            right = min(left + 1, old_width - 1)
            down, along = y - top, x - left
            output[:, :, row, column] = (1 - down) * (
                (1 - along) * map_[:, :, top, left] + along * map_[:, :, top, right]
            ) + down * ((1 - along) * map_[:, :, bottom, left] + along * map_[:, :, bottom, right])
    return output


def pooled_roi_align(
    features: list[Tensor], boxes: Tensor, output_size: tuple[int, int], **options
) -> Tensor:
    """Mean over the bins of RoIAlign on the levels, upsampled to the first and concatenated."""
    height, width = features[0].shape[2:]
    maps = torch.cat([upsample(level.double(), height, width) for level in features], dim=1)
    return roi_align(maps, boxes, output_size, **options).mean(dim=(2, 3))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(x: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    return [
        sum(w * value for w, value in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def mlp_projector(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Linear, GELU, Linear of (N, K)."""
    first, second = (w1.tolist(), b1.tolist()), (w2.tolist(), b2.tolist())
    rows = [linear([gelu(value) for value in linear(row, *first)], *second) for row in x.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def depthwise_conv_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """GELU of the depthwise 7x7 convolution with padding 3 of tokens (B, height·width, D)."""
    output = torch.zeros(tokens.shape, dtype=torch.float64)
    values, kernel = tokens.tolist(), weight.tolist()
    for image in range(tokens.shape[0]):
        for row in range(height):
            for column in range(width):
                for d in range(tokens.shape[2]):
                    total = bias[d].item()
                    for i in range(7):
                        for j in range(7):
                            y, x = row + i - 3, column + j - 3
                            if 0 <= y < height and 0 <= x < width:
                                total += kernel[d][0][i][j] * values[image][y * width + x][d]
                    output[image, row * width + column, d] = gelu(total)
    return output


def conv_gate_fusion(
    low_res: Tensor, high_res: Tensor, parameters: dict[str, Tensor], variant: str
) -> Tensor:
    """Conv-Gate fusion of (B, N, D) and (B, C, H, W); `parameters` by the names of `ConvGateFusion`."""
    height, width = high_res.shape[2:]
    high = high_res.flatten(2).transpose(1, 2).tolist()
    if variant == "concat_raw":
        return torch.cat([low_res.double(), torch.tensor(high, dtype=torch.float64)], dim=-1)

    def layer(name: str) -> tuple[list, list]:
        return parameters[f"{name}.weight"].flatten(1).tolist(), parameters[f"{name}.bias"].tolist()

    f = depthwise_conv_gelu(
        low_res, parameters["low_res_conv.weight"], parameters["low_res_conv.bias"], height, width
    ).tolist()
    images = []
    for image, tokens in enumerate(low_res.tolist()):
        low, projected = [], []
        for n, token in enumerate(tokens):
            s = [gelu(value) for value in linear(high[image][n], *layer("high_res_conv"))]
            projected.append(linear(s, *layer("high_res_proj")))
            update = linear(f[image][n], *layer("low_res_proj"))
            low.append([a + b for a, b in zip(token, update, strict=True)])
        gate = 1.0
        if variant.startswith("gate"):
            joined = [a + b for a, b in zip(low, projected, strict=True)]
            means = [sum(column) / len(joined) for column in zip(*joined, strict=True)]
            hidden = [gelu(value) for value in linear(means, *layer("gate_in"))]
            gate = math.tanh(linear(hidden, *layer("gate_out"))[0])
        gated = [[gate * value for value in token] for token in projected]
        if variant == "gate_sum":
            images.append(
                [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(low, gated, strict=True)]
            )
        else:
            images.append([a + b for a, b in zip(low, gated, strict=True)])
    return torch.tensor(images, dtype=torch.float64)
