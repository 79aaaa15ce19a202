"""docs/your-method.md: its code runs as it stands, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.runs.records import read_summary
from tests.pages import read_page, run_page


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    output = run_page("your-method.md", tmp_path).splitlines()
    texts = re.findall(r"```text\n(.*?)```", read_page("your-method.md"), re.DOTALL)
    table, *printed = [text.splitlines() for text in texts]
    assert [line for text in printed for line in text if line not in output] == []
    cells = {tuple(words(line)[:2]) for line in table[1:]}
    assert cells <= {tuple(words(line)[:2]) for line in output}, output
    assert words(table[0]) in map(words, output), output

    def sent(*cell: str) -> int:
        name = "-".join(cell).replace(":", "-")
        summary = read_summary(tmp_path / "results" / "compare" / f"{name}-seed1") or {}
        return int(summary["bytes_up"])

    assert sent("slowmo", "my_methods:Recoil", "my_methods:Ternary") < 0.5 * sent("slowmo", "my_methods:Recoil", "int4")
    assert (tmp_path / "report" / "compare-accuracy.png").stat().st_size


def words(line: str) -> list[str]:
    """The words of a line of a table, without its borders."""
    return re.sub("[┃│]", " ", line).split()
