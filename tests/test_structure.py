"""The dependencies between the rooms go one way; what is exported can be loaded by others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"modeling_phi_mm", "processing", "phi_mm", "train", "spaces_app"}
EXPORTED = [
    *(ROOT / "modeling_phi_mm").glob("*_phi_mm.py"),
    *(ROOT / "processing").glob("*_phi_mm.py"),
]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import of a file; level is the number of leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def rooms(path: Path) -> set[str]:
    """The rooms of ours that a file imports by name."""
    return {module.split(".")[0] for level, module in imports(path) if level == 0} & OURS


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.name)
def test_exported_files_import_siblings_and_installed_packages_only(path):
    assert rooms(path) == set()
    for level, module in imports(path):
        assert level <= 1 and (level == 0 or (path.parent / f"{module}.py").is_file()), module


def test_exported_basenames_are_unique():
    names = [path.name for path in EXPORTED]
    assert len(set(names)) == len(names) == 13


@pytest.mark.parametrize("folder", ["modeling_phi_mm", "processing"])
def test_exported_packages_import_nothing_that_is_not_exported(folder):
    # processing/__init__.py, which is not exported, registers the processor for the config class.
    allowed = {"processing": {"modeling_phi_mm"}}.get(folder, set())
    for path in files(folder):
        assert rooms(path) <= (allowed if path.name == "__init__.py" else set()), path


def test_phi_mm_does_not_import_its_users():
    for path in files("phi_mm"):
        if path.name != "cli.py":
            assert rooms(path) <= {"modeling_phi_mm", "processing", "phi_mm"}, path
            assert "phi_mm.cli" not in {module for _, module in imports(path)}, path


def test_the_tiny_world_needs_no_phi_mm_model():
    for path in files("phi_mm/tiny"):
        assert rooms(path) <= {"phi_mm"}, path


def test_the_space_imports_nothing_of_ours_but_itself():
    for path in files("spaces_app"):
        assert rooms(path) == set(), path
