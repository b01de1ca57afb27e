"""The launcher passes every argument on unchanged, explains itself, and chooses the right environment."""

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


def bare_path(bin_dir: Path, python_stub: str) -> str:
    """A PATH with what the script needs and no Python but `python3`, a stub: nothing here can make a real .venv."""
    bin_dir.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "rm"):
        tool = shutil.which(name)
        assert tool
        (bin_dir / name).symlink_to(tool)
    (bin_dir / "python3").write_text(f"#!/usr/bin/env bash\n{python_stub}\n")
    (bin_dir / "python3").chmod(0o755)
    (bin_dir / "env").symlink_to("/usr/bin/env")
    return str(bin_dir)


def test_another_checkout_is_not_run(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    path = bare_path(tmp_path / "bin", 'if [[ "$1" == - ]]; then exec "$REAL_PYTHON" "$@"; fi; exit 7')
    result = launch(path=path, cwd=tmp_path, launcher=launcher)
    venv = launcher.parent / ".venv"
    assert result.returncode == 1
    assert f"environment: {venv}, not {path}/python3: its rlinf_lite is another copy" in result.stderr
    assert not venv.exists()


def test_old_python_gets_a_clear_line(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    path = bare_path(tmp_path / "bin", 'if [[ "$1" == -V ]]; then echo "Python 3.8.10"; exit; fi; exit 1')
    result = launch(path=path, cwd=tmp_path, launcher=launcher)
    assert result.returncode == 1
    assert "error: Python 3.11 or newer is needed" in result.stderr
    assert "Python 3.8.10" in result.stderr


def test_without_the_venv_module_the_remedy_is_named(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    path = bare_path(tmp_path / "bin", 'if [[ "$*" == *version_info* ]]; then exit 0; fi; exit 1')
    result = launch(path=path, cwd=tmp_path, launcher=launcher)
    assert result.returncode == 1
    assert "has no venv module" in result.stderr
    assert "apt install python3-venv" in result.stderr


# Stands for a Python that can make a .venv; the one inside fails its first installation half-way, then succeeds.
VENV_STUB = """
case "$*" in
"- "*) [[ -e "$STATE/installed" && "$0" == *.venv* ]] || exit 1 ;;
*-m\\ venv*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
*pip\\ install*) echo "$@" >>"$STATE/calls"
    [[ -e "$STATE/tried" ]] || { : >"$STATE/tried"; exit 1; }
    : >"$STATE/installed" ;;
*-m\\ rlinf_lite*) echo trained ;;
esac
"""


def test_an_interrupted_installation_is_repaired(tmp_path: Path) -> None:
    launcher = copy_scripts(tmp_path / "clone")
    state = tmp_path / "state"
    state.mkdir()
    path = bare_path(tmp_path / "bin", f'export STATE="{state}"\n{VENV_STUB}')
    for name in ("mkdir", "cp"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    first, second, third = (launch(path=path, cwd=tmp_path, launcher=launcher) for _ in range(3))
    assert first.returncode == 1 and "could not be installed" in first.stderr
    assert (second.returncode, second.stdout) == (0, "trained\n"), second.stderr
    assert (third.returncode, third.stdout) == (0, "trained\n"), third.stderr
    assert len((state / "calls").read_text().splitlines()) == 2, "a finished environment is not installed again"
    (launcher.parent / "constraints.txt").write_text("# other pins\n")
    assert launch(path=path, cwd=tmp_path, launcher=launcher).stdout == "trained\n"
    assert len((state / "calls").read_text().splitlines()) == 3, "other pins are installed"


def test_shell_scripts_parse() -> None:
    for script in ("run_main_math.sh", "tests/run.sh", ".ci/run", "toolkits/environment.sh"):
        subprocess.run(["bash", "-n", str(REPO / script)], check=True)
    assert os.access(REPO / ".ci" / "run", os.X_OK)
