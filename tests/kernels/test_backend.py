"""The choice of implementation: block, environment, automatic, and what cannot be met."""

import asyncio
import sys
import threading
from unittest import mock

import pytest
import torch
from kernel_cases import KERNEL_DEVICE

import mgllava_kernels as kernels
from mgllava_kernels import active_backend, backend, configs, use_backend
from mgllava_kernels.configs import tables

X = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("MGLLAVA_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_takes_torch_while_no_triton_kernel_exists(monkeypatch):
    monkeypatch.setattr(backend, "_modules", {"roi_align": {"torch": "some.module"}})
    assert active_backend(X).name == "torch"
    assert "no op has a Triton kernel" in active_backend(X).reason
    assert "roi_align has no Triton kernel" in active_backend(X, "roi_align").reason
    assert str(active_backend(X)) == f"torch ({active_backend(X).reason})"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_block_and_environment_choose(monkeypatch, name):
    with use_backend(name):
        assert active_backend(X).name == name
        assert "use_backend" in active_backend(X).reason
    monkeypatch.setenv("MGLLAVA_KERNELS", name)
    assert active_backend(X).name == name
    assert "MGLLAVA_KERNELS" in active_backend(X).reason


def test_block_wins_over_environment_and_restores(monkeypatch):
    monkeypatch.setenv("MGLLAVA_KERNELS", "reference")
    with use_backend("torch"):
        with use_backend("auto"):
            assert active_backend(X).name == "torch"
        assert "chosen by use_backend" in active_backend(X).reason
    assert active_backend(X).name == "reference"


def test_block_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert active_backend(X).name == "torch"


def test_unknown_names_list_the_legal_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"auto, triton, torch, reference; got 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setenv("MGLLAVA_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"MGLLAVA_KERNELS must be one of auto, .*got 'fast'"):
        kernels.linear_gelu(X, torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"op must be one of .*roi_align.*; got 'nms'"):
        active_backend(X, "nms")


def test_every_public_op_is_registered():
    ops = {
        "roi_align",
        "pooled_roi_align",
        "conv_gate_fusion",
        "depthwise_conv_gelu",
        "linear_gelu",
        "mlp_projector",
        "grouped_mlp_projector",
    }
    assert set(backend._modules) == ops
    for op in ops:
        assert active_backend(X, op).name == "torch"


def test_triton_that_cannot_be_met_says_why(monkeypatch):
    monkeypatch.setattr(
        backend, "_modules", {"plain": {"torch": "m"}, "fused": {"torch": "m", "triton": "m"}}
    )
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="plain has no Triton kernel yet"):
            active_backend(X, "plain")
        with pytest.raises(RuntimeError, match="on the CPU and TRITON_INTERPRET=1 is not set"):
            active_backend(X, "fused")
        with pytest.raises(RuntimeError, match="float64"):
            active_backend(X.double(), "fused")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(backend, "_triton_installed", lambda: True)
        assert active_backend(X, "fused").name == "triton"
        monkeypatch.setattr(backend, "_triton_installed", lambda: False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            active_backend(X, "fused")


def test_auto_with_a_triton_kernel(monkeypatch):
    class OnGpu:
        device = torch.device("cuda")
        dtype = torch.bfloat16

    monkeypatch.setattr(backend, "_modules", {"fused": {"torch": "m", "triton": "m"}})
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    assert active_backend(OnGpu(), "fused").name == "triton"
    assert active_backend(X, "fused").name == "torch"
    # The interpreter is for tests: it must be asked for, never chosen for its own sake.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert active_backend(X, "fused").name == "torch"
    OnGpu.dtype = torch.float64
    assert active_backend(OnGpu(), "fused").name == "torch"


def test_an_explicit_triton_is_refused_by_the_op_itself():
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="use_backend, but the tensor is on the CPU"),
    ):
        kernels.linear_gelu(X, torch.zeros(4, 3), torch.zeros(4))


def test_choice_belongs_to_the_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(active_backend(X).name))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_choice_belongs_to_the_task():
    async def ask(name: str, wait: float) -> str:
        with use_backend(name):
            await asyncio.sleep(wait)
            return active_backend(X).name

    async def both() -> list[str]:
        return await asyncio.gather(ask("reference", 0.02), ask("torch", 0.01))

    assert asyncio.run(both()) == ["reference", "torch"]


def test_backward_keeps_the_path_of_the_forward(monkeypatch):
    called = []
    run = backend.call

    def spy(op, path, function, *arguments):
        called.append((function, path))
        return run(op, path, function, *arguments)

    monkeypatch.setattr(backend, "call", spy)
    weight = torch.ones(4, 3, requires_grad=True)
    with use_backend("torch"):
        output = kernels.linear_gelu(X, weight, torch.zeros(4))
    with use_backend("reference"):
        output.sum().backward()
    assert called == [("linear_gelu", "torch"), ("linear_gelu_backward", "torch")]


