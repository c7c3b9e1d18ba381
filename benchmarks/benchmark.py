"""What a benchmark of an op consists of: inputs, providers, cost; and one call of a provider in a mode."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.roofline import Cost
from benchmarks.shapes import Case, Sizes
from mgllava_kernels import use_backend

# Arguments by name: tensors, lists of tensors, modules, numbers. Boxes get no gradient and stay float32.
Inputs = dict[str, Any]
Function = Callable[..., Sequence[Tensor]]
ExtraBytes = Callable[[Sizes, torch.dtype, str], int]
NOT_CONVERTED = ("boxes",)
NOT_DIFFERENTIATED = ("boxes", "pixel_values", "pixel_values_high_res")

# What decides the numbers of any row: how providers are called, checked, timed and counted, what they are given. What
# only chooses cases or shows rows is left out: a word in it would make every measured row old.
MEASURING = ("benchmark", "boxes", "check", "literal", "memory", "original", "roofline", "threaded", "timing")


def code_of(*files: str, model: bool = False) -> tuple[str, ...]:
    """As git's pathspecs, the code that decides the times of a benchmark.

    Args:
        files: modules of `benchmarks` beside MEASURING: the benchmark's own and those that it borrows from.
        model: it runs the model, too.
    """
    packages = ("mgllava", "mgllava_kernels") if model else ("mgllava_kernels",)
    return (*packages, ":!*.md", *(f"benchmarks/{name}.py" for name in (*MEASURING, *files)))


@dataclass(frozen=True)
class Provider:
    """Something that computes the op.

    Args:
        name: as in the rows.
        function: takes the inputs by name and returns the results.
        extra_bytes: estimate of its peak memory above the inputs, if it can be more than a machine has.
        impossible: why it cannot compute these sizes anywhere, asked before it starts; None: it can.
        gpu_only: why it is measured on GPUs only, unless it is asked for by name; None if it is not.
        needs_gpu: it cannot be timed anywhere else.
        cpu_only: why it is of use on a CPU only; None if it is not.
        modes: what it can compute.
        dtypes: names of those in which it computes the op; None: all.
        on_request: why it does not run now, asked at each run; None: it does.
        leniency: what its tolerance is multiplied by, if it computes nearly the same thing.
        cpu_note: what its times on a CPU should be read with.
        compile_seconds: about how long a GPU's case takes to compile; such providers are measured last.
    """

    name: str
    function: Function
    extra_bytes: ExtraBytes | None = None
    impossible: Callable[[Sizes], str | None] = lambda sizes: None
    gpu_only: str | None = None
    needs_gpu: bool = False
    cpu_only: str | None = None
    modes: tuple[str, ...] = ("forward", "backward", "both")
    dtypes: tuple[str, ...] | None = None
    on_request: Callable[[], str | None] = lambda: None
    leniency: float = 1.0
    cpu_note: str | None = None
    compile_seconds: float = 0.0

    @property
    def compiled(self) -> bool:
        """It is compiled anew for each case."""
        return self.compile_seconds > 0

    def obstacle(self, device: torch.device, dtype: str, mode: str, by_name: bool) -> str | None:
        """Why it does not run in this dtype and mode on this device, or None."""
        if mode not in self.modes:
            return f"computes {' and '.join(self.modes)} only"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"computes the op in {' and '.join(self.dtypes)} only"
        reason = self.on_request()
        if reason is not None or device.type == "cuda":
            return reason or self.cpu_only
        if self.needs_gpu:
            return "needs a GPU: times of Triton's interpreter say nothing"
        return None if by_name else self.gpu_only


@dataclass(frozen=True)
class Benchmark:
    """One op.

    Args:
        name: as in the rows.
        cases: its sizes.
        tiny: sizes that warm up a process, and of the tests.
        inputs: makes the inputs in float32 from sizes and a generator, on torch's default device, with the strides
            that the model hands over.
        output_shapes: of the results.
        providers: the baseline first.
        function: this package's public function on the inputs, on whatever backend is active.
        code: as git's pathspecs, the files that another version of makes measured rows old.
        cost: bytes and FLOPs of a case in a mode.
        dtypes: names of the dtypes measured by default on a GPU; on a CPU it is float32.
        reference: what the results are compared with, if not `function` on the `reference` path.
        source: in words, where the reference is from if it is no literal composition.
        in_float64: the reference is computed in float64; else (whole models) half precision is compared with
            float32, for a GPU does not hold seven billion parameters in float64 beside their measured selves.
        parameters: of a whole model, how many it has: making and widening it takes most of a GPU's time.
        rate: name of a number per second in the rows' `details`, and how many of them a call makes.
        graph: a CUDA graph can hold a call: nothing in it waits for the device.
        on_cpu: it is work of the CPU, measured there whatever the other benchmarks run on.
        frozen: inputs that get no gradient, beside those that never do.
    """

    name: str
    cases: tuple[Case, ...]
    tiny: Sizes
    inputs: Callable[[Sizes, torch.Generator], Inputs]
    output_shapes: Callable[[Sizes], list[tuple[int, ...]]]
    providers: tuple[Provider, ...]
    function: Function
    code: tuple[str, ...]
    cost: Callable[[Sizes, torch.dtype, str], Cost] | None = None
    dtypes: tuple[str, ...] = ("bfloat16",)
    reference: Function | None = None
    source: str | None = None
    in_float64: bool = True
    parameters: Callable[[Sizes], int] | None = None
    rate: tuple[str, Callable[[Sizes], int]] | None = None
    graph: bool = True
    on_cpu: bool = False
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Inputs of one case, and the gradients of its results."""

    inputs: Inputs
    grads: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient: floating tensors, and parameters that learn, in the order of the inputs."""
        values = [value for name, value in self.inputs.items() if name not in NOT_DIFFERENTIATED]
        return [tensor for tensor in _tensors(values) if tensor.requires_grad]

    @property
    def nbytes(self) -> int:
        """Memory of the inputs."""
        return sum(tensor.nbytes for tensor in _tensors(list(self.inputs.values())))

    def sums(self) -> list[float]:
        """Of each tensor: differ where somebody wrote to it."""
        tensors = [*_tensors(list(self.inputs.values())), *self.grads]
        return [tensor.detach().sum(dtype=torch.float64).item() for tensor in tensors]

    def restore(self, fresh: "Problem") -> None:
        """Take over the numbers of a problem that was made alike, unnoticed by backward passes that wait."""
        own = [*_tensors(list(self.inputs.values())), *self.grads]
        others = [*_tensors(list(fresh.inputs.values())), *fresh.grads]
        for tensor, other in zip(own, others, strict=True):
            tensor.data.copy_(other)

    def widened(self, dtype: torch.dtype) -> "Problem":
        """The same numbers and strides in a wider dtype."""
        inputs = {name: _converted(_copied(value), dtype) for name, value in self.inputs.items()}
        return Problem(inputs, [grad.to(dtype) for grad in self.grads])


def make_problem(
    benchmark: Benchmark, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Random inputs of a benchmark and random gradients of its results, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        made = benchmark.inputs(sizes, generator)
    inputs = {}
    for name, value in made.items():
        inputs[name] = _converted(value, None if name in NOT_CONVERTED else dtype, device)
        for tensor in _tensors(inputs[name]):
            if tensor.is_leaf and not isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(name not in (*NOT_DIFFERENTIATED, *benchmark.frozen))
    # Their mean is one: the gate's gradient, a sum over a whole picture, would otherwise be mostly cancellation.
    grads = [
        (1 + torch.randn(shape, generator=generator, device=device)).to(dtype)
        for shape in benchmark.output_shapes(sizes)
    ]
    return Problem(inputs, grads)


def make_call(function: Function, problem: Problem, mode: str) -> Callable[[], list[Tensor]]:
    """One call of a provider: results (`forward`), gradients (`backward`), or both, as a list.

    `backward` runs the forward pass now and only its backward pass at each call.
    """
    inputs, leaves, grads = problem.inputs, problem.leaves, problem.grads

    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(function(**inputs))

        return forward

    if mode == "backward":
        results = list(function(**inputs))

        def backward() -> list[Tensor]:
            return list(
                torch.autograd.grad(results, leaves, grads, retain_graph=True, materialize_grads=True)
            )

        return backward

    def both() -> list[Tensor]:
        results = list(function(**inputs))
        return results + list(torch.autograd.grad(results, leaves, grads, materialize_grads=True))

    return both


def on_backend(backend: str, function: Function) -> Function:
    """`function` with one of this package's backends."""

    def call(**inputs: Any) -> Sequence[Tensor]:
        with use_backend(backend):
            return function(**inputs)

    return call


