"""`conv_gate_fusion` and `depthwise_conv_gelu` on Triton: on the GPU where there is one, else interpreted."""

from contextlib import ExitStack, contextmanager
from importlib import import_module

import naive
import pytest
import torch
from kernel_cases import (
    GOLDEN_TOLERANCE,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    as_accurate,
    golden,
    golden_fusion,
    relative_error,
)
from test_conv_gate import LAYERED, VARIANTS, ordered_parameters, parameters_of
from test_conv_gate import fusion as fusion_on_cpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from mgllava_kernels import (
    ConvGateFusion,
    active_backend,
    configs,
    conv_gate_fusion,
    depthwise_conv_gelu,
    use_backend,
)
from mgllava_kernels._triton import conv_gate as implementation
from mgllava_kernels._triton import depthwise, dual_product, gate_head, launch, products
from mgllava_kernels._triton.product_configs import ONE_A_TILE, POINTERS, TMA, product_config
from mgllava_kernels._workloads import maps
from mgllava_kernels.aot import TARGETS

# No multiples of 16, and neither of the other.
SIZES = {"low_dim": 21, "high_dim": 35}


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def fusion(variant="gate_sum", low_dim=6, high_dim=10, dtype=torch.float32):
    return fusion_on_cpu(variant, low_dim, high_dim, dtype).to(KERNEL_DEVICE)


def inputs(images=2, height=3, width=4, low_dim=6, high_dim=10, dtype=torch.float32):
    shapes = (images, height * width, low_dim), (images, high_dim, height, width)
    return tuple(torch.randn(shape, device=KERNEL_DEVICE).to(dtype).requires_grad_() for shape in shapes)


def convolution(images=2, height=3, width=4, channels=6, dtype=torch.float32):
    """Tokens, weight and bias."""
    shapes = (images, height * width, channels), (channels, 1, 7, 7), (channels,)
    return [torch.randn(shape, device=KERNEL_DEVICE).to(dtype).requires_grad_() for shape in shapes]


def run(path, module, values, grad=None):
    """The output, and with `grad` the gradients of both inputs and of every parameter."""
    with use_backend(path):
        output = module(*values)
        if grad is None:
            return output
        gradients = torch.autograd.grad(output, [*values, *module.parameters()], grad.to(output.dtype))
    return output, gradients


def exact(module, values, grad):
    wide = ConvGateFusion(module.low_res_dim, module.high_res_dim, module.variant).double().to(KERNEL_DEVICE)
    wide.load_state_dict(module.state_dict())
    return run("reference", wide, [value.detach().double().requires_grad_() for value in values], grad)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_yardstick(module, values):
    """Output, gradients of the inputs, and gradients of the parameters, as accurate as the composition's."""
    grad = torch.randn_like(run("torch", module, values))
    results = run("triton", module, values, grad), run("reference", module, values, grad)
    results = *results, exact(module, values, grad)
    assert as_accurate(*(output for output, _ in results))
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        assert as_accurate(*(flat(gradients[part]) for _, gradients in results))


@contextmanager
def forced(product=None, weight=None, convolution=None, taps=None, rows=None):
    """Launch with these block sizes, warps and stages, whatever the heuristic says."""
    target = launch.target_of(torch.device(KERNEL_DEVICE))

    def tiles(tile, group, programs, copies=POINTERS):
        return product_config(target, tile, 4, 2, group=group, programs=programs, descriptors=copies)

    choices = (
        (implementation.PRODUCT, tiles, product),
        (dual_product.DUAL, tiles, product),
        (implementation.WEIGHT, tiles, weight),
        (depthwise.CONVOLUTION, depthwise._convolution_config, convolution),
        (depthwise.WEIGHT, depthwise._weight_config, taps),
        (gate_head.ROWS, gate_head._config, rows),
        (gate_head.COLUMNS, gate_head._config, rows),
    )
    with ExitStack() as stack:
        for space, config, numbers in choices:
            if numbers is not None:
                stack.enter_context(configs.force(space.kernel, config(*numbers)))
        yield


