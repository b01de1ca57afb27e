"""The hub passes rows to all sinks in order, survives failing sinks, and is built from the config."""

from __future__ import annotations

import json

import pytest

from rlinf_lite.errors import ConfigError
from rlinf_lite.observability import MetricHub, build_hub, read_jsonl_rows


class ListSink:
    def __init__(self, failure: Exception | None = None) -> None:
        self.rows: list = []
        self.num_closed = 0
        self.failure = failure

    def log(self, step, metrics) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.num_closed += 1
        if self.failure:
            raise self.failure


def test_every_sink_gets_every_row():
    sinks = [ListSink(), ListSink()]
    hub = MetricHub(sinks)
    hub.log(0, {"val/accuracy": 0.3})
    hub.log(1, {"reward/mean": 0.5})
    assert sinks[0].rows == sinks[1].rows == [(0, {"val/accuracy": 0.3}), (1, {"reward/mean": 0.5})]
    assert hub.state() == {"wandb_run_id": None, "last_step": 1}


@pytest.mark.parametrize(("committed", "step"), [(None, -1), (5, 5), (5, 4)])
def test_a_step_is_logged_once(committed, step):
    sink = ListSink()
    hub = MetricHub([sink], committed_step=committed)
    with pytest.raises(ValueError, match=f"metrics of step {step} after those of step"):
        hub.log(step, {})
    hub.log(6, {})
    with pytest.raises(ValueError, match="metrics of step 6 after those of step 6"):
        hub.log(6, {})
    assert sink.rows == [(6, {})]


def test_all_are_closed_once_and_the_first_failure_is_raised():
    sinks = [ListSink(), ListSink(OSError("first")), ListSink(ValueError("second")), ListSink()]
    hub = MetricHub(sinks)
    with pytest.raises(OSError, match="first"):
        hub.close()
    hub.close()
    assert [sink.num_closed for sink in sinks] == [1, 1, 1, 1]


def test_an_unknown_backend_names_the_known_ones(logger_config, tmp_path):
    logger_config.logger_backends = ["tensorboard", "wandbb"]
    with pytest.raises(ConfigError) as caught:
        build_hub(logger_config, committed_step=None, config_dict={})
    assert str(caught.value) == (
        "runner.logger.logger_backends: unknown backend 'wandbb'; choose from tensorboard, wandb; did you mean wandb?"
    )
    assert list(tmp_path.iterdir()) == [], "refused before anything was written"


def test_console_and_file_always_exist_and_continue_on_a_resume(logger_config, tmp_path, capsys):
    for committed, steps in ((None, range(1, 6)), (3, range(4, 8))):
        state = None if committed is None else {"wandb_run_id": None, "last_step": committed}
        hub = build_hub(logger_config, committed_step=committed, config_dict={}, num_steps=7, state=state)
        for step in steps:
            hub.log(step, {"reward/mean": step / 10})
        hub.close()
        assert json.loads(json.dumps(hub.state())) == {"wandb_run_id": None, "last_step": steps[-1]}
    rows = list(read_jsonl_rows(tmp_path / "run" / "metrics.jsonl"))
    assert rows == [{"step": step, "reward/mean": step / 10} for step in range(1, 8)]
    assert capsys.readouterr().out.count("step    4/7  reward  0.400\n") == 2
