"""The report in headless Chromium, where there is one (Debian's package chromium)."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from rich.console import Console

from fedsim.report.page import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RESULTS = Path(__file__).parents[2] / "results"
MEASURE = """<iframe id="page" src="index.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument;
  const folded = [...page.querySelectorAll("details")];
  const before = page.documentElement.scrollHeight;
  folded.forEach(part => part.querySelector("summary").click());
  const links = [...page.querySelectorAll("a")].map(link => link.getAttribute("href"));
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    opened: folded.length > 0 && folded.every(part => part.open) && page.documentElement.scrollHeight > before,
    images: [...page.querySelectorAll("figure img")].every(image => image.naturalWidth > 0),
    places: links.filter(link => link.startsWith("#"))
      .every(link => page.getElementById(decodeURIComponent(link.slice(1))) !== null),
    files: links.filter(link => !link.startsWith("#")),
  }});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_parts_open_its_links_lead_somewhere(tmp_path: Path, width: int) -> None:
    """And nothing is written to the console."""
    for name in ("methods-outer", "methods-compress", "table2-bf16"):
        shutil.copytree(RESULTS / name, tmp_path / "results" / name)
    build_report(str(tmp_path / "results"), str(tmp_path / "report"), "", Console(file=io.StringIO()))
    (tmp_path / "report" / "measure.html").write_text(MEASURE.format(width=width))
    flags = "--headless=new --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr"
    flags += f" --virtual-time-budget=20000 --window-size=1400,1000 --user-data-dir={tmp_path}/profile --dump-dom"
    place = (tmp_path / "report" / "measure.html").as_uri()
    done = subprocess.run([str(CHROMIUM), *flags.split(), place], capture_output=True, text=True, timeout=120)
    told = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert told, done.stderr
    found = json.loads(told[1].replace("&amp;", "&"))
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert found["width"] <= width
    assert (found["opened"], found["images"], found["places"]) == (True, True, True)
    assert found["files"]
    assert all((tmp_path / "report" / unquote(link)).is_file() for link in found["files"])
