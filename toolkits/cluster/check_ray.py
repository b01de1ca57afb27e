"""Waits until a Ray cluster has a given number of nodes, and prints them and what is missing."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence

from membership import NoAnswerError, Node, ask, resolve
from ray._private.services import find_bootstrap_address
from ray_token import TokenError, need_token

DESCRIPTION = """\
Wait until the Ray cluster has N nodes, and print them with their CPUs and GPUs. Exit code 1, with what is missing, if
they have not joined in time. Which cluster, the first of these that is given: --address; RAY_ADDRESS; MASTER_ADDR and
MASTER_PORT; the one that start_ray.sh or ray start left on this machine.
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("check_ray.sh", description=DESCRIPTION)
    parser.add_argument("nodes", type=int, metavar="N", help="how many nodes, the head included (not GPUs)")
    parser.add_argument("--address", metavar="HOST[:PORT]", help="the head")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait at most (300)")
    options = parser.parse_args(argv)
    try:
        address = options.address or known_address(os.environ)
        need_token()
        nodes = wait_for(options.nodes, address, options.timeout)
    except (LookupError, ValueError, NoAnswerError, TokenError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(report(options.nodes, address, nodes)))
    return 0 if sum(node.alive for node in nodes) >= options.nodes else 1


def known_address(env: Mapping[str, str]) -> str:
    """Return the address of the cluster. Raises LookupError if none is named and none was started here."""
    if (address := env.get("RAY_ADDRESS", "auto")) not in ("auto", "local"):
        return address
    if host := env.get("MASTER_ADDR"):
        return ":".join(filter(None, (host, env.get("MASTER_PORT"))))
    if address := find_bootstrap_address(None):
        return address
    raise LookupError("no cluster is named, and none was started here; give --address HOST:PORT or set MASTER_ADDR")


def wait_for(number: int, address: str, seconds: float) -> list[Node]:
    """Return the nodes as soon as ``number`` of them are alive, or as they are after ``seconds``.

    Raises:
        NoAnswerError: the head did not answer in this time.
        TokenError: raised at once, because waiting does not help.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            nodes = ask(resolve(address))
            if sum(node.alive for node in nodes) >= number or time.monotonic() > deadline:
                return nodes
        except NoAnswerError as error:
            if time.monotonic() > deadline:
                raise NoAnswerError(f"{address} did not answer within {seconds:g} s: {error}") from None
        time.sleep(min(1.0, max(deadline - time.monotonic(), 0.1)))


def report(number: int, address: str, nodes: Sequence[Node]) -> list[str]:
    """Return one line per living node; if some are missing, also the dead ones and what to do."""
    alive = [node for node in nodes if node.alive]
    lines = [f"{len(alive)} of {number} nodes are alive at {address}", *(f"  {node.line()}" for node in alive)]
    if len(alive) >= number:
        return lines
    dead = [node for node in nodes if not node.alive and node.address not in {node.address for node in alive}]
    return [
        *lines,
        *(f"  {node.address}  {node.host}  dead: {node.death or 'no reason known'}" for node in dead),
        f"{number - len(alive)} missing; on each run: bash toolkits/cluster/start_ray.sh worker --address {address}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
