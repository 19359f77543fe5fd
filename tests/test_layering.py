# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, how long things may be, and that the product needs no Triton."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"benchmarks", "conformance", "examples", "impl", "reference", "tests"}
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
SOURCES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in FILES}

# What a folder or file imports beside the standard library, "*" being any package that is not ours; the innermost entry counts.
# impl and reference tell SPEC.md independently of each other; the suite sees an implementation through its target only.
MAY_IMPORT = {
    ".": {"pytest", "torch"},
    "reference": {"reference", "numpy", "scipy", "torch"},
    "impl": {"impl", "torch"},
    "impl/kernels": {"impl", "torch", "triton"},
    "conformance": {"conformance", "reference", "hypothesis", "numpy", "pytest", "torch"},
    "conformance/targets": {"conformance", "impl", "reference", "*"},
    "conformance/scorecard.py": {"conformance", "matplotlib"},
    "examples": {"examples", "impl", "reference", "*"},
    "benchmarks": {"benchmarks", "examples", "impl", "reference", "*"},
    "tests": {*FOLDERS, "*"},
}

LICENCE = "# SPDX-License-Identifier: Apache-2.0"
LINES, LINES_OF_TESTS, LINES_OF_FUNCTION = 250, 400, 50


def imports(path: PurePath, source: str) -> Iterator[str]:
    """The dotted name of everything that is imported, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) + 1 - node.level] if node.level else ()
            module = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def offences(path: PurePath, source: str) -> Iterator[str]:
    """The imports that the file's folder does not permit."""
    allowed = next(MAY_IMPORT[str(folder)] for folder in (path, *path.parents) if str(folder) in MAY_IMPORT)
    for name in imports(path, source):
        top = name.partition(".")[0]
        ours_or_any = top if top in FOLDERS else "*"
        permitted = top in sys.stdlib_module_names or {top, ours_or_any} & allowed
        around_target = "*" not in allowed and (name + ".").startswith("conformance.targets.")
        if not permitted or (around_target and not name.startswith("conformance.targets.reference")):
            yield f"{path} imports {name}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` on without the docstring's."""
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_all_folders_are_seen():
    assert {path.parts[0] for path in SOURCES} >= FOLDERS - {"benchmarks"}


def test_nobody_imports_what_its_folder_may_not():
    assert not [offence for path, source in SOURCES.items() for offence in offences(path, source)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("conftest.py", "import tests.mutants"),
        ("reference/polar.py", "from impl import orthogonalize"),
        ("reference/polar.py", "import triton"),
        ("impl/muon.py", "import reference.muon as stages"),
        ("impl/muon.py", "def step():\n    import triton"),
        ("impl/muon.py", "from ..reference import polar"),
        ("impl/muon.py", "importlib.import_module('triton.language')"),
        ("impl/muon.py", "import numpy as np"),
        ("impl/kernels/gram.py", "from conformance import accept"),
        ("conformance/accept.py", "from impl import Muon"),
        ("conformance/test_step.py", "from conformance.targets.impl import Target"),
        ("conformance/test_step.py", "from .targets import impl"),
        ("conformance/test_step.py", "import scipy"),
        ("conformance/targets/impl.py", "from tests import mutants"),
        ("examples/train.py", "from conformance import steps"),
        ("benchmarks/shapes.py", "from tests import mutants"),
    ],
)
def test_forbidden_imports_are_found(path, source):
    assert list(offences(PurePath(path), source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/muon.py", "import math\nfrom .polar import orthogonalize\nimport scipy.linalg"),
        ("impl/kernels/gram.py", "import triton.language as tl\nfrom impl.schedules import schedule"),
        ("conformance/steps.py", "from conformance.targets.reference import Target"),
        ("conformance/targets/other.py", "import dion\nfrom ..target import Unsupported"),
        ("tests/test_mutants.py", "from tests import mutants\nimport impl, conformance.accept"),
    ],
)
def test_permitted_imports_pass(path, source):
    assert not list(offences(PurePath(path), source))


def test_files_are_short():
    lengths = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    long = {path for path, n in lengths.items() if n > (LINES_OF_TESTS if path.parts[0] == "tests" else LINES)}
    assert not long


def test_functions_are_short():
    functions = (
        (path, node)
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert not [f"{path}: {f.name}, {body_lines(f)}" for path, f in functions if body_lines(f) > LINES_OF_FUNCTION]


def test_every_file_begins_with_its_licence():
    assert not [str(path) for path, source in SOURCES.items() if source.splitlines()[:1] != [LICENCE]]


def test_no_file_is_called_after_nothing():
    assert not [str(path) for path in SOURCES if path.stem in {"common", "helper", "helpers", "misc", "util", "utils"}]


WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())

import torch
import impl

model = torch.nn.Linear(3, 3)
before = model.weight.detach().clone()
groups = [{"params": [model.weight]}, {"params": [model.bias], "algorithm": "adamw"}]
optimizer = impl.Muon(groups, weight_decay=0.0)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
assert model.weight.isfinite().all() and not model.weight.equal(before)
assert "triton" not in sys.modules
"""


def test_product_trains_without_triton():
    process = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
