"""The launcher hands every argument on as it got it, explains itself, and chooses the right environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

STUB = """#!/usr/bin/env bash
if [[ "$1" == - ]]; then exec "$REAL_PYTHON" "$@"; fi
pwd
printf '<%s>\\n' "$@"
"""

AWKWARD = [
    "runner.experiment_name=two words",
    "data.train_data_paths=[a.jsonl,'b c.jsonl']",
    'data.prompt_key="quoted"',
    "a=$HOME `id` \\ * ? ~",
    "",
    "+b={x: 1, y: 'é\"'}",
    "line\nbreak",
    "--config-dir=somewhere",
    "key=a=b",
    "~data.shuffle",
]


def launch(
    *arguments: str, path: str, cwd: Path, launcher: Path = REPO / "run_main_math.sh"
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": path, "HOME": str(cwd), "REAL_PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(launcher), *arguments], cwd=cwd, env=env, text=True, capture_output=True, timeout=120
    )


@pytest.fixture
def stub_path(tmp_path: Path) -> str:
    """A PATH whose `python` passes the question about the environment on, and prints what else it is given."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    return f"{stub.parent}:/usr/bin:/bin"


@pytest.mark.parametrize("arguments", [[], ["grpo-1.5b"], ["runner.max_steps=8"], AWKWARD], ids=len)
def test_every_argument_is_forwarded(arguments: list[str], stub_path: str, tmp_path: Path) -> None:
    result = launch(*arguments, path=stub_path, cwd=tmp_path)
    printed = "".join(f"<{argument}>\n" for argument in ["-P", "-m", "rlinf_lite.main_math", *arguments])
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}\n{printed}"), result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_needs_no_environment(flag: str, tmp_path: Path) -> None:
    result = launch("some-config", flag, path="/usr/bin:/bin", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "run_main_math.sh [config-name] [hydra overrides ...]" in result.stdout
    assert "runner.resume_dir=auto" in result.stdout


def copy_scripts(target: Path) -> Path:
    """The launcher alone, in a checkout that no environment has installed."""
    shutil.copytree(REPO / "toolkits", target / "toolkits", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_main_math.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, target / name)
    return target / "run_main_math.sh"


def make_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_another_checkout_is_not_run(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    bin_dir = tmp_path / "bin"
    # Every Python of this PATH asks the real one, but none of them can make a .venv.
    for name in ("python", "python3"):
        make_executable(bin_dir / name, '[[ "$1" == - ]] && exec "$REAL_PYTHON" "$@"; echo "$@" >&2; exit 7')
    result = launch(path=f"{bin_dir}:/usr/bin:/bin", cwd=tmp_path, launcher=launcher)
    assert result.returncode == 1
    venv = launcher.parent / ".venv"
    assert f"environment: {venv}, not {bin_dir}/python: its rlinf_lite is another copy" in result.stderr


def test_old_python_gets_a_clear_line(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "rm"):
        (tools / name).symlink_to(shutil.which(name) or name)
    make_executable(tools / "python3", '[[ "$1" == -V ]] && echo "Python 3.8.10" && exit; exit 1')
    result = launch(path=str(tools), cwd=tmp_path, launcher=launcher)
    assert result.returncode == 1
    assert "error: Python 3.11 or newer is needed" in result.stderr
    assert "Python 3.8.10" in result.stderr


def test_shell_scripts_parse() -> None:
    for script in ("run_main_math.sh", "tests/run.sh", ".ci/run", "toolkits/environment.sh"):
        subprocess.run(["bash", "-n", str(REPO / script)], check=True)
    assert os.access(REPO / ".ci" / "run", os.X_OK)
