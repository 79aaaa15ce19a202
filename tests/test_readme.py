from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_algorithm_in_the_readme_is_that_of_the_reference() -> None:
    """Line by line, in order; ``...`` stands for what the README leaves out."""
    (excerpt,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.strip() for line in (ROOT / "fedsim/reference.py").read_text().splitlines()]
    place = 0
    for line in excerpt.splitlines():
        if line.strip() != "...":
            place = lines.index(line.strip(), place) + 1


def test_links_of_the_readme_and_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
