"""``python -m rlinf_lite.checkpoint``: list, show, verify, compare, remove, prune and pin checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlinf_lite.checkpoint.cli import text, tools
from rlinf_lite.checkpoint.cli.compare import compare
from rlinf_lite.checkpoint.errors import CheckpointError
from rlinf_lite.checkpoint.layout import is_pinned
from rlinf_lite.printable import escape_controls

ERRORS = (CheckpointError, ValueError, OSError, OverflowError, RecursionError)
"""Said in one line. The last two: numbers and nesting that only a hostile checkpoint has."""

DESCRIPTION = """\
Look at, check, compare and remove checkpoints. PATH is a global_step_N directory, ROOT the directory that holds them or
that of a run; both may be URLs that fsspec knows (s3://, gs:// ...). Each command takes --json."""

WHAT_STAYS = """\
one stays while no checkpoint of the same step or a later one verifies in full, and while it is pinned or in use"""

WITHOUT_US = """\
the same check with standard commands, inside of the checkpoint's directory:
  jq -r '.files | to_entries[] | "\\(.value.sha256)  \\(.key)"' manifest.json | sha256sum --check"""


def list_checkpoints(options: argparse.Namespace) -> int:
    found = tools.list_root(tools.located(options.root))
    text.print_result(options.json, found, text.listing(found, options.metric))
    return 0


def show(options: argparse.Namespace) -> int:
    described = tools.describe(tools.located(options.path))
    text.print_result(options.json, described, text.description(described))
    return 0


def verify(options: argparse.Namespace) -> int:
    results = []
    for path in [path for where in options.paths for path in tools.to_verify(tools.located(where))]:
        results.append(tools.verify(path, options.level))
        if not options.json:
            text.print_line(text.verdict(results[-1], options.level))
    if options.json:
        text.print_json(results)
    return 0 if all(result.ok for result in results) else 1


def diff(options: argparse.Namespace) -> int:
    compared = compare(tools.located(options.a), tools.located(options.b), tensors_only=options.tensors_only)
    text.print_result(options.json, compared, text.comparison(compared))
    return 0 if compared.same else 1


def remove(options: argparse.Namespace) -> int:
    removed = []
    for path in tools.remove([tools.located(path) for path in options.paths], force=options.force):
        removed.append(path)
        if not options.json:
            text.print_line(f"removed {path}")
    if options.json:
        text.print_json({"removed": removed})
    return 0


def prune(options: argparse.Namespace) -> int:
    done = []
    for found in tools.prune(tools.located(options.root), force=options.force, dry_run=options.dry_run):
        done.append(found)
        verb = "would remove" if options.dry_run else "removed"
        if not options.json:
            text.print_line(f"{verb} {found.path}" if found.kept is None else f"kept {found.path}: {found.kept}")
    if options.json:
        text.print_json(done)
    return 0


def pin(options: argparse.Namespace) -> int:
    path = tools.located(options.path)
    if options.remove:
        tools.unpin(path)
    else:
        tools.pin(path)
    pinned = is_pinned(path)
    text.print_result(
        options.json, {"path": path, "pinned": pinned}, [f"{'pinned' if pinned else 'not pinned'}: {path}"]
    )
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rlinf_lite.checkpoint", description=DESCRIPTION)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        keep_lines = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=keep_lines)
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run)
        return added

    ls = command("ls", list_checkpoints, "list what is in a checkpoints directory, newest first")
    ls.add_argument("root", metavar="ROOT", nargs="?", default=".", help="default: the current directory")
    ls.add_argument("--metric", action="append", metavar="NAME", help="a metric to show (default: the first few)")
    command("show", show, "what one checkpoint holds").add_argument("path", metavar="PATH")
    check = command("verify", verify, "hold files against their manifest; exit code 1 if one differs", WITHOUT_US)
    check.add_argument("paths", metavar="PATH", nargs="+", help="a checkpoint, or a directory of them: all in it")
    check.add_argument("--level", choices=("full", "size"), default="full", help="full (default) reads every byte")
    two = command("diff", diff, "whether two checkpoints hold the same bits; exit code 0 if so, 1 if not, 2: error")
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")
    two.add_argument("--tensors-only", action="store_true", help="leave out data.pt and what the manifest says")
    rm = command("rm", remove, "delete checkpoints and leftovers; not while a run saves into their directory")
    rm.add_argument("paths", metavar="PATH", nargs="+")
    rm.add_argument("--force", action="store_true", help="even if pinned, in use, the newest, or without a manifest")
    away = command("prune", prune, "delete what runs have set aside as superseded or damaged", WHAT_STAYS)
    away.add_argument("root", metavar="ROOT", nargs="?", default=".", help="default: the current directory")
    away.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    away.add_argument("--force", action="store_true", help="without regard to what else is there")
    keep = command("pin", pin, "keep a checkpoint for ever")
    keep.add_argument("path", metavar="PATH")
    keep.add_argument("--remove", action="store_true", help="take the pin away")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if verify or diff found something; 2 after one line on stderr."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except ERRORS as error:
        print(f"error: {escape_controls(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