def test_reference_does_not_enter_the_fast_path(monkeypatch):
    def refuse(*_):
        raise AssertionError("the fast path was entered")

    monkeypatch.setattr(backend, "call", refuse)
    with use_backend("reference"):
        kernels.linear_gelu(X, torch.ones(4, 3), torch.zeros(4))
        kernels.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 2)
    with pytest.raises(AssertionError, match="fast path"):
        kernels.linear_gelu(X, torch.ones(4, 3), torch.zeros(4))


def test_implementations_are_loaded_on_first_use(monkeypatch, tmp_path):
    (tmp_path / "late_kernels.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "_modules", {})
    backend.register("late", torch="late_kernels")
    assert "late_kernels" not in sys.modules
    assert torch.equal(backend.call("late", "torch", "double", X.device, X + 1), 2 * (X + 1))


def test_an_empty_environment_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("MGLLAVA_KERNELS", "")
    assert active_backend(X).name == "torch"
    assert kernels.linear_gelu(X, torch.zeros(4, 3), torch.zeros(4)).shape == (2, 4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A function that writes a user's table of `linear` for this device: what routes to take at counts of tokens."""
    pytest.importorskip("triton")
    if KERNEL_DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from mgllava_kernels._triton import launch, projector

    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path))
    target = launch.target_of(torch.device(KERNEL_DEVICE))
    sizes = {"K": 3, "N": 4}

    def write(routes: dict[int, int]) -> configs.Config:
        entries = []
        for count, route in routes.items():
            blocks, warps, stages = vars(projector.LINEAR.heuristic(target, X.dtype, sizes, count)).values()
            config = configs.Config(tuple({**dict(blocks), "ROUTE": route}.items()), warps, stages)
            entries.append(tables.Entry(X.dtype, tuple(sizes.items()), count, config, {}, {}, 0))
        fields = {name: getattr(target, name) for name in tables.TARGET_FIELDS}
        table = tables.Table("linear", target.name, fields, [{}], entries)
        tables.write(tables.path_of(tmp_path, "linear", target.name), table)
        configs.reload()
        return config

    yield write
    configs.reload()


def torch_computes(tokens: int) -> bool:
    """Whether a projector's first layer on `tokens` tokens is computed by torch."""
    x, weight, bias = torch.randn(tokens, 3), torch.randn(4, 3), torch.randn(4)
    with use_backend("triton"), mock.patch.object(torch, "addmm", wraps=torch.addmm) as addmm:
        output = kernels.linear_gelu(*(value.to(KERNEL_DEVICE) for value in (x, weight, bias)))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-3, atol=1e-3)
    return addmm.called


def test_the_reason_names_what_tables_send_to_torch(tuned):
    from mgllava_kernels._triton.projector import TORCH, TRITON

    x = X.to(KERNEL_DEVICE)
    tuned({2: TORCH, 64: TRITON, 9: TORCH})
    products = "; tuned tables send to torch: linear K=3 N=4 at 2, 9 tokens"
    with use_backend("triton"):
        for op in ("linear_gelu", "mlp_projector", "grouped_mlp_projector"):
            assert str(active_backend(x, op)) == f"triton (chosen by use_backend{products})"
        for op in ("conv_gate_fusion", "roi_align", None):
            assert active_backend(x, op).reason == "chosen by use_backend"
        assert active_backend(x.half(), "linear_gelu").reason == "chosen by use_backend", (
            "another dtype's table"
        )
    assert [torch_computes(tokens) for tokens in (1, 9, 40)] == [True, True, False]
    with use_backend("torch"):
        assert active_backend(x, "linear_gelu").reason == "chosen by use_backend"


def test_the_reason_follows_a_forced_config(tuned):
    from mgllava_kernels._triton.projector import TORCH, TRITON

    x = X.to(KERNEL_DEVICE)
    to_triton, to_torch = tuned({2: TRITON}), tuned({2: TORCH})
    with use_backend("triton"):
        with configs.force("linear", to_triton):
            assert active_backend(x, "linear_gelu").reason == "chosen by use_backend"
            assert not torch_computes(2)
        assert active_backend(x, "linear_gelu").reason.endswith("at 2 tokens")
        tuned({2: TRITON})
        with configs.force("linear", to_torch):
            assert active_backend(x, "linear_gelu").reason.endswith("at 2 tokens")
            assert torch_computes(2)
        assert active_backend(x, "linear_gelu").reason == "chosen by use_backend"


def test_asking_about_torch_loads_no_kernels(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mgllava_kernels._triton")]:
        monkeypatch.delitem(sys.modules, name)
    for op in backend.registered_ops():
        assert active_backend(X, op).name == "torch"
    assert not [name for name in sys.modules if name.startswith("mgllava_kernels._triton")]
