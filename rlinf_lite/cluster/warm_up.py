"""What a spare process does before it is needed: everything that takes long and belongs to no rank."""

from __future__ import annotations

from rlinf_lite.cluster import actor_worker, reward_worker, rollout_worker  # noqa: F401  (their imports are the point)
from rlinf_lite.config import Config
from rlinf_lite.models import build, folder


def warm_up(config: Config) -> None:
    """Bring in the model's and the tokenizer's code, which is imported only when they are built."""
    model_dir = folder.resolve(config.actor.model.model_path)
    folder.load_tokenizer(folder.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model"))
    build.build_on_meta(folder.load_config(model_dir, config.actor.model.model_type), config.actor.model.precision)
