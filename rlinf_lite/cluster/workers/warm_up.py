"""What a spare process does before it is needed: all the slow start-up work that does not depend on the rank."""

from __future__ import annotations

import os
import sys
import threading

from rlinf_lite.config import ModelConfig, TokenizerConfig
from rlinf_lite.quick_imports import quick_imports


def warm_up(model: ModelConfig, tokenizer: TokenizerConfig) -> None:
    """Import the workers' modules, and the model's and tokenizer's code, which is imported only when they are built.

    Runs in a thread of the lowest priority, which Linux sets per thread, so that these seconds of work do not slow the
    training down. If the process is needed sooner, the training waits for it, and the cores are free.
    """
    thread = threading.Thread(target=_warm_up, args=(model, tokenizer), name="warm-up")
    thread.start()
    thread.join()


def _warm_up(model: ModelConfig, tokenizer: TokenizerConfig) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    with quick_imports():
        from rlinf_lite.cluster.workers import critic_worker, policy_worker, reward_worker, rollout_worker  # noqa: F401
        from rlinf_lite.models import build, hf_directory

        model_dir = hf_directory.resolve(model.model_path)
        hf_directory.load_tokenizer(hf_directory.resolve(tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model"))
        build.build_on_meta(hf_directory.load_config(model_dir, model.model_type), model.precision)
