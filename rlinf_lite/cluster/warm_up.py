"""What a spare process does before it is needed: everything that takes long and belongs to no rank."""

from __future__ import annotations

import os
import sys
import threading

from rlinf_lite.config import Config


def warm_up(config: Config) -> None:
    """Bring in the workers' modules, and the model's and tokenizer's code, which is imported only when they are built.

    In a thread of the lowest priority, which on Linux is a thread's own: some seconds of work that the training must
    not feel. When the process is needed sooner, the training stands still, and the cores are free for it.
    """
    thread = threading.Thread(target=_warm_up, args=(config,), name="warm-up")
    thread.start()
    thread.join()


def _warm_up(config: Config) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    from rlinf_lite.cluster import actor_worker, reward_worker, rollout_worker  # noqa: F401
    from rlinf_lite.models import build, hf_directory

    model_dir = hf_directory.resolve(config.actor.model.model_path)
    hf_directory.load_tokenizer(
        hf_directory.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    )
    build.build_on_meta(
        hf_directory.load_config(model_dir, config.actor.model.model_type), config.actor.model.precision
    )
