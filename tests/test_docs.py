"""Every command line in the documentation parses."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from dgmr_tp.cli import app
from dgmr_tp.pipeline.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\bdgmr[-_]tp\b", line) and "pip install" not in line and not line.startswith("python")
]


def parse(line: str) -> None:
    words = shlex.split(re.sub(r"\{\w+\}", "x", line.split(" #")[0]))
    start = next(i for i, word in enumerate(words) if word.endswith(("dgmr-tp", "dgmr_tp")))
    command = typer.main.get_command(app)
    context = command.make_context("dgmr-tp", words[start + 1 : start + 2])
    sub = command.get_command(context, words[start + 1])
    assert sub is not None, words[start + 1]
    sub.make_context(words[start + 1], words[start + 2 :], parent=context)


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line):
    parse(line)


def test_there_are_lines_and_a_wrong_one_does_not_parse():
    assert len(LINES) >= 8
    with pytest.raises(Exception, match="ratoi"):
        parse("dgmr-tp prune --mlp-ratoi 1 --out x")


def test_recipes_named_in_the_documentation_exist():
    for page in PAGES:
        for name in re.findall(r"recipes/[\w.-]+\.yaml", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_key_of_a_recipe_is_explained_where_the_code_says_it():
    keys = runpy.run_path(str(ROOT / "docs" / "recipe_keys.py"))
    assert keys["page"]() == (ROOT / "docs" / "recipe.md").read_text(), "python docs/recipe_keys.py > docs/recipe.md"
    left = [Recipe]
    while left:
        for name, field in (section := left.pop()).model_fields.items():
            inner = keys["sections"](field.annotation)
            assert field.description or inner, f"{section.__name__}.{name} has no docstring"
            left += inner
