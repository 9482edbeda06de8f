"""The rules of the house: who imports whom, where triton and print may stand, how long a file may be."""

import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "mufasa_rec").rglob("*.py"))
APPS = sorted((ROOT / "torchx_apps").rglob("*.py"))
COMPONENTS = sorted((ROOT / "components").rglob("*.py"))
MAX_LINES = 500
COMPONENT_IMPORTS = {"torchx", "typing", "sys", "shlex"}
CONFIG_MODULES = ("mufasa_rec.config", "mufasa_rec.presets")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Give every module that a file imports, wherever in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ".", node.lineno


def test_import_linter_keeps_its_contracts() -> None:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    ran = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_component_imports_torchx_and_typing_only(path: Path) -> None:
    assert {module.split(".")[0] for module, _ in imported(path)} <= COMPONENT_IMPORTS


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_component_is_annotated_with_typing_forms(path: Path) -> None:
    """TorchX reads the annotations when it runs the file: it knows neither `list[str]` nor `str | None`."""
    assert "from __future__ import annotations" not in path.read_text()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
            for argument in filter(None, arguments):
                assert argument.annotation is not None, f"{node.name}: {argument.arg}"
                form = ast.unparse(argument.annotation)
                assert "|" not in form, form
                assert not form.startswith(("list[", "dict[", "tuple[")), form


@pytest.mark.parametrize("path", [*PACKAGE, *APPS], ids=name_of)
def test_triton_is_imported_in_triton_files_of_ops_only(path: Path) -> None:
    allowed = path.name.startswith("triton_") and path.is_relative_to(ROOT / "mufasa_rec" / "ops")
    found = [line for module, line in imported(path) if module.split(".")[0] == "triton"]
    assert allowed or not found


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_package_logs_and_does_not_print(path: Path) -> None:
    tree = ast.walk(ast.parse(path.read_text()))
    calls = [node for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", [*PACKAGE, *APPS, *COMPONENTS], ids=name_of)
def test_file_is_short_and_opens_by_saying_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_package_has_no_drawer_for_odds_and_ends(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")


def test_configuration_is_composed_above_what_it_configures() -> None:
    below = [path for path in PACKAGE if path.stem not in ("config", "presets")]
    assert not [name_of(path) for path in below for module, _ in imported(path) if module in CONFIG_MODULES]


def test_importing_the_package_imports_no_torchrec() -> None:
    """The check of versions must come before the import that would fail with a missing symbol."""
    program = "import sys, mufasa_rec, mufasa_rec.versions, torchx_apps; print([m for m in sys.modules if m in NAMES])"
    program = program.replace("NAMES", "('torch', 'torchrec', 'fbgemm_gpu')")
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_locks_differ_in_the_build_of_fbgemm_only() -> None:
    cpu, cuda = (
        {line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")}
        for name in ("cpu.txt", "cuda.txt")
    )
    assert cpu ^ cuda == {"fbgemm-gpu-cpu==1.8.0", "fbgemm-gpu==1.8.0"}
    assert {"torch==2.13.0", "torchrec==1.8.0", "torchx==0.7.0"} <= cpu


def test_every_locked_package_is_in_the_notice() -> None:
    notice = (ROOT / "NOTICE").read_text()
    pins = [line for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [pin for pin in pins if f"\n{pin.replace('==', ' ')} " not in notice]
