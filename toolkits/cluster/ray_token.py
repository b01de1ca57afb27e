"""The authentication token of a Ray cluster: who creates it, and where every process finds it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
HOW = (
    "every node and the driver need the token of the head: share ~/.ray/auth_token (a shared home does), copy it, "
    f"or set {TOKEN} or {TOKEN_PATH}"
)


class TokenError(RuntimeError):
    """There is no token, or not the cluster's."""


def need_token(*, make: bool = False) -> None:
    """Make sure that there is a token if RAY_AUTH_MODE asks for one; start_ray.sh and check_ray.sh set it to ``token``.

    By default ``ray start`` of Ray 2.60 uses authentication only if the home directory of the head holds a token, and
    then refuses a worker or driver without the variable. Without authentication, everybody who
    reaches the cluster can run code on it.

    Args:
        make: write a new token if there is none, as the head does.

    Raises:
        TokenError: there is none, and none is made; Ray itself would abort.
    """
    if not is_on() or os.environ.get(TOKEN):
        return
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    if path.is_file() and path.stat().st_size > 0:
        return
    if not make:
        raise TokenError(f"{path}: there is no token; {HOW}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def is_on() -> bool:
    return os.environ.get(MODE, "").lower() == "token"
