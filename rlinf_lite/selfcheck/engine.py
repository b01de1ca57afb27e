"""The engine's half of the self-check."""

from __future__ import annotations

from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.selfcheck.made_up import first_difference, parts_of
from rlinf_lite.selfcheck.records import EngineCheck, by_operation
from rlinf_lite.selfcheck.twice import Twice
from rlinf_lite.types import GenerationBatch


def check_engine(engine: RolloutEngine, batch: GenerationBatch) -> EngineCheck:
    """Generate ``batch`` twice, then its last prompt alone.

    After a difference, every operation is run twice, to find the first that differs.

    Args:
        engine: returns log-probs.
    """
    groups = engine.generate(batch)
    if where := first_difference(groups, engine.generate(batch)):
        name = engine_operations(engine, batch).first
        return EngineCheck(groups=groups, difference=by_operation(f"{where} differ when generated again", name))
    where = first_difference(groups, engine.generate(parts_of(batch, 1)[0]))
    return EngineCheck(groups=groups, difference=where and f"{where} differ when generated alone")


def engine_operations(engine: RolloutEngine, batch: GenerationBatch) -> Twice:
    """Generate ``batch`` with every operation run twice; the builtin engine replays no graph meanwhile."""
    with Twice() as found:
        engine.generate(batch)
    return found
