"""What the documents say can be typed, and the files that they name are there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from phi_mm.cli import parser
from phi_mm.recipes import load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "model_card.md",
    ROOT / "adapter_card.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MADE_BY_COMMANDS = ("runs/", "my-")  # what a reader's own commands leave behind


def commands(document: Path) -> list[str]:
    """Lines of the bash blocks of a document, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(document):
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0].endswith("phi-mm"):
            parser().parse_args(words[1:])
        elif "phi_mm.cli" in words:  # started by accelerate
            parser().parse_args(words[words.index("phi_mm.cli") + 1 :])
        elif "train.py" in words:
            rest = words[words.index("train.py") + 1 :]
            load_recipe(ROOT / rest[0], rest[1:])
        else:
            assert words[0] == "pip", f"{document.name} names a command that no test knows: {line}"


# The cards are templates: what is written of them is tried in tests of the Hub.
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if "card" not in d.name], ids=lambda path: path.name
)
def test_python_and_yaml_can_be_read(document):
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        compile(block, document.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert yaml.safe_load(block), block


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    for link in links:
        assert (document.parent / link).exists(), link
    for name in re.findall(r"`([\w./-]+/[\w.-]*|[\w-]+\.(?:md|py|txt))`", text):
        if "/" in name and not name.startswith(MADE_BY_COMMANDS):
            folder = name.split("/")[0]
            if (ROOT / folder).is_dir():
                assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_every_page_can_be_found_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in text]
    assert not missing


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = re.findall(r"'([\w-]+\.md)'", str(site["nav"]))
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_workflows_and_templates_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    assert len(files) == 6
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
