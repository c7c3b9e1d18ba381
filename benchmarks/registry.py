"""All benchmarks by name: the neck first, then its ops, then whole models."""

from benchmarks import (
    conv_gate,
    conversion,
    first_token,
    generation,
    neck,
    pooled_roi_align,
    preprocessing,
    projectors,
    roi_align,
    training_step,
    vision_flow,
)

OPS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (neck, pooled_roi_align, conv_gate, projectors, roi_align)
}
MODELS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (vision_flow, first_token, generation, training_step, preprocessing, conversion)
}
BENCHMARKS = OPS | MODELS