def test_triton_is_what_runs():
    for op in ("conv_gate_fusion", "depthwise_conv_gelu"):
        assert active_backend(inputs()[0], op).name == "triton"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_golden_output_and_every_gradient(dtype):
    values = {name: value.to(KERNEL_DEVICE) for name, value in golden("conv_gate").items()}
    module = ConvGateFusion(32, 48)
    module.load_state_dict(golden_fusion(values, "param"))
    module = module.to(KERNEL_DEVICE, dtype)
    maps = [values[name].to(dtype).requires_grad_() for name in ("low_res", "high_res")]
    if dtype != torch.float32:
        return check_yardstick(module, maps)
    output, gradients = run("triton", module, maps, values["grad_output"])
    assert relative_error(output, values["output"]) < GOLDEN_TOLERANCE
    assert relative_error(gradients[0], values["grad_low_res"]) < GOLDEN_TOLERANCE
    assert relative_error(gradients[1], values["grad_high_res"]) < GOLDEN_TOLERANCE
    expected = golden_fusion(values, "grad")
    for (name, _), gradient in zip(module.named_parameters(), gradients[2:], strict=True):
        assert relative_error(gradient, expected[name]) < GOLDEN_TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_golden_variants(variant):
    values = golden("conv_gate")
    module = ConvGateFusion(32, 48, variant)
    state = golden_fusion(values, "param")
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    output = module.to(KERNEL_DEVICE)(*(values[name].to(KERNEL_DEVICE) for name in ("low_res", "high_res")))
    assert relative_error(output.cpu(), values[f"output_{variant}"]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_of_the_naive_loop(variant):
    module, values = fusion(variant), inputs(height=5, width=4)
    parameters = {name: value.double().cpu() for name, value in module.named_parameters()}
    expected = naive.conv_gate_fusion(*(value.double().cpu() for value in values), parameters, variant)
    assert relative_error(module(*values).cpu(), expected) < 1e-6


@pytest.mark.parametrize("variant", LAYERED)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_as_accurate_as_the_composition(dtype, variant):
    check_yardstick(fusion(variant, **SIZES, dtype=dtype), inputs(height=4, width=3, **SIZES, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "size", [(0, 3, 2, 3, 5), (1, 1, 1, 3, 5), (1, 1, 5, 2, 1), (2, 4, 1, 16, 8)], ids=str
)
def test_odd_sizes(variant, size):
    """(B, H, W, D, C): no picture, one token, one row and one hidden element, one column."""
    *_, low_dim, high_dim = size
    module, values = fusion(variant, low_dim, high_dim), inputs(*size)
    output = run("torch", module, values)
    grad = torch.randn_like(output)
    output, gradients = run("triton", module, values, grad) if variant in LAYERED else (output, ())
    expected, expected_gradients = run("reference", module, values, grad)
    assert relative_error(output, expected) < 1e-6
    for gradient, value in zip(gradients, expected_gradients, strict=False):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "choices",
    [
        {
            "product": ((16, 64, 16), 1, ONE_A_TILE),
            "weight": ((64, 16, 16), 1, ONE_A_TILE),
            "rows": (1, 16, 16, 4),
        },
        {"product": ((64, 16, 64), 4, 1), "weight": ((16, 64, 16), 4, 1), "rows": (4, 64, 32, 4)},
    ],
    ids=["flat", "tall"],
)
def test_block_sizes_change_nothing(choices):
    """Several tiles on every axis, more than programs and fewer, and pictures in a tile's sums."""
    module, values = fusion(low_dim=18, high_dim=20), inputs(3, 5, 4, 18, 20)
    grad = torch.randn_like(run("torch", module, values))
    expected, expected_gradients = run("reference", module, values, grad)
    with forced(**choices):
        output, gradients = run("triton", module, values, grad)
    assert relative_error(output, expected) < 1e-6
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):  # the gate's single numbers are sums that cancel
        assert relative_error(flat(gradients[part]), flat(expected_gradients[part])) < 1e-5


