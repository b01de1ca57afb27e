"""The page in a real browser, opened from disk: its charts are valid, and react to the pointer."""

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
const first = document.querySelector("[data-plot]");
const until = (ready, act) => ready() ? act() : setTimeout(until, 50, ready, act);
until(() => drawn.length >= 5, () => {
  for (const { data, layout } of [...drawn, { data: first.data, layout: template.layout }])
    for (const { msg } of Plotly.validate(data, layout) ?? []) console.error(msg);
  const area = first.querySelector(".nsewdrag"), box = area.getBoundingClientRect();
  const middle = { clientX: box.left + box.width / 2, clientY: box.top + 50 };
  area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, ...middle }));
});
</script>
<script>window.addEventListener("load", () => none.such());</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


def opened(path, profile) -> tuple[str, list[str]]:
    """The document after its scripts have run, and the lines that they wrote to the console."""
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


def test_the_page_draws_without_errors_and_reacts_to_the_pointer(run, tmp_path):
    """The script of the test ends with an error, to show that an error of the page would be seen, too."""
    write(run, tmp_path, [])
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("</body>", POINT))
    document, console = opened(page, tmp_path / "profile")
    assert len(console) == 1 and "none is not defined" in console[0], console
    assert "<title>&lt;run&gt; · run report</title>" in document, "texts must not run as scripts"
    read_out = re.findall(r'<g class="hoverlayer">.*?step (\d+)', document)
    assert len(read_out) >= 5 and set(read_out) <= {"15", "16"}, "all charts show the step under the pointer"