def package_providers(function: Function) -> tuple[Provider, ...]:
    """This package's paths."""
    return (
        Provider("torch", on_backend("torch", function)),
        Provider("triton", on_backend("triton", function), needs_gpu=True),
    )


COMPILED_ON_GPUS = "compiled rivals run on a GPU, elsewhere when named with --provider"
# Name, mode of torch.compile, and an estimate of the seconds that it takes, not yet measured on a GPU.
COMPILATIONS = (("compiled", "default", 15.0), ("max-autotune", "max-autotune", 45.0))
PARALLEL_ON_GPUS = "on a GPU torchvision's RoIAlign runs on all of it"


def original_providers(
    function: Function,
    extra_bytes: ExtraBytes,
    impossible: Callable[[Sizes], str | None] = lambda sizes: None,
    cpu_note: str | None = None,
    threaded: Function | None = None,
) -> tuple[Provider, ...]:
    """The original composition as it is, compiled, and if it has a RoIAlign, with that on all threads of a CPU."""
    parallel = [] if threaded is None else [all_threads("original", threaded, extra_bytes)]
    return (
        Provider("original", function, extra_bytes, impossible, cpu_note=cpu_note),
        *parallel,
        *(
            Provider(
                f"original {name}",
                partial(_compiled, function, mode),
                extra_bytes,
                impossible,
                gpu_only=COMPILED_ON_GPUS,
                compile_seconds=seconds,
            )
            for name, mode, seconds in COMPILATIONS
        ),
    )


