"""One attention for trainer and engine: what is computed together, and how it is padded, changes no bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.attention import NAME, Rule, hidden_states, use
from rlinf_lite.models.forest import Forest
from rlinf_lite.models.scored import ScoredModel, ValueModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.types import Segments

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, **EXPERTS},
    "mistral": {**SIZES, "sliding_window": 9},
    "gemma2": {**SIZES, "sliding_window": 9, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.5},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
random = torch.Generator().manual_seed(0)
LENGTHS = ((5, (1, 30)), (150, (140, 3, 2)), (1, (1,)), (40, (70, 70)))
"""A prompt and its responses: below and above a block and a piece."""
TREES = [
    (torch.randint(3, 64, (prompt,), generator=random), [torch.randint(3, 64, (n,), generator=random) for n in rest])
    for prompt, rest in LENGTHS
]
ROWS = [(prompt, [response]) for prompt, responses in TREES for response in responses]


@dataclass
class Unit:
    tokens: FlatTokens
    source: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, trees, padding=0) -> Unit:
        """Prompts, each followed by its responses; ``padding`` appends tokens to the last one."""
        ids, positions, segments, source, targets, num = [], [], [], [], [], 0
        for prompt, responses in trees:
            parent, stop = len(segments), num + len(prompt)
            segments.append((num, stop, -1))
            ids.append(prompt)
            positions.append(torch.arange(len(prompt)))
            for place, response in enumerate(responses):
                extra = padding if place == len(responses) - 1 else 0
                end = stop + len(response) + extra
                segments.append((stop, end, parent))
                ids.append(torch.nn.functional.pad(response, (0, extra)))
                positions.append(len(prompt) + torch.arange(len(response) + extra))
                source += [num + len(prompt) - 1, *range(stop, stop + len(response) - 1)]
                targets.append(response)
                stop = end
            num = stop
        start, stop, parent = torch.tensor(segments).unbind(1)
        made = Segments(start_S=start, stop_S=stop, parent_S=parent)
        tokens = FlatTokens.of(torch.cat(ids), torch.cat(positions), made)
        return cls(tokens, torch.tensor(source), torch.cat(targets))

    def logprobs(self, root: ScoredModel) -> torch.Tensor:
        tokens = self.tokens
        given = tokens.ids_N, tokens.positions_N, tokens.layout, self.source, self.targets
        return root(*given, 0.7, False)[0]

    def values(self, root: ValueModel) -> torch.Tensor:
        return root(self.tokens.ids_N, self.tokens.positions_N, self.tokens.layout, self.source)


def causal_lm(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_log_probs_alone_padded_and_in_a_forest(family, dtype):
    root = ScoredModel(causal_lm(family, dtype))
    with torch.no_grad():
        forest = Unit.of(TREES).logprobs(root)
        alone = torch.cat([Unit.of([row]).logprobs(root) for row in ROWS])
        together = Unit.of(ROWS).logprobs(root)
        longest = max(len(prompt) + len(response) for prompt, (response,) in ROWS)
        padded = [Unit.of([row], longest - len(row[0]) - len(row[1][0])).logprobs(root) for row in ROWS]
    assert torch.equal(forest, alone) and torch.equal(forest, together) and torch.equal(forest, torch.cat(padded))
    assert len(forest) == sum(len(response) for _, (response,) in ROWS) and forest.std() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_forest_are_those_of_separate_rows(family, checkpointing):
    model = causal_lm(family)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    root = ScoredModel(model)
    units = [Unit.of(TREES), Unit.of(TREES), Unit.of(ROWS)]
    weights = torch.linspace(-1, 1, len(units[0].targets))
    one, again, rows = (
        torch.autograd.grad((unit.logprobs(root) * weights).sum(), list(model.parameters())) for unit in units
    )
    assert all(torch.equal(mine, same) for mine, same in zip(one, again, strict=True))
    mine, other = (torch.cat([grad.flatten() for grad in grads]).double() for grads in (one, rows))
    assert (mine - other).norm() <= 1e-6 * other.norm()


def test_gradients_are_those_of_plain_attention():
    """In float64 against transformers' own eager attention, with a window and a soft-cap that both matter."""
    own, ours = causal_lm("gemma2", torch.float64), causal_lm("gemma2", torch.float64)
    own.set_attn_implementation("eager")
    found = Unit.of(TREES).logprobs(ScoredModel(ours))
    expected = []
    for prompt, (response,) in ROWS:
        logits = own(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected.append((logits / 0.7).log_softmax(-1).gather(1, response[:, None])[:, 0])
    weights = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)  # eager's softmax is in float32
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), list(ours.parameters())),
        torch.autograd.grad((torch.cat(expected) * weights).sum(), list(own.parameters())),
        strict=True,
    )
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in pairs)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_values_do_not_depend_on_other_rows(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], num_labels=1)
    root = ValueModel(AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval())
    with torch.no_grad():
        assert torch.equal(Unit.of(TREES).values(root), torch.cat([Unit.of([row]).values(root) for row in ROWS]))


def run(model) -> None:
    use(model)
    tokens = FlatTokens.none()
    hidden_states(model, tokens.ids_N, tokens.positions_N, tokens.layout)


MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("bloom", {}, "brings its own attention"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "brings its own attention"),
        ("falcon_h1", MAMBA, "brings its own attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
        ("gpt_oss", {"num_local_experts": 4}, "attention with s_aux"),
        ("nemotron", {}, "does not hand keyword arguments"),
    ],
)
def test_another_kind_of_attention_is_refused_by_name(family, changes, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes})).eval()
    with pytest.raises(ConfigError, match=rf"^model_type={family}: a model of this type .*{reason}.*choose another"):
        run(model)


def test_attention_dropout_is_refused_and_other_dropout_is_not():
    run(causal_lm("gpt2", resid_pdrop=0.1, embd_pdrop=0.1).train())
    with pytest.raises(ConfigError, match=r"attention dropout \(0\.1\)"):
        run(causal_lm("gpt2", attn_pdrop=0.1).train())


def test_a_layer_without_a_call_is_refused():
    model = causal_lm("llama")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ConfigError, match="calls attention 1 times in 2 layers"):
        run(model)


def test_position_embeddings_that_change_with_the_longest_row_are_refused_beyond_their_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = causal_lm("llama", rope_parameters=rope, max_position_embeddings=64)
    use(model)
    short, long = Unit.of([(TREES[0][0], [TREES[0][1][1]])]).tokens, Unit.of(TREES).tokens
    hidden_states(model, short.ids_N, short.positions_N, short.layout)
    with pytest.raises(ConfigError, match=r"rope_type=dynamic: a sequence of 290 tokens, and beyond 64"):
        hidden_states(model, long.ids_N, long.positions_N, long.layout)


def test_transformers_saves_no_trace_of_it(tmp_path):
    model = causal_lm("llama")
    use(model)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_kept_once(dtype):
    """For the backward pass: q, k, v and the output, in bf16 also the output before it was rounded."""
    num, heads, kv_heads, dim = 300, 4, 2, 8
    start, stop, parent = torch.tensor([[0], [num], [-1]])
    forest = Forest(Segments(start_S=start, stop_S=stop, parent_S=parent))
    q, k, v = (torch.randn(h, num, dim).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forest.attend(0, q, k, v, Rule(scaling=1.0))
    assert out.is_contiguous()  # or what follows would copy it
    of_scores = heads * num * 4
    elements = num * dim * (heads + 2 * kv_heads)
    before_rounding = heads * num * dim * 4
    assert sum(kept.values()) - of_scores == elements * dtype.itemsize + before_rounding
