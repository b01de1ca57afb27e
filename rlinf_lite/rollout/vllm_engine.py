"""The vLLM engine: token ids in, token ids out, in this process; its weights are replaced in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlinf_lite import numerics
from rlinf_lite.config import ConfigError, RolloutConfig, SamplingConfig
from rlinf_lite.config.versions import vllm_version
from rlinf_lite.errors import NotFinite
from rlinf_lite.rollout import vllm_setup
from rlinf_lite.rollout.batches import grouped, rng_keys
from rlinf_lite.types import GenerationBatch, Group, Response
from rlinf_lite.weights.pieces import WeightPiece, buckets, join_rows

_NO_TOKEN = "logits are not finite, no token can be drawn: the weights or rollout.model.precision do not fit"


class VllmEngine:
    """A `RolloutEngine` over `vllm.LLM`.

    All requests of a batch are added at once, each with its own seed, to an engine whose prefix cache is empty, so that
    vLLM's schedule depends on the requests alone.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_dir: Path,
        shapes: Mapping[str, tuple[int, ...]],
        eos_ids: frozenset[int],
        seq_length: int,
        sampling: SamplingConfig,
        device: torch.device,
    ) -> None:
        """The weights are random until the first `load_weights`.

        Args:
            model_dir: for its ``config.json``; no weights are read from it.
            shapes: of everything that `load_weights` will bring, under Hugging Face names.
            seq_length: longest prompt plus response.
            sampling: of training; it decides how log-probs are reported.

        Raises:
            ConfigError: vLLM is missing, is not built for ``device``, or cannot run this model.
        """
        vllm_version()  # this node may lack what the driver's has: a clear error instead of an ImportError
        _check_device(settings, device)
        vllm_setup.prepare_environment(settings, device)
        import vllm
        from vllm.platforms import current_platform

        if current_platform.device_type != device.type:
            raise ConfigError(
                f"rollout.rollout_backend=vllm: the vLLM here is not for cluster.device={device.type} (it finds "
                f"{current_platform.device_type or 'no device'}); install the one for it (docs/vllm.md)"
            )
        numerics.hand_over(device.type)  # vLLM has its own kernels and its own switch for them: rollout.batch_invariant
        arguments = vllm_setup.engine_arguments(
            settings, model_dir=model_dir, seq_length=seq_length, sampling=sampling, device=device
        )
        self._llm = vllm.LLM(**arguments, **vllm_setup.cache_arguments(settings, arguments))
        self._new_params = vllm.SamplingParams
        self._tokenizer, self._shapes, self._eos = tokenizer, shapes, sorted(eos_ids)
        self._return_logprobs, self._enable_sleep = settings.return_logprobs, settings.enable_sleep
        self._asleep, self._size = False, settings.tensor_parallel_size

    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("begin_weights")
        for bucket in buckets(join_rows(weights, self._shapes)):
            if self._size > 1:  # a GPU's memory cannot be sent to another process as it is
                bucket = [(name, tensor.cpu()) for name, tensor in bucket]
            self._llm.collective_rpc("take_weights", args=(bucket,))
        for missing in self._llm.collective_rpc("end_weights"):
            if missing:
                raise ValueError(f"vLLM's model has weights that the actor's model lacks: {', '.join(missing[:3])}")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def held_weights(self) -> None:
        """None: vLLM fuses some weights and packs others for its kernels."""

    def sleep(self) -> None:
        if self._enable_sleep and not self._asleep:
            self._llm.sleep(level=2)  # not even a copy in CPU memory: weights always come from the actor
            self._asleep = True

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def generate(self, batch: GenerationBatch) -> list[Group]:
        # Prefixes that earlier batches left in the cache were computed in other batches, with other rounding.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM still holds requests of a batch that failed: this engine cannot be used any more")
        prompts = [
            {"prompt_token_ids": list(prompt.problem.prompt_ids)}
            for prompt in batch.prompts
            for _ in range(batch.group_size)
        ]
        try:
            answers = self._llm.generate(prompts, self._params(batch), use_tqdm=False)
        except RuntimeError as error:
            if "NaNs detected in logits" in str(error):
                raise NotFinite(_NO_TOKEN) from None
            raise
        outputs = [answer.outputs[0] for answer in answers]
        texts = self._tokenizer.batch_decode([list(output.token_ids) for output in outputs], skip_special_tokens=True)
        responses = [self._response(batch, row, output, texts[row]) for row, output in enumerate(outputs)]
        if all(response.error == _NO_TOKEN for response in responses):
            raise NotFinite(_NO_TOKEN)
        return grouped(batch, responses)

    def _params(self, batch: GenerationBatch) -> list:
        """Sampling parameters of each request, each with its own seed."""
        sampling = batch.sampling
        return [
            self._new_params(
                temperature=sampling.temperature if sampling.do_sample else 0.0,
                top_k=max(0, sampling.top_k) if sampling.do_sample else 0,
                top_p=sampling.top_p if sampling.do_sample else 1.0,
                min_p=sampling.min_p if sampling.do_sample else 0.0,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_new_tokens,
                seed=int(key >> np.uint64(1)),
                stop_token_ids=self._eos,
                ignore_eos=True,  # vLLM's EOS ids may differ: stop_token_ids are ours
                logprobs=0 if self._wants_logprobs(batch) else None,
                detokenize=False,
            )
            for key in rng_keys(batch)
        ]

    def _wants_logprobs(self, batch: GenerationBatch) -> bool:
        # For some sampling settings of validation vLLM cannot report what `Response.logprobs` holds; nothing reads it.
        return self._return_logprobs and batch.stream == "train"

    def _response(self, batch: GenerationBatch, row: int, output: Any, text: str) -> Response:
        ids = np.array(output.token_ids, dtype=np.int64)
        error = _ended_early(output)
        logprobs = None
        if self._wants_logprobs(batch) and error is None:
            found = [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)]
            logprobs = np.array(found, dtype=np.float32)
            error = None if np.isfinite(logprobs).all() else _NO_TOKEN
        return Response(
            sample_index=row % batch.group_size,
            token_ids=ids,
            loss_mask=np.ones(len(ids), dtype=np.bool_),
            logprobs=logprobs,
            finished=error is None and int(ids[-1]) in self._eos,
            text=text,
            weights_step=batch.weights_step,
            error=error,
        )


def _ended_early(output: Any) -> str | None:
    """Why vLLM aborted a request; None if the response ended with ``stop`` or ``length``."""
    if output.finish_reason not in ("stop", "length"):
        return f"vLLM ended the request early: finish_reason {output.finish_reason!r}"
    return None if len(output.token_ids) else "vLLM returned no token"


def _check_device(settings: RolloutConfig, device: torch.device) -> None:
    for key, wanted in (("enable_sleep", settings.enable_sleep), ("batch_invariant", settings.batch_invariant)):
        if wanted and device.type == "cpu":
            raise ConfigError(f"rollout.{key}=true: vLLM can do that on GPUs only, and this is a CPU; set it to false")
    size, num_gpus = settings.tensor_parallel_size, torch.cuda.device_count()
    if device.type == "cuda" and size > num_gpus:
        raise ConfigError(
            f"rollout.tensor_parallel_size={size}: this process sees {num_gpus} GPU(s); use a smaller size, or a node "
            "with more GPUs"
        )
