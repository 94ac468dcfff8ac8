import re
from pathlib import Path

import pytest

from accord.config import load_object

DOCS = Path(__file__).parents[1] / "docs"
NAME = re.compile(r"`(accord(?:\.[a-z_]+)+)\.([A-Z]\w+(?:\.\w+)?|[a-z_]+)`")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_functions_that_a_page_names_are_there(page: Path) -> None:
    for module, attribute in NAME.findall(page.read_text(encoding="utf-8")):
        load_object(f"{module}:{attribute}")


def test_the_method_names_its_functions() -> None:
    assert len(NAME.findall((DOCS / "method.md").read_text(encoding="utf-8"))) > 25
