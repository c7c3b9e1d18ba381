"""What training scripts do to the modules: several processes, checkpointing, autocast, state dicts, compilation.

The processes of `training_cases.py` compute on the CPU on every machine.
"""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_cases import KERNEL_DEVICE, PATHS, relative_error
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_cases import PROCESSES, SHARDINGS, SPLITS, batch, loss_of, neck

from mgllava_kernels import ConvGateFusion, Projector, use_backend

SECONDS = 600
FUSED = ["conv_gate_fusion", "grouped_mlp_projector", "pooled_roi_align"]
BOXES = (3, 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    """What each of two processes measured, by case; they run at the same time, and never for long."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).parent / "training_cases.py"
    root = str(script.parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("MGLLAVA_KERNELS", None)
    results = [folder / f"{rank}.json" for rank in range(PROCESSES)]
    logs = [folder / f"{rank}.log" for rank in range(PROCESSES)]
    running = []
    try:
        for rank, (result, log) in enumerate(zip(results, logs, strict=True)):
            command = [sys.executable, str(script), str(rank), str(folder / "store"), str(result)]
            with log.open("w") as output:
                running.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0] * PROCESSES, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads(result.read_text()) for result in results]


def assert_as_one_process(measured: list[dict], case: str, ops: list[str], tolerance: float = 1e-5) -> None:
    for result in measured:
        assert result[case]["gradients"] < tolerance
        assert result[case]["updates"] < tolerance
        assert result[case]["ops"] == ops


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("option", [None, "static_graph", "gradient_as_bucket_view"])
def test_ddp_trains_as_one_process_with_the_whole_batch(measured, option, split):
    assert_as_one_process(measured, f"ddp, {option}, {split}", FUSED)


@pytest.mark.parametrize("variant", ["gate_concat", "concat_projected", "concat_raw"])
def test_ddp_trains_every_variant(measured, variant):
    assert_as_one_process(measured, f"ddp, {variant}", FUSED[variant == "concat_raw" :])


def test_ddp_trains_on_every_path(measured):
    assert_as_one_process(measured, "ddp, reference", [])
    assert_as_one_process(measured, "ddp, compiled", FUSED)
    # One process takes the path `torch`, which rounds otherwise.
    assert_as_one_process(measured, "ddp, triton", FUSED, tolerance=1e-4)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("sharding", ["whole", "modules"])
def test_fsdp_trains_fused_as_one_process_with_the_whole_batch(measured, sharding, split):
    assert_as_one_process(measured, f"fsdp, {sharding}, {split}", FUSED)


@pytest.mark.parametrize("split", SPLITS)
def test_fsdp_of_single_layers_trains_their_composition(measured, split):
    # One process takes the fast algebra, so this compares two orders of rounding.
    assert_as_one_process(measured, f"fsdp, layers, {split}", ["pooled_roi_align"], tolerance=3e-5)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_fsdp_takes_its_options(measured, sharding):
    ops = ["pooled_roi_align"] if sharding == "layers" else FUSED
    assert_as_one_process(measured, f"fsdp, {sharding}, kept after the forward pass", ops, tolerance=3e-5)
    assert_as_one_process(measured, f"fsdp, {sharding}, half precision", ops, tolerance=2e-2)


def test_fsdp_trains_on_triton(measured):
    assert_as_one_process(measured, "fsdp, triton", FUSED, tolerance=1e-2)
    for result in measured:
        assert "high_res_conv is of type FSDPConv2d" in result["fsdp, layers, triton"]["message"]


def test_a_plain_module_loads_the_full_state_of_a_sharded_one(measured):
    for result in measured:
        assert result["fsdp, full state"] == {"equal": True}


def device_of(path: str) -> str:
    return KERNEL_DEVICE if path == "triton" else "cpu"


def gradients(
    path: str, call=lambda module, *inputs: module(*inputs), dtype: torch.dtype | None = None
) -> dict:
    """The neck's gradients by name, of parameters and inputs, under autocast to `dtype`."""
    device = device_of(path)
    module = neck().to(device)
    low_res, stages, boxes = batch(0, BOXES)
    inputs = [value.to(device).requires_grad_() for value in (low_res, *stages)]
    with use_backend(path), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        tokens = call(module, inputs[0], inputs[1:], [value.to(device) for value in boxes])
        loss_of(tokens).backward()
    return {name: value.grad for name, value in module.named_parameters()} | {
        f"input {index}": value.grad for index, value in enumerate(inputs)
    }


@pytest.mark.parametrize("path", [*PATHS, "triton"])
def test_checkpointed_gradients_are_the_same_bit_for_bit(path):
    expected = gradients(path)
    # Triton's interpreter takes seconds for a pass, and both kinds do the same with ops.
    for reentrant in (False,) if path == "triton" else (False, True):

        def recomputed(module, low_res, stages, boxes, reentrant=reentrant):
            def run(low_res, *stages):
                return module(low_res, list(stages), boxes)

            return checkpoint(run, low_res, *stages, use_reentrant=reentrant)

        actual = gradients(path, recomputed)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


# Triton's interpreter multiplies bfloat16 wrongly.
AUTOCAST = [(path, dtype) for path in PATHS for dtype in (torch.float16, torch.bfloat16)] + [
    ("triton", torch.float16)
]


@pytest.mark.parametrize(("path", "dtype"), AUTOCAST)
def test_autocast_trains_float32_parameters(path, dtype):
    exact, computed = gradients("reference"), []

    def run(module, *inputs):
        tokens = module(*inputs)
        computed.extend(value.dtype for value in tokens)
        with torch.autocast(device_of(path), enabled=False):
            computed.extend(value.dtype for value in module(*inputs))
        return tokens

    actual = gradients(path, run, dtype)
    assert computed == [dtype, dtype, torch.float32, torch.float32]
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert relative_error(value.cpu(), exact[name]) < 16 * torch.finfo(dtype).eps


def test_autocast_and_checkpointing_go_together():
    def recomputed(module, *inputs):
        return checkpoint(module, *inputs, use_reentrant=False)

    expected, actual = (gradients("torch", *call, dtype=torch.bfloat16) for call in ((), (recomputed,)))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_scaler_unscales_and_skips(path):
    for scale, skipped in ((2.0**6, False), (2.0**40, True)):
        module = neck()
        before = copy.deepcopy(module.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
        with use_backend(path), torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(module(*batch(0, BOXES)))
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        if not skipped:
            expected = gradients(path, dtype=torch.float16)
            for name, parameter in module.named_parameters():
                assert relative_error(parameter.grad, expected[name]) < 1e-3
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if skipped else scale)
        unchanged = [torch.equal(value, before[name]) for name, value in module.state_dict().items()]
        assert all(unchanged) if skipped else not any(unchanged)


FUSED_SHAPES = ((2, 16, 6), (2, 5, 4, 4))
MODULES = {
    "fusion": (partial(ConvGateFusion, 6, 5), FUSED_SHAPES),
    "without gate": (partial(ConvGateFusion, 6, 5, "concat_projected"), FUSED_SHAPES),
    "projector": (partial(Projector, 6, 8), ((3, 6),)),
}


@pytest.fixture(params=MODULES)
def kind(request):
    """A function that makes a module, a trained one, and a function that applies one."""
    make, shapes = MODULES[request.param]
    trained = make()
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    inputs = [torch.randn(shape) for shape in shapes]
    return (
        make,
        trained,
        lambda module: module(*(value.to(next(module.parameters()).dtype) for value in inputs)),
    )


def loaded(make, state: dict, how: str) -> nn.Module:
    if how == "meta":
        module = make(device="meta").to_empty(device="cpu")
    elif how == "meta, assigned":
        module = make(device="meta")
    elif how == "skip_init":
        module = nn.utils.skip_init(make.func, *make.args)
    else:
        module = make()
    module.load_state_dict(state, strict=True, assign="assigned" in how)
    return module


@pytest.mark.parametrize("how", ["plain", "assigned", "meta", "meta, assigned", "skip_init"])
def test_a_plain_state_dict_loads(kind, how):
    make, trained, apply = kind
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    module = loaded(make, state, how)
    assert all(type(value) is nn.Parameter and value.requires_grad for value in module.parameters())
    assert torch.equal(apply(module), apply(trained))


def test_a_state_dict_of_another_module_is_refused(kind):
    make, trained, _ = kind
    state = trained.state_dict()
    name = next(iter(state))
    for wrong in (
        {**state, "more": state[name]},
        {**state, name: state[name][:1]},
        dict(list(state.items())[1:]),
    ):
        with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict"):
            make().load_state_dict(wrong)


def test_copies_and_files_give_the_same_module(kind, tmp_path):
    make, trained, apply = kind
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    torch.save(trained, tmp_path / "module.pt")
    save_model(trained, str(tmp_path / "model.safetensors"))
    from_state, from_safetensors = make(), make()
    from_state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert load_model(from_safetensors, tmp_path / "model.safetensors") == (set(), [])
    whole = torch.load(tmp_path / "module.pt", weights_only=False)
    for module in (from_state, from_safetensors, whole, copy.deepcopy(trained)):
        assert torch.equal(apply(module), apply(trained))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_are_made_in_and_cast_to_a_dtype(kind, dtype):
    make, trained, apply = kind
    cast, made = copy.deepcopy(trained).to(dtype), make(dtype=dtype)
    made.load_state_dict(trained.state_dict())
    assert {value.dtype for value in made.parameters()} == {dtype}
    assert apply(cast).dtype == dtype
    assert torch.equal(apply(cast), apply(made))


@pytest.mark.parametrize("variant", ["gate_sum", "concat_raw"])
def test_a_training_step_compiles_as_one_graph(variant):
    module, inputs = neck(variant), batch(0, BOXES)
    torch._dynamo.reset()
    losses = []
    for step in (torch.compile(lambda *of: loss_of(module(*of)), fullgraph=True, backend="aot_eager"), None):
        module.zero_grad()
        with use_backend("torch"):
            loss = step(*inputs) if step else loss_of(module(*inputs))
        loss.backward()
        losses.append([loss.detach(), *(value.grad.clone() for value in module.parameters())])
    for compiled, eager in zip(*losses, strict=True):
        torch.testing.assert_close(compiled, eager)
