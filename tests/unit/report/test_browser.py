"""The page in a real browser, from the disk: it opens without an error, reads values out, and changes steps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from rlinf_lite.report.__main__ import write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1400,3000",
]
POINT = """<script>
const box = svgs[0].getBoundingClientRect();
svgs[0].dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
document.querySelector(".picker button").click();
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def opened(path, profile) -> tuple[str, list[str]]:
    """The document once its scripts have run, and what they wrote to the console."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def test_the_page_opens_without_errors_and_answers_the_pointer(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(run, tmp_path, [])
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("</body>", POINT))
    document, console = opened(page, tmp_path / "profile")
    assert console == []
    assert "<title>&lt;run&gt; · run report</title>" in document, "no text from outside was run as a script"
    assert re.search(r'<span class="readout"[^>]*>step 14', document)
    assert document.count("<circle") >= 5, "all charts show the step under the pointer"
    assert re.findall(r'<tbody class="step" data-step="(\d+)">', document) == ["29"], "the others are hidden"


def test_an_error_would_be_seen(tmp_path):
    (tmp_path / "broken.html").write_text("<!doctype html><p>x</p><script>none.such()</script>")
    _, console = opened(tmp_path / "broken.html", tmp_path / "profile")
    assert "none is not defined" in console[0]
