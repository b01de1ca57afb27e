"""toolkits/cluster: what a node is told to be, where the token comes from, what is said of an incomplete cluster.

And the files for Docker, Slurm and Kubernetes, as far as they can be read without these.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CLUSTER = REPO / "toolkits" / "cluster"
EXAMPLES = REPO / "docs" / "examples"
sys.path.insert(0, str(CLUSTER))  # as when they run as programs

import check_ray  # noqa: E402
import membership  # noqa: E402
import node_plan  # noqa: E402
import ray_token  # noqa: E402
import start_ray  # noqa: E402


def node(address: str, *, alive: bool = True, is_head: bool = False, **resources: float) -> membership.Node:
    return membership.Node(
        id=f"{address} {alive}",
        address=address,
        host=f"host-{address}",
        is_head=is_head,
        alive=alive,
        death="" if alive else "health check failed",
        resources=resources,
    )


# -- who am I


@pytest.mark.parametrize(
    ("arguments", "env", "head"),
    [
        (["head"], {}, None),
        (["--head"], {"MASTER_ADDR": "a", "RANK": "3"}, None),
        ([], {"RANK": "0", "MASTER_ADDR": "a"}, None),
        ([], {"RANK": "1", "MASTER_ADDR": "a"}, "a:6379"),
        ([], {"NODE_RANK": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, "a:29500"),
        ([], {"SLURM_NODEID": "1", "MASTER_ADDR": "a"}, "a:6379"),
        (["worker"], {"RANK": "0", "MASTER_ADDR": "a"}, "a:6379"),
        (["worker", "--address", "b"], {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, "b:7"),
        (["--address", "b:9"], {"RANK": "0"}, "b:9"),
        (["--address=b", "--port=8"], {"MASTER_PORT": "7"}, "b:8"),
    ],
)
def test_role_and_head(arguments, env, head):
    assert node_plan.read_plan(arguments, env).head == head


def test_what_is_not_ours_goes_to_ray_start():
    plan = node_plan.read_plan(
        ["worker", "--address=a", "--num-cpus", "4", "--timeout=7", "--block", "--labels=x=1"], {}
    )
    assert (plan.rest, plan.timeout, plan.block) == (("--num-cpus", "4", "--labels=x=1"), 7.0, True)


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        ([], {}, "Give head or worker as the first argument, or set RANK"),
        ([], {"RANK": "1"}, "set MASTER_ADDR"),
        (["worker"], {}, "set MASTER_ADDR"),
        (["head", "--address=a:1"], {}, "leave them out for the head"),
        (["worker", "--head"], {}, "leave them out for the head"),
    ],
)
def test_contradictions(arguments, env, said):
    with pytest.raises(node_plan.StartError, match=said):
        node_plan.read_plan(arguments, env)


def test_the_head_takes_the_address_that_others_know_it_by():
    mine = next((ip for ip, name in node_plan.interfaces().items() if not ip.startswith("127.")), None)
    if mine is not None:
        assert node_plan.read_plan(["head"], {"MASTER_ADDR": mine}).own_ip == mine
    for not_mine in ("127.0.0.1", "192.0.2.1", "no-such-host.invalid"):
        assert node_plan.read_plan(["head"], {"MASTER_ADDR": not_mine}).own_ip is None


# -- the token


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_only_the_head_makes_a_token(home):
    token = home / ".ray" / "auth_token"
    with pytest.raises(ray_token.TokenError, match="there is no token; every node and the driver need"):
        ray_token.need_token()
    assert not token.exists()
    ray_token.need_token(make=True)
    made = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", made)
    assert token.stat().st_mode & 0o777 == 0o600
    ray_token.need_token()
    ray_token.need_token(make=True)
    assert token.read_text() == made


def test_a_token_from_elsewhere(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "mine"))
    with pytest.raises(ray_token.TokenError, match="mine: there is no token"):
        ray_token.need_token()
    (home / "mine").write_text("abc")
    ray_token.need_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    ray_token.need_token(make=True)
    assert not (home / ".ray").exists()


def test_without_authentication_there_is_no_token(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_token.need_token(make=True)
    assert not ray_token.is_on()
    assert not (home / ".ray").exists()


# -- who is there


def test_report_of_a_complete_cluster():
    nodes = [node("10.0.0.1", is_head=True, CPU=16.0, GPU=8.0), node("10.0.0.2", CPU=2.0)]
    assert check_ray.report(2, "10.0.0.1:6379", nodes) == [
        "2 of 2 nodes are alive at 10.0.0.1:6379",
        "  10.0.0.1  host-10.0.0.1  16 CPUs  8 GPUs  head",
        "  10.0.0.2  host-10.0.0.2  2 CPUs  0 GPUs",
    ]


def test_report_names_the_dead_that_did_not_come_back():
    nodes = [
        node("10.0.0.1", is_head=True),
        node("10.0.0.2", alive=False),
        node("10.0.0.2"),
        node("10.0.0.3", alive=False),
    ]
    lines = check_ray.report(3, "10.0.0.1:6379", nodes)
    assert [line for line in lines if "dead" in line] == ["  10.0.0.3  host-10.0.0.3  dead: health check failed"]
    assert lines[-1] == "1 missing; on each run: bash toolkits/cluster/start_ray.sh worker --address 10.0.0.1:6379"


@pytest.mark.parametrize(
    ("env", "address"),
    [
        ({"RAY_ADDRESS": "a:1", "MASTER_ADDR": "b"}, "a:1"),
        ({"RAY_ADDRESS": "auto", "MASTER_ADDR": "b"}, "b"),
        ({"MASTER_ADDR": "b", "MASTER_PORT": "7"}, "b:7"),
    ],
)
def test_which_cluster_is_meant(env, address):
    assert check_ray.known_address(env) == address


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        membership.knock(address)
        with pytest.raises(start_ray.StartError, match="something else listens there; choose another port"):
            start_ray._refuse_taken(address)
    with pytest.raises(membership.NoAnswerError, match="no Ray head listens there"):
        membership.ask(address)
    started = time.monotonic()
    with pytest.raises(membership.NoAnswerError, match=r"did not answer within 0\.3 s: Connection refused"):
        check_ray.wait_for(1, address, 0.3)
    assert time.monotonic() - started < 5


def test_addresses():
    assert membership.resolve("127.0.0.1") == "127.0.0.1:6379"
    assert membership.resolve("127.0.0.1:80") == "127.0.0.1:80"
    with pytest.raises(ValueError, match="is not host:port"):
        membership.resolve("127.0.0.1:http")


def test_a_worker_gives_up_on_a_head_that_does_not_answer(home, tmp_path):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("abc")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(home), "RANK": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["bash", str(CLUSTER / "start_ray.sh"), "--timeout=0.1"]
    result = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert result.returncode == 1
    assert f"error: the head 127.0.0.1:{port} cannot be reached (tried for 0.1 s): Connection refused" in result.stderr


@pytest.mark.soak
def test_a_node_starts_once_and_is_found(home, tmp_path):
    """Ended by process, since `ray stop` would end every Ray of the machine."""
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    directory = Path("/tmp") / f"cs{os.getpid()}"  # short: a socket's path has at most 107 characters
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(home), "MASTER_PORT": str(port)}
    extra = ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir={directory}", "--object-store-memory=80000000"]
    start = ["bash", str(CLUSTER / "start_ray.sh"), "head", *extra]
    run = {"env": env, "cwd": tmp_path, "text": True}
    head = subprocess.Popen([*start, "--block"], stdout=subprocess.PIPE, start_new_session=True, **run)
    try:
        first = next(line for line in head.stdout if line.startswith("head: "))
        assert first.endswith("1 CPUs  0 GPUs  head\n")
        address = f"{first.split()[1]}:{port}"
        again = subprocess.run(start, capture_output=True, timeout=60, **run)
        assert (again.returncode, again.stdout.splitlines()[0]) == (
            0,
            f"Ray is already running here, as a node of {address}",
        )
        check = ["bash", str(CLUSTER / "check_ray.sh"), "--address", address, "--timeout=1"]
        one, two = (subprocess.run([*check, n], capture_output=True, timeout=60, **run) for n in ("1", "2"))
        assert (one.returncode, two.returncode) == (0, 1)
        assert "1 of 2 nodes are alive" in two.stdout
        other = {**run, "env": {**env, "RAY_AUTH_TOKEN": "another"}}
        refused = subprocess.run([*check, "1"], capture_output=True, timeout=60, **other)
        assert (refused.returncode, "refuses this token" in refused.stderr) == (1, True)
        below = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        _, left = psutil.wait_procs(below, timeout=20)
        assert not left
    finally:
        if head.poll() is None:
            for process in (*psutil.Process(head.pid).children(recursive=True), head):
                process.kill()
        shutil.rmtree(directory, ignore_errors=True)


# -- files for others


@pytest.mark.parametrize("script", [*CLUSTER.glob("*.sh"), *EXAMPLES.glob("*.sbatch")], ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    linter = shutil.which("shellcheck")
    if linter:
        subprocess.run([linter, "--shell=bash", "--external-sources", f"--source-path={REPO}", str(script)], check=True)


def test_compose_and_kuberay_name_what_is_there():
    compose = yaml.safe_load((REPO / "docker" / "compose.yaml").read_text())
    rayjob, _ = yaml.safe_load_all((EXAMPLES / "kuberay-rayjob.yaml").read_text())
    commands = [str(service["command"]) for service in compose["services"].values()]
    commands += [str(compose["services"]["head"]["healthcheck"]["test"]), rayjob["spec"]["entrypoint"]]
    named = [path for command in commands for path in re.findall(r"/opt/rlinf_lite/([\w./]+)", command)]
    assert len(named) == 6
    assert all((REPO / path).is_file() for path in named)
    config = re.search(r"run_main_math\.sh (\S+)", rayjob["spec"]["entrypoint"]).group(1)
    assert (REPO / "configs" / f"{config}.yaml").is_file()
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert "/opt/rlinf_lite\n" in (REPO / "docker" / name).read_text()


def test_kuberay_uses_the_ray_of_the_constraints():
    rayjob, _ = yaml.safe_load_all((EXAMPLES / "kuberay-rayjob.yaml").read_text())
    pinned = re.search(r"^ray==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned


@pytest.mark.parametrize("needed", ["toolkits/environment.sh", "configs/fsdp/cpu.yaml", "constraints.txt", "LICENSE"])
def test_images_get_what_a_run_needs(needed):
    patterns = [line for line in (REPO / ".dockerignore").read_text().split() if not line.startswith("#")]
    parts = Path(needed).parts
    assert not any(part == pattern.removeprefix("**/") for pattern in patterns for part in parts)
