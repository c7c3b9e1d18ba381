"""All benchmarks of ops by name, the neck first."""

from benchmarks import conv_gate, neck, pooled_roi_align, projectors, roi_align

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (neck, pooled_roi_align, conv_gate, projectors, roi_align)
}
