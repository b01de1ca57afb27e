"""The page in a real browser, from the disk: it opens without an error, draws, and answers the pointer."""

from __future__ import annotations

import re
import shutil
import subprocess

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
const first = document.querySelector("[data-chart]");
const until = (ready, act) => ready() ? act() : setTimeout(until, 50, ready, act);
until(() => drawn.length >= 5, () => {
  const area = first.querySelector(".nsewdrag"), box = area.getBoundingClientRect();
  first.dispatchEvent(new PointerEvent("pointerenter"));
  const middle = { clientX: box.left + box.width / 2, clientY: box.top + 50 };
  area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, ...middle }));
});
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def opened(path, profile) -> tuple[str, list[str]]:
    """The document once its scripts have run, and what they wrote to the console."""
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def test_the_page_opens_without_errors_and_answers_the_pointer(run, tmp_path):
    write(run, tmp_path, [])
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("</body>", POINT))
    document, console = opened(page, tmp_path / "profile")
    assert console == []
    assert "<title>&lt;run&gt; · run report</title>" in document, "no text from outside was run as a script"
    read_out = re.findall(r'<g class="hoverlayer">.*?step (\d+)', document)
    assert len(read_out) >= 5 and set(read_out) <= {"15", "16"}, "all charts show the step under the pointer"


def test_an_error_would_be_seen(tmp_path):
    (tmp_path / "broken.html").write_text("<!doctype html><p>x</p><script>none.such()</script>")
    _, console = opened(tmp_path / "broken.html", tmp_path / "profile")
    assert "none is not defined" in console[0]
