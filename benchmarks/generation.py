"""Tokens per second: a whole greedy answer, pictures and prompt included."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.benchmark import Benchmark, Function, Provider, all_threads, code_of, package_providers
from benchmarks.first_token import logits_shape, make_inputs
from benchmarks.models import MODEL_FILES, encoded, original_flow, parameters, reference_flow, threaded_flow
from benchmarks.original import ONE_THREAD, extra_flow, too_many_bins
from benchmarks.shapes import GENERATION, TINY_MODEL, Sizes

NEW_TOKENS = 32


def _answer(model: Any, input_ids: Tensor, **inputs: Any) -> Sequence[Tensor]:
    """The logits of the first new token: random weights make later ones a matter of luck."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=input_ids.new_ones(input_ids.shape),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **inputs,
    )
    return (output.logits[0][:, :-2].to(model.dtype),)


def _composed(flow: Function, model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    """The model behind tokens that `flow` makes of pictures."""
    return _answer(model, input_ids, mm_encoder_outputs=encoded(flow(model.model, **pictures)))


def _package(model: Any, input_ids: Tensor, **pictures: Tensor) -> Sequence[Tensor]:
    return _answer(model, input_ids, **pictures)


def _tokens(sizes: Sizes) -> int:
    return sizes["images"] * NEW_TOKENS


BENCHMARK = Benchmark(
    name="generation",
    cases=GENERATION,
    tiny=TINY_MODEL,
    inputs=make_inputs,
    output_shapes=lambda sizes: [logits_shape(sizes)],
    providers=(
        Provider(
            "original", partial(_composed, original_flow), extra_flow, too_many_bins, cpu_note=ONE_THREAD
        ),
        all_threads("original", partial(_composed, threaded_flow), extra_flow),
        *package_providers(_package),
    ),
    function=_package,
    code=code_of(
        "generation",
        "first_token",
        *MODEL_FILES,
        model=True,
    ),
    reference=partial(_composed, reference_flow),
    in_float64=False,
    parameters=parameters,
    graph=False,  # transformers waits for the device
    rate=("tokens_per_second", _tokens),
)
