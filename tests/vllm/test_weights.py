"""The weights the engine computes with after a load: read back from its kernels, and compared by log-probs."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from engine_process import EMBEDDED, bits, flat, load_model, make_batch, make_engine, pieces, sums
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlinf_lite.models import hf_directory
from rlinf_lite.weights.names import named_weights

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: bash toolkits/vllm/install_cpu.sh", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


def vllm_model(engine) -> nn.Module:
    return engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def matrix(layer: nn.Module, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix that a layer multiplies with. On a CPU it is packed and the plain one is gone, but one column times 1
    and all others times 0 is that column, exactly."""
    return layer.quant_method.apply(layer, torch.eye(columns, dtype=dtype)).t().contiguous()  # type: ignore[union-attr, operator]


def held_weights(engine, config, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hugging Face names and tensors, taken apart again, of a Llama-like model in the engine."""
    model = vllm_model(engine)
    hidden, head = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    body = model.model
    held = {
        "model.embed_tokens.weight": body.embed_tokens.weight[: config.vocab_size],
        "model.norm.weight": body.norm.weight,
        # Also where it is tied: what the last layer computes with must be the new embedding.
        "lm_head.weight": matrix(model.lm_head, hidden, dtype)[: config.vocab_size],
    }
    for index, layer in enumerate(body.layers):
        name, attention, mlp = f"model.layers.{index}.", layer.self_attn, layer.mlp
        biases = attention.qkv_proj.bias
        qkv = matrix(attention.qkv_proj, hidden, dtype) - (0 if biases is None else biases[:, None])
        q, k, v = qkv.split([heads, kv, kv])
        gate, up = matrix(mlp.gate_up_proj, hidden, dtype).tensor_split(2)
        held |= {
            f"{name}self_attn.q_proj.weight": q,
            f"{name}self_attn.k_proj.weight": k,
            f"{name}self_attn.v_proj.weight": v,
            f"{name}self_attn.o_proj.weight": matrix(attention.o_proj, heads, dtype),
            f"{name}mlp.gate_proj.weight": gate,
            f"{name}mlp.up_proj.weight": up,
            f"{name}mlp.down_proj.weight": matrix(mlp.down_proj, config.intermediate_size, dtype),
            f"{name}input_layernorm.weight": layer.input_layernorm.weight,
            f"{name}post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        }
    return held


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def gap(model: PreTrainedModel, rollouts, temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probs and transformers' over all tokens."""
    largest = 0.0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        with torch.no_grad():
            logprobs = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
        start = len(rollout.prompt_ids)
        theirs = logprobs[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]
        largest = max(largest, (theirs - torch.from_numpy(rollout.logprobs)).abs().max().item())
    return largest


PROMPTS = sums("57+38=", "12+31=", "99+99=")


def test_the_engine_holds_what_was_loaded_last(engine):
    """By hash, three times: detects a first load that stays, or a tied last layer that keeps the old weights."""
    config = load_model().config
    for seed in (None, 1, 2):
        model = load_model(seed=seed)
        engine.load_weights(pieces(model))
        assert digest(held_weights(engine, config, torch.float32)) == digest(dict(model.state_dict()))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_families(model_type, tmp_path, engines):
    """Tied and untied, with biases and norms of their own, fused and transposed ones: by log-probs, after two loads."""
    if model_type == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=20, n_embd=128, n_layer=2, n_head=4, n_positions=64)
    else:
        config = AutoConfig.for_model(model_type, **SHAPE, tie_word_embeddings=model_type not in ("llama", "qwen3"))
    for name in ("first", "second"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    engine = engines.of(str(tmp_path / "first"))
    for name in ("first", "second"):
        model = load_model(str(tmp_path / name), seed=7)
        engine.load_weights(pieces(model))
        # The attention of Gemma 2 caps its scores by tanh, of which vLLM's CPU kernel has an approximation.
        assert gap(model, flat(engine.generate(make_batch(PROMPTS, group_size=4)))) < (
            2e-3 if model_type == "gemma2" else 2e-5
        )


def test_bf16_is_cast_once(tmp_path, engines):
    """Bitwise equal in bf16 too: weights cast on the way are not cast again."""
    config = AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = engines.of(str(tmp_path), precision="bf16")
    model = load_model(str(tmp_path), "bf16", seed=3)
    engine.load_weights(pieces(model))
    assert digest(held_weights(engine, model.config, torch.bfloat16)) == digest(dict(model.state_dict()))
    assert gap(model, flat(engine.generate(make_batch(PROMPTS, group_size=4)))) < 0.1


def test_rows_from_several_ranks(engine):
    model = load_model(seed=4)
    engine.load_weights(pieces(model))
    expected = bits(flat(engine.generate(make_batch(PROMPTS, group_size=4))))
    engine.load_weights(pieces(load_model(seed=5)))
    assert bits(flat(engine.generate(make_batch(PROMPTS, group_size=4)))) != expected
    ranks = []
    for rank in range(3):
        for name, _, tensor in pieces(model):
            rows = -(-tensor.shape[0] // 3)
            part = tensor[rank * rows : (rank + 1) * rows]
            if part.numel():
                ranks.append((name, rank * rows, part))
    engine.load_weights(ranks)
    assert bits(flat(engine.generate(make_batch(PROMPTS, group_size=4)))) == expected


def test_weights_that_are_missing_or_unknown(engine):
    weights = pieces(load_model())
    with pytest.raises(ValueError, match=r"1 weights, for example model\.norm\.weight"):
        engine.load_weights([piece for piece in weights if piece[0] != "model.norm.weight"])
    with pytest.raises(KeyError, match="elsewhere"):
        engine.load_weights([*weights[3:7], ("elsewhere", 0, torch.zeros(1))])
    engine.load_weights(weights)  # nothing is left of the loads that failed
    assert digest(held_weights(engine, load_model().config, torch.float32)) == digest(dict(load_model().state_dict()))


def test_logprobs_are_those_of_the_trainer(engines):
    """At the temperature, before top-k and top-p: the distribution of the trainer's log-probs."""
    model = load_model()
    engine = engines.of()
    engine.load_weights(pieces(model))
    assert gap(model, flat(engine.generate(make_batch(PROMPTS, group_size=16)))) < 1e-5
    assert gap(model, flat(engine.generate(make_batch(PROMPTS, group_size=16, top_p=0.5, top_k=4)))) < 1e-5
    engine = engines.of(temperature=0.7)
    engine.load_weights(pieces(model))
    assert gap(model, flat(engine.generate(make_batch(PROMPTS, group_size=16, temperature=0.7))), 0.7) < 1e-5


def test_nothing_is_drawn_from_weights_that_are_not_finite(engines):
    engine = engines.of()
    broken = load_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine.load_weights(pieces(broken))
    with pytest.raises(FloatingPointError, match=r"rollout\.model\.precision"):
        flat(engine.generate(make_batch(PROMPTS)))
    engines.close()  # its requests are still in it


def test_heads_that_vllm_has_no_kernels_for():
    from rlinf_lite.errors import ConfigError

    with pytest.raises(ConfigError, match=r"heads are 16 wide.*tiny-arithmetic-2heads"):
        make_engine("embedded:tiny-arithmetic")


def test_the_directory_is_read_for_its_config_alone(tmp_path: Path, engines):
    """A directory without weights is enough: they come from the actor."""
    source = hf_directory.resolve(EMBEDDED)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    engine = engines.of(str(tmp_path))
    model = load_model()
    engine.load_weights((name, 0, tensor.detach()) for name, tensor in named_weights(model))
    assert gap(model, flat(engine.generate(make_batch(PROMPTS)))) < 1e-5
