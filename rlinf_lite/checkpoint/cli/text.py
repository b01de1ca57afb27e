"""Formats the results of the command line, as lines of text or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rlinf_lite import readable
from rlinf_lite.checkpoint.cli.compare import Comparison, TensorDifference, ValueDifference
from rlinf_lite.checkpoint.cli.tools import COMMITTED, Description, Found, Part, Verified
from rlinf_lite.printable import escape_controls

_INTERESTING = ("accuracy", "win", "reward/mean", "reward", "loss")
_FEW_METRICS = 3
_MANY = 50
"""How many lines of one kind a comparison prints before it only counts the rest."""


def print_result(as_json: bool, records: Any, lines: Iterable[str]) -> None:
    """Print ``records`` as JSON, or else ``lines``."""
    if as_json:
        print_json(records)
        return
    for line in lines:
        print_line(line)


def print_json(records: Any) -> None:
    print(json.dumps(plain(records), indent=1, allow_nan=False))


def print_line(line: str) -> None:
    print(escape_controls(line), flush=True)


def plain(value: Any) -> Any:
    """Convert records to JSON values; NaN and infinities, which JSON lacks, become text."""
    if isinstance(value, Comparison):
        verdicts = {"same": value.same, "same_tensors": value.same_tensors}
        return verdicts | {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def listing(found: Sequence[Found], metrics: Sequence[str] | None) -> Iterator[str]:
    if not found:
        yield "no checkpoints"
        return
    rows = [("name", "saved", "age", "size", "ranks", "")]
    rows += [_row(entry, metrics) for entry in found]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for name, saved, age, size, ranks, notes in rows:
        cells = (name.ljust(widths[0]), saved.ljust(widths[1]), age.rjust(widths[2]), size.rjust(widths[3]))
        yield "  ".join((*cells, ranks.rjust(widths[4]), notes)).rstrip()


def _row(entry: Found, metrics: Sequence[str] | None) -> tuple[str, str, str, str, str, str]:
    return (
        entry.path.name,
        "-" if entry.saved_at is None else f"{entry.saved_at:%Y-%m-%d %H:%M:%S}",
        "-" if entry.saved_at is None else _age(entry.saved_at),
        "-" if entry.num_bytes is None else readable.size(entry.num_bytes),
        "+".join(map(str, entry.num_ranks.values())) or "-",
        "; ".join(_notes(entry, metrics)),
    )


def _interest(name: str) -> tuple[int, str]:
    """Sort key for metric names: those by which people choose checkpoints come first."""
    return next((place for place, word in enumerate(_INTERESTING) if word in name), len(_INTERESTING)), name


def _notes(entry: Found, metrics: Sequence[str] | None) -> Iterator[str]:
    if entry.state != COMMITTED:
        yield entry.state
    if entry.reason is not None:
        yield entry.reason
    if entry.pinned:
        yield "pinned"
    if entry.in_use:
        yield "in use"
    names = sorted(entry.metrics, key=_interest)[:_FEW_METRICS] if metrics is None else metrics
    shown = [f"{name} {_number(entry.metrics[name])}" for name in names if name in entry.metrics]
    if shown:
        yield ", ".join(shown)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _age(then: datetime) -> str:
    return readable.duration(round(max(0.0, (datetime.now().astimezone() - then).total_seconds())))


def description(described: Description) -> Iterator[str]:
    found = described.found
    yield f"{found.path}"
    yield f"  step {found.step}, {readable.size(found.num_bytes or 0)}"
    yield f"  saved {'at an unknown time' if found.saved_at is None else found.saved_at.isoformat(' ', 'seconds')}"
    yield from (f"  {note}" for note in _notes(found, []))
    for name, parts in described.sections.items():
        yield from _section(name, found.num_ranks[name], parts)
    yield f"files: {len(described.files)}"
    yield from (f"  {readable.size(record.size):>9}  {name}" for name, record in sorted(described.files.items()))
    yield "info:"
    yield from (f"  {line}" for line in json.dumps(described.info, indent=2, sort_keys=True).splitlines())


def _section(name: str, num_ranks: int, parts: Mapping[str, Part]) -> Iterator[str]:
    num_tensors = sum(part.num_tensors for part in parts.values())
    yield f"{name}: {num_tensors} tensors, written by {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}"
    for key, part in parts.items():
        yield f"  {key}: {part.num_tensors} tensors, {part.num_elements:,} elements, {readable.size(part.num_bytes)}"
    if "model" in parts:
        yield f"  model parameters: {parts['model'].num_elements:,}"


def verdict(result: Verified, level: str) -> str:
    if not result.ok:
        return f"BAD  {result.path}: {result.reason}"
    if level == "size":
        return f"ok   {result.path}: sizes of {result.num_files} files, {result.seconds:.2f} s"
    speed = result.num_bytes / 1e9 / result.seconds
    return f"ok   {result.path}: {readable.size(result.num_bytes)} in {result.seconds:.2f} s ({speed:.2f} GB/s)"


def comparison(compared: Comparison) -> Iterator[str]:
    yield f"A {compared.a}"
    yield f"B {compared.b}"
    equal, other = compared.num_tensors - len(compared.tensors), len(compared.tensors)
    yield f"tensors: {equal} bitwise identical, {other} different; {readable.size(compared.num_bytes)} compared"
    yield from _some([_tensor_line(difference) for difference in compared.tensors])
    for title, differences in (
        ("only in one, or of another type or shape", compared.forms),
        ("beside tensors", compared.values),
        ("data.pt", compared.data),
        ("manifest", compared.manifest),
    ):
        if differences:
            yield f"{title}: {len(differences)} different"
            yield from _some([_value_line(difference) for difference in differences])
    yield _conclusion(compared)


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:_MANY])
    if len(lines) > _MANY:
        yield f"  and {len(lines) - _MANY} more (all with --json)"


def _tensor_line(difference: TensorDifference) -> str:
    line = f"{difference.name} {difference.form}: {difference.num_different} of {difference.num_elements} elements"
    largest = difference.largest_difference
    return line if largest is None else f"{line}, largest difference {largest:.6g}"


def _value_line(difference: ValueDifference) -> str:
    a, b = (side if side is not None else "missing" for side in (difference.a, difference.b))
    return f"{difference.name}: A {a}, B {b}"


def _conclusion(compared: Comparison) -> str:
    if compared.same:
        return "same"
    return "different (all tensors are bitwise identical)" if compared.same_tensors else "different"
