"""The arguments of ``python -m rlinf_lite.checkpoint``, and one function per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlinf_lite.checkpoint.cli import text, tools
from rlinf_lite.checkpoint.cli.compare import compare
from rlinf_lite.checkpoint.errors import CheckpointError
from rlinf_lite.checkpoint.identify import located
from rlinf_lite.checkpoint.layout import is_pinned
from rlinf_lite.printable import escape_controls

DESCRIPTION = """\
Look at, check, compare and remove checkpoints. PATH is a global_step_N directory, ROOT the directory that holds them or
that of a run; both may be URLs that fsspec knows (s3://, gs:// ...). Each command takes --json."""

WHAT_IS_KEPT = """\
one is kept while no checkpoint of the same step or a later one verifies in full, or while it is pinned or in use"""

OTHER_COMMANDS = """\
the same check with jq and b3sum, in the checkpoint's directory:
  jq -r '.files | to_entries[] | "\\(.value.blake3)  \\(.key)"' manifest.json | b3sum --check"""


def list_checkpoints(options: argparse.Namespace) -> int:
    found = tools.list_root(located(options.root))
    text.print_result(options.json, found, text.listing(found, options.metric))
    return 0


def show(options: argparse.Namespace) -> int:
    described = tools.describe(located(options.path))
    text.print_result(options.json, described, text.description(described))
    return 0


def verify(options: argparse.Namespace) -> int:
    results = []
    for path in [path for where in options.paths for path in tools.to_verify(located(where))]:
        results.append(tools.verify(path, options.level))
        if not options.json:
            text.print_line(text.verdict(results[-1], options.level))
    if options.json:
        text.print_json(results)
    return 0 if all(result.ok for result in results) else 1


def diff(options: argparse.Namespace) -> int:
    compared = compare(located(options.a), located(options.b), tensors_only=options.tensors_only)
    text.print_result(options.json, compared, text.comparison(compared))
    return 0 if compared.same else 1


def remove(options: argparse.Namespace) -> int:
    removed = []
    for path in tools.remove([located(path) for path in options.paths], force=options.force):
        removed.append(path)
        if not options.json:
            text.print_line(f"removed {path}")
    if options.json:
        text.print_json({"removed": removed})
    return 0


def prune(options: argparse.Namespace) -> int:
    done = []
    for found in tools.prune(located(options.root), force=options.force, dry_run=options.dry_run):
        done.append(found)
        verb = "would remove" if options.dry_run else "removed"
        if not options.json:
            text.print_line(f"{verb} {found.path}" if found.kept is None else f"kept {found.path}: {found.kept}")
    if options.json:
        text.print_json(done)
    return 0


def pin(options: argparse.Namespace) -> int:
    path = located(options.path)
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
    check = command("verify", verify, "verify files against their manifest; exit code 1 if one differs", OTHER_COMMANDS)
    check.add_argument("paths", metavar="PATH", nargs="+", help="a checkpoint, or a directory of them: all in it")
    check.add_argument("--level", choices=("full", "size"), default="full", help="full (default) reads every byte")
    two = command(
        "diff", diff, "compare two checkpoints bit by bit; exit code 0 if they are the same, 1 if not, 2 for an error"
    )
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")
    two.add_argument("--tensors-only", action="store_true", help="leave out data.pt and the manifest")
    rm = command("rm", remove, "delete checkpoints and leftovers; not while a run saves into their directory")
    rm.add_argument("paths", metavar="PATH", nargs="+")
    rm.add_argument("--force", action="store_true", help="even if pinned, in use, the newest, or without a manifest")
    away = command("prune", prune, "delete what runs have set aside as superseded or damaged", WHAT_IS_KEPT)
    away.add_argument("root", metavar="ROOT", nargs="?", default=".", help="default: the current directory")
    away.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    away.add_argument("--force", action="store_true", help="do not look at other checkpoints")
    keep = command("pin", pin, "pin a checkpoint, so that it is never deleted")
    keep.add_argument("path", metavar="PATH")
    keep.add_argument("--remove", action="store_true", help="remove the pin")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 if verify or diff found a difference; 2 after an error, printed in one line."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {escape_controls(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return code
