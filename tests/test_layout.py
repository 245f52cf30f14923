"""Imports point downwards: every module stands in a room, and a room imports itself and the rooms before it."""

import ast
from pathlib import Path

import pytest

import masked_diffusion

PACKAGE = Path(masked_diffusion.__file__).parent

# From the bottom to the top, as in docs/architecture.md. A public module belongs to a room, whatever its path.
ROOMS = [
    {"choices", "files", "settings", "randomness", "first_stage"},
    {"processes", "dist_util", "logger"},
    {"diffusion", "gaussian_diffusion", "respace", "resample"},
    {"models"},
    {"data", "image_datasets"},
    {"runs"},
    {"sampling"},
    {"training", "train_util", "dry_run"},
    {"commands", "script_util", "diffusers_format", "programs", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(source):
    """Names below ``masked_diffusion`` that a module imports, wherever in it that stands: "data.dataset", ..."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they point"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.partition(".")[2] or "__init__" for name in names if name.split(".")[0] == "masked_diffusion"}


def top_of(name):
    """The folder or public module that an imported name lives in; the package's own names are its front door's."""
    top = name.split(".")[0]
    return top if top in RANK else "__init__"


def module_of(name):
    """The longest part of an imported name that is a module: "data.dataset.ImageDataset" -> "data.dataset"."""
    parts = name.split(".")
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return ".".join(parts)
        if (path / "__init__.py").is_file():
            return ".".join([*parts, "__init__"])
        parts.pop()
    return "__init__"


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_no_room_above_its_own(path):
    own = name_of(path).split(".")[0]
    assert own in RANK, f"{own} stands in no room"
    above = {name for name in imported(path.read_text(encoding="utf-8")) if RANK[top_of(name)] > RANK[own]}
    assert not above


def test_no_imports_run_in_a_circle():
    graph = {
        name_of(path): {module_of(name) for name in imported(path.read_text(encoding="utf-8"))} for path in MODULES
    }
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        for name in leaves:
            del graph[name]
    assert not graph


def test_an_import_that_points_up_or_in_a_circle_would_be_found():
    assert RANK[top_of("training.meter.Meter")] > RANK["models"]
    assert imported("def f():\n    from masked_diffusion.training.meter import Meter") == {"training.meter.Meter"}
    assert imported("import masked_diffusion") == {"__init__"} and top_of("create_diffusion") == "__init__"
    assert module_of("data.dataset.ImageDataset") == "data.dataset" and module_of("models.MDT") == "models.__init__"


def test_public_paths_are_real_files():
    """No module at the top only hands on what another one has."""
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body), path.name


# What people have to read at once.
LONGEST_FUNCTION, LONGEST_CLASS = 60, 300
MAY_BE_LONGER = {"GaussianDiffusion"}  # its public methods are a contract
PROGRAMS = [PACKAGE.parent / "infer_mdt.py", *sorted(PACKAGE.parent.glob("scripts/**/*.py"))]
PROGRAMS += sorted(PACKAGE.parent.glob("evaluations/*.py"))


def too_long(source):
    """Names and lengths of functions and classes that do not fit."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            limit = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            if length > limit and node.name not in MAY_BE_LONGER:
                yield node.name, length


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_functions_and_classes_can_be_read_at_once(path):
    assert not list(too_long(path.read_text(encoding="utf-8")))


def test_a_function_or_class_that_is_too_long_would_be_found():
    lines = "    x = 1\n"
    assert list(too_long("def f():\n" + 60 * lines)) == [("f", 61)] and not list(too_long("def f():\n" + 59 * lines))
    assert list(too_long("class C:\n" + 300 * lines)) == [("C", 301)]
    assert not list(too_long("class GaussianDiffusion:\n" + 400 * lines))


# A program's front door may read the command line; what it calls says by name what it needs. script_util serves it.
READS_ARGS, SERVES_ARGS = {"prepare"}, {"script_util"}


def readers_of_args(source):
    """Names of functions and methods that take the arguments of a command line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            kinds = {ast.unparse(one.annotation) for one in taken if one.annotation}
            if any(one.arg == "args" for one in taken) or "argparse.Namespace" in kinds:
                yield node.name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_below_the_scripts_only_front_doors_read_the_command_line(path):
    doors = READS_ARGS if path.parent.name == "programs" else set()
    if name_of(path) not in SERVES_ARGS:
        assert set(readers_of_args(path.read_text(encoding="utf-8"))) <= doors


def test_a_function_that_reads_the_command_line_would_be_found():
    source = "def f(args): pass\nclass C:\n    def m(self, flags: argparse.Namespace): pass\ndef g(*args, name): pass"
    assert list(readers_of_args(source)) == ["f", "m"]
