"""Shared by the tests of the ops: Triton's interpreter at a bearable speed."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _triton_is_patched_only_where_it_is_not():
    """A launch patches triton.language, and so does every call from one jit function to another.

    The calls find nothing left to patch, but looking for it costs a third of the time of these tests. Without
    the private parts used here the tests are slower and nothing else.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        modules = [module for module in (language, language.core) if module in _values(self.fn)]
        if any(language.core.is_builtin(module.load) for module in modules):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


_globals: dict = {}


def _values(function) -> list:
    if function not in _globals:
        _globals[function] = [value for value in function.__globals__.values() if type(value) is type(os)]
    return _globals[function]
