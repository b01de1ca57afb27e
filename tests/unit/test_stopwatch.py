from __future__ import annotations

from rlinf_lite.stopwatch import Stopwatch


def test_parts_add_up_and_stand_in_the_line():
    times = iter([10.0, 10.25, 12.0, 12.5])
    watch = Stopwatch(clock=lambda: next(times))
    for name in ("imports", "ray", "imports"):
        watch.lap(name)
    assert watch.parts == {"imports": 0.75, "ray": 1.75}
    assert watch.seconds == 2.5
    assert watch.line("first step after") == "first step after 2.50 s: imports 0.75, ray 1.75"