def all_threads(name: str, function: Function, extra_bytes: ExtraBytes | None = None) -> Provider:
    """A rival with `threaded.roi_align`, whose parts stay below what torchvision counts."""
    return Provider(f"{name}, all threads", function, extra_bytes, cpu_only=PARALLEL_ON_GPUS)


_compilations: dict[tuple[Function, str], Function] = {}


def _compiled(function: Function, mode: str, **inputs: Any) -> Sequence[Tensor]:
    if (function, mode) not in _compilations:
        # They take seconds to import, too.
        from torch._inductor import list_mode_options, select_algorithm

        # Graphs are this program's own business: it measures with and without. A donated buffer would not
        # survive the repeated backward passes.
        torch._functorch.config.donated_buffer = False
        select_algorithm.PRINT_AUTOTUNE = False
        options = dict(list_mode_options(mode)) | {"triton.cudagraphs": False}
        _compilations[function, mode] = torch.compile(function, options=options, dynamic=False)
    return _compilations[function, mode](**inputs)


def forget_compilations() -> None:
    """Let go of compiled code, so that the next case is compiled for its own sizes."""
    if _compilations:
        _compilations.clear()
        torch._dynamo.reset()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in an input."""
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _copied(value: Any) -> Any:
    """A module that can be converted without the original, which tensors need not be."""
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return copy.deepcopy(value) if isinstance(value, nn.Module) else value


def _converted(value: Any, dtype: torch.dtype | None, device: torch.device | None = None) -> Any:
    """An input with its floating tensors in another dtype, on another device; modules are changed in place."""
    if isinstance(value, nn.Module):
        return value.to(device, dtype)
    if isinstance(value, Tensor):
        converted = value.detach().to(device, dtype if value.is_floating_point() else None)
        if converted.stride() != value.stride():
            # Of a view with gaps, such as tokens without their class token, `to` makes a dense tensor.
            dense = converted
            converted = torch.empty_strided(
                value.shape, value.stride(), dtype=dense.dtype, device=dense.device
            )
            converted.copy_(dense)
        return converted.requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return [_converted(item, dtype, device) for item in value]
    return value
