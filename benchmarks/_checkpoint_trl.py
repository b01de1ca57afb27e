"""TRL in the checkpoint benchmark: a GRPOTrainer with the same model, after one real training step."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
import warnings
from pathlib import Path
from typing import Any

from _checkpoint_plain import PeakMemory
from _checkpoint_rank import Setup

NOT_INSTALLED = "not installed: pip install -e '.[bench]'"


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("trl", "accelerate", "datasets"))


class TrlTrainer:
    """One process with the whole model, optimizer state and gradients, as in TRL without FSDP."""

    def __init__(self, setup: Setup) -> None:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PrinterCallback
        from transformers.utils.logging import disable_progress_bar
        from trl import GRPOConfig, GRPOTrainer

        from rlinf_lite.models import hf_directory

        warnings.simplefilter("ignore")
        disable_progress_bar()
        torch.manual_seed(0)
        config = setup.model_config()
        if setup.model_dir is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            tokenizer = hf_directory.load_tokenizer(hf_directory.resolve("embedded:tiny-arithmetic"))
        else:
            model = AutoModelForCausalLM.from_pretrained(setup.model_dir, dtype=torch.float32, local_files_only=True)
            tokenizer = hf_directory.load_tokenizer(setup.model_dir)
        self.output_dir = setup.directory / "trl"
        arguments = GRPOConfig(
            output_dir=str(self.output_dir),
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=_any_reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 4}),
            processing_class=tokenizer,
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.train()
        self.memory = PeakMemory()

    def save(self) -> float:
        """Seconds of the call that ``save_strategy="steps"`` makes after a step."""
        self.memory = PeakMemory()
        started = time.perf_counter()
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        return time.perf_counter() - started

    def peak_bytes(self) -> int:
        return self.memory.above_start()

    def saved_at(self) -> Path:
        return self.output_dir / f"checkpoint-{self.trainer.state.global_step}"

    def state_bytes(self) -> int:
        """Model and optimizer of this one process."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        assert model is not None and optimizer is not None
        held = [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def version(self) -> str:
        return importlib.metadata.version("trl")


def _any_reward(completions: list[str], **_: Any) -> list[float | None]:
    return [float(index) for index in range(len(completions))]
