"""What the Space requires: all that it imports, as the packages require it, and pinned."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from phi_mm.checkout import CONSTRAINTS, ROOT, SPACE
from phi_mm.hub.space.folder import read_requirements


def test_requirements_name_all_that_the_space_imports() -> None:
    required = {canonicalize_name(r.name) for r in read_requirements(SPACE / "requirements.txt")}
    own = {path.stem for path in SPACE.iterdir()}
    distributions = packages_distributions()
    for path in SPACE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own - sys.stdlib_module_names:
                if name != "spaces":  # the Hub's own, which its machines have
                    found = {canonicalize_name(d) for d in distributions[name]}
                    assert found & required, f"{path} imports {name}"


def test_requirements_agree_with_the_packages_and_are_pinned() -> None:
    lists = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    core, app = (
        {str(Requirement(r)) for r in some} for some in (lists["CORE"], lists["EXTRAS"]["app"])
    )
    required = read_requirements(SPACE / "requirements.txt")
    assert {str(r) for r in required} <= core | app and app <= {str(r) for r in required}
    pins = {canonicalize_name(r.name): str(r.specifier) for r in read_requirements(CONSTRAINTS)}
    for requirement in required:
        version = re.fullmatch(r"==([\d.]+)", pins[canonicalize_name(requirement.name)])
        assert version and requirement.specifier.contains(version[1]), requirement
