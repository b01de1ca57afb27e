"""The real wandb, offline: processes are killed and resumed, and its files read back. Nothing uses a network."""

from __future__ import annotations

import json
import struct
import sys
from types import MappingProxyType

import pytest

from rlinf_lite.observability import EventLog, JsonlSink, build_hub
from rlinf_lite.observability.wandb_file import read_records, recorded_steps
from rlinf_lite.observability.wandb_rows import SentRow, SentRows
from rlinf_lite.observability.wandb_state import WandbState, read_state, write_state

pytest.importorskip("wandb")


def state_in(output: str) -> dict:
    (line,) = [line for line in output.splitlines() if line.startswith("STATE ")]
    return json.loads(line.removeprefix("STATE "))


def rows(log_path, run_id, with_tables=False, with_restarts=MappingProxyType({})) -> list[tuple[int, float]]:
    """(step, reward) of every history record of every session, duplicates included."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((log_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
        for record in map(Record.FromString, read_records(path)):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert items["step"] == items["_step"]
                assert ("samples/rollouts" in items) == (with_tables and items["step"] in (1, 10))
                assert items.get("events/restarts") == with_restarts.get(items["step"])
                found.append((items["step"], items["reward/mean"]))
    return found


def test_killed_and_resumed_as_one_run_with_each_step_once(tmp_path, session):
    log_path = tmp_path / "run"
    origin = {"recipe": "a"}
    first = state_in(session("wandb", None, 1, 9, "kill", origin=origin, WANDB_MODE="offline"))
    run_id = first["wandb_run_id"]
    assert first == {"wandb_run_id": run_id, "last_step": 9} and read_state(log_path).run_id == run_id
    # The last checkpoint was of step 5; at the kill wandb had written nothing yet.
    second = state_in(session("wandb", 5, 6, 12, "close", {**first, "last_step": 5}, origin))
    assert second["wandb_run_id"] == run_id
    assert read_state(log_path) == WandbState(run_id=run_id, last_step=12)
    # Now all twelve rows exist, and 9 to 12 are logged again.
    third = state_in(session("wandb", 8, 9, 15, "close", {**second, "last_step": 8}, origin))
    assert third == {"wandb_run_id": run_id, "last_step": 15}
    assert sorted(rows(log_path, run_id)) == [(step, step / 3) for step in range(1, 16)]


@pytest.mark.soak
def test_after_kills_before_its_first_row_a_branch_is_found_again(tmp_path, session):
    log_path = tmp_path / "run"
    state = state_in(session("wandb", None, 1, 8, "close", origin={"recipe": "a"}, WANDB_MODE="offline"))
    back = {**state, "last_step": 2}
    changed = {"recipe": "b", "changes": ["lr: 1 -> 2"]}
    branches = []
    for last, end in ((2, "kill"), (5, "kill"), (5, "close")):
        output = session("wandb", 2, 3, last, end, back, changed, WANDB_MODE="offline")
        branches.append(state_in(output)["wandb_run_id"])
        assert f"wandb: run {branches[0]} branches off run {state['wandb_run_id']} after step 2: lr: 1 -> 2" in output
    assert len({*branches, state["wandb_run_id"]}) == 2
    assert sorted(rows(log_path, branches[0])) == [(step, step / 3) for step in range(1, 6)]
    assert sorted(rows(log_path, state["wandb_run_id"])) == [(step, step / 3) for step in range(1, 9)]


@pytest.mark.soak
def test_tables_lost_by_a_kill_are_sent_by_the_resume(tmp_path, session):
    log_path = tmp_path / "run"
    rollouts = JsonlSink(log_path / "rollouts.jsonl", committed_step=None)
    for step in range(1, 16):
        row = {"prompt_id": step, "sample": 0, "prompt_ids": [1], "text": "<b>\u6f22|", "reward": 1.0, "error": None}
        rollouts.log_rows(step, [row, row])
    rollouts.close()
    state = state_in(session("wandb", None, 1, 9, "kill", WANDB_MODE="offline"))
    events = EventLog(log_path / "events.jsonl")
    events.add("restart", 3)
    events.add("resume", 5)
    session("wandb", 5, 6, 12, "close", state={**state, "last_step": 5})
    found = rows(log_path, state["wandb_run_id"], with_tables=True, with_restarts={4: 1, 6: 2})
    assert sorted(found) == [(step, step / 3) for step in range(1, 13)]
    tables = [json.loads(path.read_text()) for path in (log_path / "wandb").rglob("*.table.json")]
    assert {tuple(table["columns"]) for table in tables} == {
        ("step", "prompt_id", "sample", "prompt", "response", "reward")
    }
    sent = {table["data"][0][0]: table["data"] for table in tables}
    assert sent == {step: [[step, step, 0, "tokens 1", "<b>\u6f22|", 1.0]] * 2 for step in (1, 10)}


@pytest.mark.soak
def test_a_run_survives_the_end_of_wandbs_service(tmp_path, session):
    output = session("wandb", None, 1, 3, "lose service", WANDB_MODE="offline")
    assert output.count("wandb: its service process is gone") == 1
    run_id = state_in(output)["wandb_run_id"]
    session("wandb", 5, 6, 7, "close", WANDB_MODE="offline")
    assert sorted(rows(tmp_path / "run", run_id)) == [(step, step / 3) for step in range(1, 8)]


def test_without_a_login_it_runs_offline_without_a_prompt(tmp_path, session):
    output = session("wandb", None, 1, 400, "close")
    assert "wandb: not logged in, so the run is recorded offline" in output and "wandb login" in output
    run_id = state_in(output)["wandb_run_id"]
    assert f"send it with: wandb sync {tmp_path / 'run'}/wandb/offline-run-*-{run_id}" in output
    assert recorded_steps(tmp_path / "run" / "wandb", run_id) == set(range(1, 401))


@pytest.mark.parametrize("left_in_block", range(10))
def test_records_across_block_boundaries(tmp_path, left_in_block):
    path, block, header = tmp_path / "run.wandb", 32 * 1024, 7

    def chunk(kind: int, content: bytes) -> bytes:
        return struct.pack("<IHB", 0, len(content), kind) + content

    first = bytes(block - 7 - header - left_in_block)
    written = b"\0" * 7 + chunk(1, first)
    if left_in_block < header:
        written += b"\0" * left_in_block + chunk(1, b"second")
    else:
        written += chunk(2, b"second"[: left_in_block - header]) + chunk(4, b"second"[left_in_block - header :])
    path.write_bytes(written + chunk(1, b"third"))
    assert list(read_records(path)) == [first, b"second", b"third"]
    path.write_bytes(written + chunk(1, b"third")[:-1])
    assert list(read_records(path)) == [first, b"second"]


def test_disabled_by_the_environment(tmp_path, session):
    output = session("wandb", None, 1, 2, "close", WANDB_MODE="disabled")
    assert "wandb: disabled by WANDB_MODE" in output
    assert state_in(output) == {"wandb_run_id": None, "last_step": 2}
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_missing_package_is_logged_and_the_run_id_kept(logger_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger_config.logger_backends = ["wandb"]
    state = {"wandb_run_id": "abc", "last_step": 3}
    hub = build_hub(logger_config, committed_step=3, config_dict={}, state=state)
    hub.log(4, {"reward/mean": 0.5})
    hub.close()
    notice = capsys.readouterr().out.splitlines()[0]
    assert notice.startswith("wandb: not installed, so nothing is sent; pip install wandb")
    assert hub.state() == {"wandb_run_id": "abc", "last_step": 4}


def test_the_state_file_is_replaced_atomically(tmp_path):
    assert read_state(tmp_path) is None
    for last_step in (-1, 7):
        write_state(tmp_path, WandbState(run_id="abc", last_step=last_step))
    assert read_state(tmp_path) == WandbState(run_id="abc", last_step=7)
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_state.json"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "\xff", '{"step": 2}', '{"step": 2, "run": 7, "recipe": "", "digest": ""}']
)
def test_a_damaged_line_of_the_sent_rows_is_ignored(tmp_path, line):
    row = SentRow(recipe="r", digest="d")
    sent = SentRows(tmp_path)
    sent.add("abc", 1, row)
    sent.close()
    with (tmp_path / "wandb_rows.jsonl").open("a") as file:
        file.write(f"{line}\n")
    again = SentRows(tmp_path)
    again.add("abc", 3, row)
    again.close()
    third = SentRows(tmp_path)
    third.close()
    assert third.of("abc") == {1: row, 3: row}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"null", b'{"run_id": "abc"}', b'{"run_id": 1, "last_step": 2}']
)
def test_a_damaged_state_file_is_ignored(tmp_path, content, capsys):
    (tmp_path / "wandb_state.json").write_bytes(content)
    assert read_state(tmp_path) is None
    assert f"!! wandb: {tmp_path}/wandb_state.json is damaged and is ignored" in capsys.readouterr().out