@pytest.mark.parametrize(("shape", "joined"), [((1, 300), True), ((3, 100), True), ((6, 64), False)], ids=str)
def test_a_weight_gradient_in_parts_over_tokens(monkeypatch, shape, joined):
    """Pictures whose tokens follow each other are taken as one; then the depth is cut, and else the pictures."""
    added = []
    run = products.add_parts
    monkeypatch.setattr(products, "add_parts", lambda sums: (added.extend(sums), run(sums)))
    grad = torch.randn(*shape, 18, device=KERNEL_DEVICE)
    x = torch.randn(*shape, 20, device=KERNEL_DEVICE)
    if not joined:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows, columns = (torch.randn(2, width, device=KERNEL_DEVICE) for width in (18, 20))
    gradient = torch.empty(18, 20, device=KERNEL_DEVICE)
    with forced(weight=((32, 32, 16), 2, 1)):
        one = implementation._weight_product(grad, x, gradient, (rows, columns))
        assert one.batch == ("none" if joined else "depth")
        products.multiply(products.config_of_weights(implementation.WEIGHT, [one]), "none", [one])
    assert len(added[0][0]) > 1
    expected = grad.flatten(0, 1).T.double() @ x.flatten(0, 1).double() + rows.T.double() @ columns.double()
    assert relative_error(gradient, expected) < 1e-6


@pytest.mark.parametrize(
    "choices",
    [
        {"convolution": (8, 16, 1, 4), "taps": (8, 16, 3, 1, 4)},
        {"convolution": (32, 16, 5, 4), "taps": (4, 32, 1, 1, 4)},
    ],
    ids=["flat", "tall"],
)
def test_block_sizes_of_the_convolution_change_nothing(choices):
    values = convolution(1, 6, 5, 18)
    results = []
    for path in ("triton", "reference"):
        with forced(**choices), use_backend(path):
            output = depthwise_conv_gelu(*values, height=6, width=5)
            results.append([output, *torch.autograd.grad(output, values, torch.ones_like(output))])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-6


