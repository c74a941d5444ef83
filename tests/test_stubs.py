"""peftc/_core.pyi says what the extension has: the same names, and the same parameters with the same defaults."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import peftc
from peftc import _core, nn

PACKAGE = Path(peftc.__file__).parent
SAMPLE = Path(__file__).with_name("typing_sample.py")
STUB = {node.name: node for node in ast.parse((PACKAGE / "_core.pyi").read_text("utf-8")).body if hasattr(node, "name")}
FUNCTIONS = sorted(name for name, node in STUB.items() if isinstance(node, ast.FunctionDef))
CLASSES = sorted(name for name, node in STUB.items() if isinstance(node, ast.ClassDef))

# Functions of builds with -DPC_TEST_HOOKS only.
TEST_HOOKS = {
    "_fail_allocation",
    "_allocation_failed",
    "_live_allocations",
    "_fail_allocation_elsewhere",
    "_no_threads",
}
# Slots whose wrappers CPython signs for all types alike; stubs say what ours take.
SLOTS = {"__init__", "__new__", "__call__", "__getattribute__"}
# What every type has, or what is there because the interpreter's tables say so.
ORDINARY = set(dir(type("Empty", (), {}))) | {"__delitem__", "__setstate__"}

Parameter = tuple[str, object, object]


def of_stub(function: ast.FunctionDef) -> list[Parameter]:
    """(name, kind, default) of each parameter."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [inspect.Parameter.empty] * (len(positional) - len(arguments.defaults))
    defaults += [ast.literal_eval(value) for value in arguments.defaults]
    found: list[Parameter] = []
    for i, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        only = i < len(arguments.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append((argument.arg, kind, default))
    if arguments.vararg is not None:
        found.append((arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty))
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = inspect.Parameter.empty if value is None else ast.literal_eval(value)
        found.append((argument.arg, inspect.Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg is not None:
        found.append((arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.empty))
    return found


def of_runtime(function: object) -> list[Parameter]:
    assert callable(function)
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def without_owner(parameters: list[Parameter]) -> list[Parameter]:
    """`self` is positional-only in C and need not be in a stub."""
    return parameters[1:] if parameters and parameters[0][0] in ("self", "cls") else parameters


def members(name: str) -> dict[str, list[ast.FunctionDef]]:
    """The definitions in a class of the stub, getters and setters under one name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in STUB[name].body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def decorators(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(decorator) for decorator in function.decorator_list}


def test_stub_has_every_name_and_no_other():
    names = {name for name in vars(_core) if not name.startswith("__")} - TEST_HOOKS
    assert set(FUNCTIONS) | set(CLASSES) == names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_the_stub_says(name):
    assert of_runtime(getattr(_core, name)) == of_stub(STUB[name])


@pytest.mark.parametrize("name", CLASSES)
def test_classes_take_what_the_stub_says(name):
    """Making one, its methods, and the attributes that are read-only."""
    kind = getattr(_core, name)
    stub = members(name)
    if name != "SafetensorError" and name != "SafeSlice":  # an exception; a type that nobody makes
        makers = stub.get("__new__") or stub.get("__init__") or members("Module")["__init__"]
        assert of_runtime(kind) == without_owner(of_stub(makers[0]))
    for method, definitions in stub.items():
        static = inspect.getattr_static(kind, method)
        if "property" in decorators(definitions[0]):
            assert inspect.isdatadescriptor(static), method
            continue
        if method in SLOTS:
            continue
        assert without_owner(of_runtime(getattr(kind, method))) == without_owner(of_stub(definitions[0])), method


@pytest.mark.parametrize("name", CLASSES)
def test_stub_has_every_member(name):
    have = {member for member in vars(getattr(_core, name)) if member not in ORDINARY}
    assert have - {"__weaklistoffset__", "__dictoffset__"} <= set(members(name))


@pytest.mark.parametrize(
    ("thing", "attribute"),
    [
        (thing, attribute)
        for thing in (
            _core.AdapterRegistry(),
            _core.Parameter([1.0]),
            nn.Linear(1, 1),
            nn.Conv1D(1, 1),
            nn.Conv2d(1, 1, 1),
            nn.Embedding(1, 1),
            nn.LayerNorm(1),
            nn.RMSNorm(1),
        )
        for base in type(thing).__mro__
        if base.__module__ == "peftc._core"
        for attribute, definitions in members(base.__name__).items()
        if "property" in decorators(definitions[0])
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_attributes_can_be_set_if_the_stub_has_a_setter(thing, attribute):
    definitions = [
        function
        for base in type(thing).__mro__
        if base.__module__ == "peftc._core"
        for function in members(base.__name__).get(attribute, ())
    ]
    settable = any(f"{attribute}.setter" in decorators(function) for function in definitions)
    try:
        setattr(thing, attribute, getattr(thing, attribute))
    except AttributeError:
        assert not settable
    else:
        assert settable


def test_everything_in_nn_has_a_signature():
    for module in (nn, nn.functional):
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing):
                continue
            if thing is not nn.Tensor:  # an ndarray, which has one as of NumPy 2.3
                inspect.signature(thing)
            for member in dir(thing) if isinstance(thing, type) else ():
                if not member.startswith("__") and callable(getattr(thing, member)) and not hasattr(np.ndarray, member):
                    inspect.signature(getattr(thing, member))


def test_exports_are_known_to_type_checkers():
    """Names that are imported lazily are imported for type checkers too, and __all__ is one that they can read."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    (listed,) = [node.value for node in block.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.name: node.module for node in imports for alias in node.names}
    assert imported == {**peftc._EXPORTS, **dict.fromkeys(peftc._MODULES)}
    assert ast.literal_eval(listed) == ["get_num_threads", "set_num_threads", *peftc._EXPORTS, *peftc._MODULES]


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.skipif(_core.build_info()["sanitized"], reason="mypy is not run under the sanitizers")
def test_user_code_passes_strict_mypy(tmp_path_factory):
    cache = tmp_path_factory.getbasetemp().parent / "mypy-cache"
    # As users see an installed package: errors inside of it are not theirs.
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={cache}", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(SAMPLE)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (PACKAGE / "py.typed").is_file()
