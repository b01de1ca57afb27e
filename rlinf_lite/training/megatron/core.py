"""The names of megatron-core that the backend uses. Nothing else imports it: it is an extra, and takes seconds."""

from __future__ import annotations

import warnings

from rlinf_lite.errors import ConfigError

try:
    with warnings.catch_warnings():
        # About its optimizer, which is not used here, and about norms, which are torch's.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        warnings.filterwarnings("ignore", message="Apex is not installed")
        from megatron.core import parallel_state as parallel_state
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel as GPTModel
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear as ColumnParallelLinear
        from megatron.core.tensor_parallel.layers import RowParallelLinear as RowParallelLinear
        from megatron.core.transformer.module import MegatronModule as MegatronModule
        from megatron.core.transformer.spec_utils import ModuleSpec as ModuleSpec
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules as TransformerBlockSubmodules
        from megatron.core.transformer.transformer_config import TransformerConfig as TransformerConfig
except ImportError as error:
    raise ConfigError(
        f"megatron-core cannot be imported ({error})",
        key="actor.training_backend",
        value="megatron",
        remedy="pip install -e '.[megatron]'",
    ) from None