def test_results_of_several_pictures_are_never_cut_over_the_depth():
    """As few tiles as here, and as long a depth, had their product cut if it were of one matrix."""
    a, b = (torch.randn(*shape, device=KERNEL_DEVICE) for shape in ((18, 256), (2, 4, 256)))
    out = torch.empty(2, 18, 4, device=KERNEL_DEVICE)
    one = products.Product(a, b, out)
    with forced(product=((32, 16, 16), 2, 1)):
        products.multiply(products.config_of_tokens(implementation.PRODUCT, [one]), "none", [one])
    assert relative_error(out, a.double() @ b.double().transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("turned", ["low_res_proj", "high_res_proj"])
def test_projections_of_different_layouts_are_not_described_as_one(turned):
    module, values = fusion("gate_sum", 16, 24), inputs(1, 2, 4, 16, 24)
    expected = run("reference", module, values)
    layer = getattr(module, turned)
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    blocks = (16, 16, 16), 2, 1, TMA
    with forced(product=blocks, weight=blocks):
        assert relative_error(run("triton", module, values), expected) < 1e-6


@pytest.mark.parametrize(
    "name", ["high_res_conv", "high_res_proj", "low_res_conv", "low_res_proj", "gate_in"]
)
def test_biases_with_gaps(name):
    module, values = fusion(), inputs()
    expected = run("reference", module, values)
    bias = getattr(module, name).bias
    bias.data = torch.stack([bias.data, torch.full_like(bias.data, 100.0)], dim=1)[:, 0]
    assert relative_error(run("triton", module, values), expected) < 1e-6


def test_channels_far_apart_in_memory():
    """Only four elements of each stretch of 2^30 are ever touched; 32 bits do not reach the last."""
    memory = torch.empty(3 * 2**30 + 4, dtype=torch.float16, device=KERNEL_DEVICE)
    tokens = memory.as_strided((1, 4, 4), (0, 1, 2**30)).copy_(torch.randn(1, 4, 4))
    weight, bias = (torch.randn(shape, device=KERNEL_DEVICE).half() for shape in ((4, 1, 7, 7), (4,)))
    expected = depthwise_conv_gelu(tokens.contiguous(), weight, bias, height=2, width=2)
    assert torch.equal(depthwise_conv_gelu(tokens, weight, bias, height=2, width=2), expected)


@pytest.mark.parametrize("variant", ["gate_sum", "concat_projected"])
@pytest.mark.parametrize("images", [1, 2])
def test_descriptors_change_no_bit(variant, images):
    """A GPU that has none takes pointers both times."""
    module, values = fusion(variant, 16, 24), inputs(images, 2, 4, 16, 24)
    grad = torch.randn_like(run("torch", module, values))
    results = []
    for copies in (POINTERS, TMA):
        blocks = (16, 16, 16), 2, 1, copies
        with forced(product=blocks, weight=blocks):
            output, gradients = run("triton", module, values, grad)
        results.append([output, *gradients])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_two_runs_have_identical_bits(dtype):
    module, values = fusion(dtype=dtype), inputs(2, 2, 3, dtype=dtype)
    grad = torch.randn(2, 6, 6, device=KERNEL_DEVICE)
    (first, first_gradients), (second, second_gradients) = (
        run("triton", module, values, grad) for _ in range(2)
    )
    for one, other in zip((first, *first_gradients), (second, *second_gradients), strict=True):
        assert torch.equal(one, other)


def test_a_picture_s_result_does_not_depend_on_its_neighbours():
    module, (low_res, high_res) = fusion(), inputs(3)
    together = module(low_res, high_res)
    for image in range(3):
        alone = module(low_res[image : image + 1], high_res[image : image + 1])
        assert relative_error(together[image : image + 1], alone) < 1e-6


@pytest.mark.parametrize(
    "layout", ["channels_last", "every other", "transposed", "expanded", "odd address", "cropped"]
)
def test_strides(layout):
    """No layout is read wrongly; contiguous and channels_last maps are not copied."""
    module, (low_res, high_res) = fusion(), inputs(height=4, width=4)
    if layout == "channels_last":
        high_res = high_res.contiguous(memory_format=torch.channels_last)
    elif layout == "every other":
        low_res = torch.stack([low_res, low_res], -1)[..., 1]
        high_res = torch.stack([high_res, high_res], -1)[..., 0]
    elif layout == "transposed":
        low_res = low_res.transpose(1, 2).contiguous().transpose(1, 2)
        high_res = high_res.transpose(2, 3)
    elif layout == "expanded":
        low_res, high_res = low_res[:1].expand(2, -1, -1), high_res[:1].expand(2, -1, -1, -1)
    elif layout == "cropped":
        high_res = torch.nn.functional.pad(high_res, (1, 2, 1, 0))[:, :, 1:, 1:5]
    else:
        low_res = torch.cat([low_res.flatten()[:1], low_res.flatten()])[1:].view_as(low_res)
        high_res = torch.cat([high_res.flatten()[:1], high_res.flatten()])[1:].view_as(high_res)
    values = [value.detach().requires_grad_() for value in (low_res, high_res)]
    grad = torch.randn(2, 6, 16, device=KERNEL_DEVICE).transpose(1, 2)
    output, gradients = run("triton", module, values, grad)
    expected, expected_gradients = run("reference", module, [value.contiguous() for value in values], grad)
    assert relative_error(output, expected) < 1e-6
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, value) < 1e-5


def test_strided_weights_and_gradients_of_a_sum():
    module, values = fusion(), inputs()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.transpose(0, 1).contiguous().transpose(0, 1)
    grad = torch.ones(1, device=KERNEL_DEVICE).expand(2, 12, 6)
    (output, gradients), (expected, expected_gradients) = (
        run(path, module, values, grad) for path in ("triton", "reference")
    )
    assert relative_error(output, expected) < 1e-6
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, value) < 1e-5


