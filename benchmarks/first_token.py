"""Time to first token: pictures and prompt to the logits of the first answer token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import (
    Benchmark,
    Function,
    Inputs,
    Provider,
    all_threads,
    code_of,
    package_providers,
)
from benchmarks.models import (
    MODEL_FILES,
    encoded,
    make_model,
    original_flow,
    parameters,
    picture_inputs,
    prompt,
    reference_flow,
    threaded_flow,
)
from benchmarks.original import ONE_THREAD, extra_flow, too_many_bins
from benchmarks.shapes import FIRST_TOKEN, TINY_MODEL, Sizes, model_width, tokens_of


def make_inputs(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """A model, pictures, and a prompt with each."""
    return {
        "model": make_model(sizes, generator),
        **picture_inputs(sizes, generator),
        "input_ids": prompt(sizes, generator),
    }


def logits_shape(sizes: Sizes) -> tuple[int, ...]:
    """Of one position of each row."""
    return sizes["images"], sizes["vocabulary"]


def _composed(flow: Function, model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    """The model behind tokens that `flow` makes of pictures."""
    features = encoded(flow(model.model, **pictures))
    return _results(model(input_ids=input_ids, mm_encoder_outputs=features, logits_to_keep=1))


def _package(model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    return _results(model(input_ids=input_ids, logits_to_keep=1, **pictures))


def _results(output: Any) -> tuple[Tensor, Tensor]:
    """The logits without the placeholders', which are the lowest number there is, and the pictures' tokens."""
    return output.logits[:, -1, :-2], output.image_hidden_states


def _output_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    tokens = tokens_of(sizes) + sizes["boxes"]
    return [logits_shape(sizes), (sizes["images"], tokens, model_width(sizes))]


BENCHMARK = Benchmark(
    name="first_token",
    cases=FIRST_TOKEN,
    tiny=TINY_MODEL,
    inputs=make_inputs,
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
        "first_token",
        *MODEL_FILES,
        model=True,
    ),
    reference=partial(_composed, reference_flow),
    in_float64=False,
    parameters=parameters,
    graph=False,  # transformers waits for the device
)
