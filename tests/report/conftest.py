"""What the tests of the report share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.report.result_table import ResultTable, read_tables


@pytest.fixture
def table(study: Path) -> ResultTable:
    """The table of `study`."""
    (found,), _ = read_tables(study)
    return found