@pytest.mark.parametrize("variant", ["gate_sum", "concat_projected"])
def test_any_gradients_alone(variant):
    """What is not needed is not returned, and what is needed does not lean on it."""
    module, values = fusion(variant), [value.detach() for value in inputs(1, 2, 2)]
    weights = [value.detach() for value in ordered_parameters(module)]
    fused, *saved = implementation.conv_gate_fusion(*values, weights, variant, True)
    number = 2 + len(weights)
    grad = torch.randn_like(fused)

    def gradients(needed):
        return implementation.conv_gate_fusion_backward(grad, *values, weights, *saved, variant, needed)

    every = gradients([True] * number)
    for index in range(number):
        (alone,) = gradients([index == other for other in range(number)])
        assert relative_error(alone, every[index]) < 1e-6


def test_every_element_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        module, values = fusion(**SIZES), inputs(2, 2, 3, **SIZES)
        output, gradients = run("triton", module, values, torch.ones(2, 6, 21, device=KERNEL_DEVICE))
        assert torch.empty(3).isnan().all(), "empty memory is not poisoned"
        for value in (output, *gradients):
            assert value.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gate_near_zero_keeps_its_digits():
    for scale in (1e-4, 1e-2, 0.6, 0.63, 5.0):
        module, values = fusion("gate_concat"), inputs(1)
        with torch.no_grad():
            module.gate_out.weight *= scale
            module.gate_out.bias.zero_()
        with use_backend("reference"):
            literal = module(*values)[..., 6:]
            expected = module.double()(*(value.double() for value in values))[..., 6:]
        # The sum in front of tanh can cancel, the composition's too.
        limit = max(1e-6, 2 * relative_error(literal, expected))
        assert relative_error(module.float()(*values)[..., 6:], expected) < limit


def test_nothing_handed_in_is_changed():
    module, values = fusion(), inputs()
    grad = torch.randn(2, 12, 6, device=KERNEL_DEVICE)
    handed = [*values, grad, *module.parameters()]
    kept = [value.clone() for value in handed]
    run("triton", module, values, grad)
    for value, copy in zip(handed, kept, strict=True):
        assert torch.equal(value, copy)


def test_depthwise_values_of_the_naive_loop():
    values = convolution(2, 5, 8, 3)
    expected = naive.depthwise_conv_gelu(*(value.double().cpu() for value in values), 5, 8)
    assert relative_error(depthwise_conv_gelu(*values, height=5, width=8).cpu(), expected) < 1e-6


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("size", [(1, 5, 6, 37), (1, 1, 1, 3), (0, 2, 3, 4), (1, 2, 17, 8)], ids=str)
def test_depthwise_is_as_accurate_as_the_composition(dtype, size):
    _, height, width, _ = size
    values = convolution(*size, dtype=dtype)
    grad = torch.randn_like(values[0])
    results = []
    for path, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        given = [value.detach().to(kind).requires_grad_() for value in values]
        with use_backend(path):
            output = depthwise_conv_gelu(*given, height=height, width=width)
        results.append([output, *torch.autograd.grad(output, given, grad.to(kind))])
    for ours, composition, true in zip(*results, strict=True):
        assert ours.shape == true.shape
        assert as_accurate(ours, composition, true) or relative_error(ours, true) < torch.finfo(dtype).eps


@pytest.mark.parametrize("needed", [[True, False, False], [False, True, False], [False, False, True]])
def test_depthwise_gradients_alone(needed):
    values = [value.detach() for value in convolution()]
    output, pre_activation = implementation.depthwise_conv_gelu(*values, 3, 4, True)
    arguments = (torch.randn_like(output), *values[:2], pre_activation, 3, 4)
    (alone,) = implementation.depthwise_conv_gelu_backward(*arguments, needed)
    every = implementation.depthwise_conv_gelu_backward(*arguments, [True] * 3)
    assert torch.equal(alone, every[needed.index(True)])


@pytest.mark.parametrize(("variant", "learning"), [("gate_sum", True), ("gate_concat", False)])
def test_opcheck(variant, learning):
    module = import_module("mgllava_kernels.conv_gate")
    weights = ordered_parameters(fusion(variant).requires_grad_(learning))
    values = [value.requires_grad_(learning) for value in inputs(1, 2, 2)]
    opcheck(module._conv_gate_fusion, (*values, weights, variant, learning, "triton"))
    opcheck(module._depthwise_conv_gelu, (values[0], *weights[4:6], 2, 2, learning, "triton"))


