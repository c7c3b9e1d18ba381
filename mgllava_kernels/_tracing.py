"""What torch.compile is told about this package's Python."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """Have torch.compile call `function` while tracing and keep the result.

    The mark is all that `torch.compiler.assume_constant_result` sets, but that function imports
    torch._dynamo, and with it triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
