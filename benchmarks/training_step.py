"""A step of stage 1: loss of the whole model, and its gradients to fusion and projectors.

The optimiser's update, 60 million parameters with AdamW, is the same for everyone and left out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Generator, Tensor

from benchmarks.benchmark import (
    Benchmark,
    Function,
    Inputs,
    Provider,
    all_threads,
    code_of,
    package_providers,
)
from benchmarks.first_token import make_inputs
from benchmarks.models import MODEL_FILES, encoded, original_flow, parameters, reference_flow, threaded_flow
from benchmarks.original import ONE_THREAD, extra_flow, too_many_bins
from benchmarks.shapes import TINY_MODEL, TRAINING_STEP, Sizes


def _inputs(sizes: Sizes, generator: Generator) -> Inputs:
    from mgllava.training.stages import choose_learners

    inputs = make_inputs(sizes, generator)
    choose_learners(inputs["model"], stage=1)
    # Towers stay in eval mode; nothing else in the model behaves differently in training.
    return inputs


def _composed(flow: Function, model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    """The model behind tokens that `flow` makes of pictures."""
    features = encoded(flow(model.model, **pictures))
    return _loss(model, model(input_ids=input_ids, labels=input_ids, mm_encoder_outputs=features))


def _package(model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    return _loss(model, model(input_ids=input_ids, labels=input_ids, **pictures))


def _loss(model: Any, output: Any) -> tuple[Tensor]:
    return (output.loss.to(model.dtype),)


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    return [()]


BENCHMARK = Benchmark(
    name="training_step",
    cases=TRAINING_STEP,
    tiny=TINY_MODEL,
    inputs=_inputs,
    output_shapes=_output_shapes,
    providers=(
        Provider(
            "original", partial(_composed, original_flow), extra_flow, too_many_bins, cpu_note=ONE_THREAD
        ),
        all_threads("original", partial(_composed, threaded_flow), extra_flow),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of(
        "training_step",
        "first_token",
        *MODEL_FILES,
        model=True,
    ),
    reference=partial(_composed, reference_flow),
    in_float64=False,
    parameters=parameters,
    graph=False,  # transformers waits for the device
    rate=("pictures_per_second", lambda sizes: sizes["images"]),
)
