"""The suggestion of the nearest known key for one that is misspelled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def nearest(key: str, known: Sequence[str]) -> str:
    """``"; did you mean runner.max_steps?"``, or an empty text if no known key is similar."""
    similar = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not similar:
        last_name = re.escape(key.rsplit(".", 1)[-1])
        similar = [other for other in known if re.search(rf"(^|\.){last_name}$", other)][:1]
    return f"; did you mean {similar[0]}?" if similar else ""
