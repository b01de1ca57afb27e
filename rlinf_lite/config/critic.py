"""The ``critic`` section, which RLinf's configs have: there is no critic."""

from __future__ import annotations

from typing import Annotated

from rlinf_lite.config.fields import Section, unsupported


class CriticConfig(Section):
    use_critic_model: Annotated[bool, unsupported("is not implemented; GRPO needs no critic")] = False
    """Not implemented; must be false."""