@pytest.mark.parametrize("variant", ["gate_sum", "concat_projected"])
def test_opcheck_backward(variant):
    module = import_module("mgllava_kernels.conv_gate")
    weights = [value.detach() for value in ordered_parameters(fusion(variant, dtype=torch.float16))]
    values = [value.detach() for value in inputs(1, 2, 2, dtype=torch.float16)]
    fused, *saved = module._conv_gate_fusion(*values, weights, variant, True, "triton")
    needed = [index % 2 == 0 for index in range(2 + len(weights))]
    arguments = (torch.randn_like(fused), *values, weights, *saved, variant, needed, "triton")
    opcheck(module._conv_gate_fusion_backward, arguments)
    low_res = values[0]
    arguments = (low_res.clone(), low_res, weights[4], low_res.clone(), 2, 2, needed[:3], "triton")
    opcheck(module._depthwise_conv_gelu_backward, arguments)


def test_four_graphs_for_any_sequence_of_batch_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    module = fusion(low_dim=3, high_dim=5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *maps: module(*maps), fullgraph=True, backend=counter)
    for images in (2, 3, 1, 0, 4):
        values = inputs(images, 2, 2, 3, 5)
        output, expected = compiled(*values), run("torch", module, values)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        if images == 2:
            torch.autograd.grad(output.sum(), values)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("dtype", [torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    module, values = fusion(), inputs()
    expected = run("torch", module, values)
    with torch.autocast(KERNEL_DEVICE, dtype=dtype):
        output = module(*values)
        output.float().sum().backward()
    assert output.dtype == dtype
    assert relative_error(output, expected) < 16 * torch.finfo(dtype).eps
    assert all(value.grad.dtype == torch.float32 for value in module.parameters())


@pytest.mark.parametrize(
    ("variant", "images", "layout", "forward", "backward"),
    [
        ("gate_sum", 1, "contiguous", 6, 16),
        ("gate_sum", 32, "channels_last", 6, 15),
        ("gate_concat", 8, "contiguous", 6, 16),
        ("concat_projected", 8, "contiguous", 3, 9),
        ("concat_projected", 8, "channels_last", 3, 8),
    ],
)
def test_launches(variant, images, layout, forward, backward):
    """None more than the modules' docstrings say."""
    device = torch.device("meta")
    low_res = torch.empty(images, 576, 1024, device=device, dtype=torch.bfloat16)
    values = low_res, maps((images, 1536, 24, 24), torch.bfloat16, layout, device)
    weights = list(ConvGateFusion(1024, 1536, variant).to(device, torch.bfloat16).state_dict().values())
    launched = []
    with launch.compile_only(TARGETS["sm_90"], lambda kernel, *_: launched.append(kernel)):
        fused, *saved = implementation.conv_gate_fusion(*values, weights, variant, True)
        assert len(launched) == forward
        needed = [True] * (2 + len(weights))
        gradients = implementation.conv_gate_fusion_backward(fused, *values, weights, *saved, variant, needed)
    assert len(launched) - forward == backward
    assert [value.shape for value in gradients] == [value.shape for value in (*values, *weights)]


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: captures a CUDA graph")
def test_replays_in_a_cuda_graph():
    module, values = fusion(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    grad = torch.randn(2, 12, 6, device=KERNEL_DEVICE)
    run("triton", module, values, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = run("triton", module, values, grad)
    with torch.no_grad():
        for value in values:
            value.copy_(torch.randn_like(value))
    graph.replay()
    expected, expected_gradients = run("triton", module, values, grad)
    for value, other in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.equal(value, other)


def test_the_op_takes_the_weights_by_name():
    module, values = fusion(), inputs()
    reordered = dict(reversed(parameters_of(module).items()))
    assert torch.equal(conv_gate_fusion(*values, **reordered), module(*values))
