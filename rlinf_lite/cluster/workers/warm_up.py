"""What a spare process does before it is needed: all the slow start-up work that does not depend on the rank."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress

from rlinf_lite.config import ModelConfig, TokenizerConfig
from rlinf_lite.quick_imports import quick_imports

MODULES_OF_MEGATRON = ("megatron.core.models.gpt.gpt_layer_specs", "megatron.core.models.gpt.gpt_model")
"""What a Megatron actor imports, for seconds, besides what every worker does."""


def warm_up(model: ModelConfig, tokenizer: TokenizerConfig, modules: Sequence[str] = ()) -> None:
    """Import the workers' modules, and the model's and tokenizer's code, which is imported only when they are built.

    Args:
        modules: to be imported, too.

    Runs in a thread of the lowest priority, which Linux sets per thread, so that these seconds of work do not slow the
    training down. If the process is needed sooner, the training waits for it, and the cores are free.
    """
    thread = threading.Thread(target=_warm_up, args=(model, tokenizer, modules), name="warm-up")
    thread.start()
    thread.join()


def _warm_up(model: ModelConfig, tokenizer: TokenizerConfig, modules: Sequence[str]) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    with quick_imports():
        from rlinf_lite.cluster.workers import critic_worker, policy_worker, reward_worker, rollout_worker  # noqa: F401
        from rlinf_lite.models import build, hf_directory

        model_dir = hf_directory.resolve(model.model_path)
        hf_directory.load_tokenizer(hf_directory.resolve(tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model"))
        build.build_on_meta(hf_directory.load_config(model_dir, model.model_type), model.precision)
        with warnings.catch_warnings(action="ignore"), suppress(ImportError):  # named when the model is built
            for module in modules:
                importlib.import_module(module)
