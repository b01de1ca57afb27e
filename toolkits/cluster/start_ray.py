"""Starts Ray on this node and waits until the node is part of the cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from membership import NoAnswerError, Node, ask, knock, resolve
from node_plan import Plan, StartError, interfaces, read_plan
from ray._private.services import find_gcs_addresses, get_node_ip_address
from ray_token import TokenError, is_on, need_token

# Read by the GCS: a killed node is given up after period x threshold, a silent one (period + timeout) x threshold.
DEFAULTS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main(argv: Sequence[str]) -> int:
    try:
        plan = read_plan(argv, os.environ)
        need_token(make=plan.head is None)
        return start(plan)
    except (StartError, NoAnswerError, TokenError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def start(plan: Plan) -> int:
    """Returns the exit code of ``ray start`` where it is told to block, else 0.

    Raises:
        StartError, NoAnswerError, TokenError: the node is not part of the cluster.
    """
    if plan.head is None:
        own_ip = plan.own_ip or get_node_ip_address()
        address, known = f"{own_ip}:{plan.port}", []
    else:
        address, known = _wait_for_head(plan.head, plan.timeout)
        own_ip = plan.own_ip or get_node_ip_address(address)
    if address in find_gcs_addresses():
        known = known or ask(address)
        if node := _alive(known, own_ip):
            print(f"Ray is already running here, as a node of {address}\n  {node.line()}")
            return 0
    elif plan.head is None:
        _refuse_taken(address)
    _set_variables(own_ip)
    return _run(_command(plan, address, own_ip), plan, address, own_ip, {node.id for node in known})


def _wait_for_head(head: str, seconds: float) -> tuple[str, list[Node]]:
    """Its address as ``ip:port``, and the nodes it has, once it answers."""
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            address = resolve(head)
            return address, ask(address)
        except NoAnswerError as error:
            if time.monotonic() > deadline:
                raise StartError(
                    f"the head {head} cannot be reached (tried for {seconds:g} s): {error}; start the head first, and "
                    "check MASTER_ADDR and MASTER_PORT"
                ) from None
            if not said:
                print(f"waiting for the head {head} (at most {seconds:g} s): {error}", flush=True)
                said = True
        time.sleep(1)


def _alive(nodes: Sequence[Node], ip: str, before: frozenset[str] | set[str] = frozenset()) -> Node | None:
    return next((node for node in nodes if node.alive and node.address == ip and node.id not in before), None)


def _refuse_taken(address: str) -> None:
    try:
        knock(address)
    except NoAnswerError:
        return
    raise StartError(f"{address}: something else listens there; choose another port with --port or MASTER_PORT")


def _set_variables(own_ip: str) -> None:
    """For Ray, and through it for every worker process of this node."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Left alone, gloo takes the interface of the host's name, which is often the loopback; names differ between nodes.
    interface = interfaces().get(own_ip, "lo")
    if interface != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" it is the beginning of a name


def _command(plan: Plan, address: str, own_ip: str) -> list[str]:
    where = ["--head", f"--port={plan.port}"] if plan.head is None else [f"--address={address}"]
    block = ["--block"] if plan.block else []
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        *where,
        f"--node-ip-address={own_ip}",
        *block,
        *plan.rest,
    ]


def _run(command: list[str], plan: Plan, address: str, own_ip: str, before: set[str]) -> int:
    with tempfile.TemporaryFile("w+") as log:
        ray = subprocess.Popen(command, stdout=None if plan.block else log, stderr=subprocess.STDOUT)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: ray.send_signal(number))
        if not plan.block and ray.wait() != 0:
            log.seek(0)
            last = "".join(f"  {line}" for line in log.readlines()[-15:])
            raise StartError(f"ray start ended with exit code {ray.returncode}:\n{last}")
    node = _wait_to_join(ray, plan, address, own_ip, before)
    print("\n".join(_joined(plan, address, node)), flush=True)
    if not plan.block:
        return 0
    code = ray.wait()
    return 128 - code if code < 0 else code  # as a shell says it of one that a signal ended


def _wait_to_join(ray: subprocess.Popen[bytes], plan: Plan, address: str, own_ip: str, before: set[str]) -> Node:
    deadline = time.monotonic() + plan.timeout
    while True:
        try:
            if node := _alive(ask(address), own_ip, before):
                return node
            reason = f"the head does not list a node {own_ip}"
        except NoAnswerError as error:
            reason = str(error)
        if plan.block and ray.poll() is not None:
            raise StartError(f"ray start ended with exit code {ray.returncode} before the node had joined: see above")
        if time.monotonic() > deadline:
            ray.terminate()
            raise StartError(f"this node did not join {address} within {plan.timeout:g} s: {reason}")
        time.sleep(0.5)


def _joined(plan: Plan, address: str, node: Node) -> list[str]:
    if plan.head is not None:
        return [f"joined {address} as {node.line()}"]
    token = (
        "the token of the home (~/.ray/auth_token, or RAY_AUTH_TOKEN)" if is_on() else "no token: RAY_AUTH_MODE is off"
    )
    mode = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} " if is_on() else ""
    return [
        f"head: {node.line()}",
        f"  other nodes   bash toolkits/cluster/start_ray.sh worker --address {address}",
        f"                with {token}",
        "  then, here    bash toolkits/cluster/check_ray.sh N",
        f"                {mode}bash run_main_math.sh CONFIG cluster.num_nodes=N",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
