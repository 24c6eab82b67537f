"""Which tensor is which projection: data. Adding an architecture is adding rows to `RULES`."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One row of the naming table.

    `pattern` must match the whole tensor name and holds the group `layer` (and `expert`, when each
    expert has its own tensor; a tensor of three dimensions holds the experts along the first).
    `types` are the projections in the order in which the tensor holds them: (gate, up) in equal
    halves, (q, k, v) by the numbers of heads. `layout` says how the tensor is stored:
    "linear" (d_out, d_in); "conv1d" (d_in, d_out); "heads" (head, q|k|v, head size) along the rows;
    "rope" (llama.cpp's order of the rows of q and k, which pairs the halves of each head).
    `architectures` limits the row to these values of `model_type` (config.json) or
    `general.architecture` (GGUF); empty means any.
    """

    pattern: str
    types: tuple[str, ...]
    layout: str = "linear"
    architectures: tuple[str, ...] = ()


_DECODER = r"(?:model\.|language_model\.)*layers\.(?P<layer>\d+)\."
_GPT2 = r"(?:transformer\.)?h\.(?P<layer>\d+)\."
_NEOX = r"(?:gpt_neox\.)?layers\.(?P<layer>\d+)\."
_CONSOLIDATED = r"layers\.(?P<layer>\d+)\."
_BERT = r"(?:bert\.|roberta\.)?encoder\.layer\.(?P<layer>\d+)\."
_DISTILBERT = r"(?:distilbert\.)?transformer\.layer\.(?P<layer>\d+)\."
_GGUF = r"blk\.(?P<layer>\d+)\."
_EXPERT = r"(?P<expert>\d+)\."
_SHARED = r"mlp\.shared_(?:experts?|mlp)\."
_FUSED_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
_GATE_ABOVE_UP = ("phi3", "glm4", "chatglm", "plamo2", "plamo3")

RULES = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, SmolLM; Phi-3 (fused)
    Rule(_DECODER + r"self_attn\.q_proj\.weight", ("q",)),
    Rule(_DECODER + r"self_attn\.k_proj\.weight", ("k",)),
    Rule(_DECODER + r"self_attn\.v_proj\.weight", ("v",)),
    Rule(_DECODER + r"self_attn\.o_proj\.weight", ("o",)),
    Rule(_DECODER + r"self_attn\.qkv_proj\.weight", ("q", "k", "v")),
    Rule(_DECODER + r"mlp\.gate_proj\.weight", ("gate",)),
    Rule(_DECODER + r"mlp\.up_proj\.weight", ("up",)),
    Rule(_DECODER + r"mlp\.down_proj\.weight", ("down",)),
    Rule(_DECODER + r"mlp\.gate_up_proj\.weight", ("gate", "up")),
    # Qwen2-MoE, Qwen3-MoE, GLM-4.5-MoE, Hunyuan-MoE: a tensor per expert, or all experts in one
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"gate_proj\.weight", ("gate",)),
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"up_proj\.weight", ("up",)),
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"down_proj\.weight", ("down",)),
    Rule(_DECODER + _SHARED + r"gate_proj\.weight", ("gate",)),
    Rule(_DECODER + _SHARED + r"up_proj\.weight", ("up",)),
    Rule(_DECODER + _SHARED + r"down_proj\.weight", ("down",)),
    Rule(_DECODER + r"mlp\.experts\.gate_up_proj", ("gate", "up"), "linear", _FUSED_EXPERTS),
    Rule(_DECODER + r"mlp\.experts\.down_proj", ("down",), "linear", _FUSED_EXPERTS),
    # Mixtral
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w1\.weight", ("gate",)),
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w3\.weight", ("up",)),
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w2\.weight", ("down",)),
    # Meta's and Mistral's own files, "consolidated"
    Rule(_CONSOLIDATED + r"attention\.wq\.weight", ("q",), "rope"),
    Rule(_CONSOLIDATED + r"attention\.wk\.weight", ("k",), "rope"),
    Rule(_CONSOLIDATED + r"attention\.wv\.weight", ("v",)),
    Rule(_CONSOLIDATED + r"attention\.wo\.weight", ("o",)),
    Rule(_CONSOLIDATED + r"feed_forward\.w1\.weight", ("gate",)),
    Rule(_CONSOLIDATED + r"feed_forward\.w3\.weight", ("up",)),
    Rule(_CONSOLIDATED + r"feed_forward\.w2\.weight", ("down",)),
    # GPT-2
    Rule(_GPT2 + r"attn\.c_attn\.weight", ("q", "k", "v"), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"attn\.c_proj\.weight", ("o",), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"mlp\.c_fc\.weight", ("up",), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"mlp\.c_proj\.weight", ("down",), "conv1d", ("gpt2",)),
    # GPT-NeoX, Pythia
    Rule(_NEOX + r"attention\.query_key_value\.weight", ("q", "k", "v"), "heads"),
    Rule(_NEOX + r"attention\.dense\.weight", ("o",)),
    Rule(_NEOX + r"mlp\.dense_h_to_4h\.weight", ("up",)),
    Rule(_NEOX + r"mlp\.dense_4h_to_h\.weight", ("down",)),
    # BERT, RoBERTa
    Rule(_BERT + r"attention\.self\.query\.weight", ("q",)),
    Rule(_BERT + r"attention\.self\.key\.weight", ("k",)),
    Rule(_BERT + r"attention\.self\.value\.weight", ("v",)),
    Rule(_BERT + r"attention\.output\.dense\.weight", ("o",)),
    Rule(_BERT + r"intermediate\.dense\.weight", ("up",)),
    Rule(_BERT + r"output\.dense\.weight", ("down",)),
    # DistilBERT
    Rule(_DISTILBERT + r"attention\.q_lin\.weight", ("q",)),
    Rule(_DISTILBERT + r"attention\.k_lin\.weight", ("k",)),
    Rule(_DISTILBERT + r"attention\.v_lin\.weight", ("v",)),
    Rule(_DISTILBERT + r"attention\.out_lin\.weight", ("o",)),
    Rule(_DISTILBERT + r"ffn\.lin1\.weight", ("up",)),
    Rule(_DISTILBERT + r"ffn\.lin2\.weight", ("down",)),
    # GGUF, every architecture; "llama" there is Llama, Mistral, Mixtral and SmolLM
    Rule(_GGUF + r"attn_q\.weight", ("q",), "rope", ("llama",)),
    Rule(_GGUF + r"attn_k\.weight", ("k",), "rope", ("llama",)),
    Rule(_GGUF + r"attn_q\.weight", ("q",)),
    Rule(_GGUF + r"attn_k\.weight", ("k",)),
    Rule(_GGUF + r"attn_v\.weight", ("v",)),
    Rule(_GGUF + r"attn_qkv\.weight", ("q", "k", "v")),
    Rule(_GGUF + r"attn_output\.weight", ("o",)),
    Rule(_GGUF + r"ffn_gate\.weight", ("gate",)),
    Rule(_GGUF + r"ffn_up\.weight", ("gate", "up"), "linear", _GATE_ABOVE_UP),
    Rule(_GGUF + r"ffn_up\.weight", ("up",)),
    Rule(_GGUF + r"ffn_down\.weight", ("down",)),
    Rule(_GGUF + r"ffn_gate_(?:exps|shexp)\.weight", ("gate",)),
    Rule(_GGUF + r"ffn_up_(?:exps|shexp)\.weight", ("up",)),
    Rule(_GGUF + r"ffn_down_(?:exps|shexp)\.weight", ("down",)),
    Rule(_GGUF + r"ffn_gate_up_exps\.weight", ("gate", "up")),
    Rule(_GGUF + r"ffn_gate\." + _EXPERT + r"weight", ("gate",)),
    Rule(_GGUF + r"ffn_up\." + _EXPERT + r"weight", ("up",)),
    Rule(_GGUF + r"ffn_down\." + _EXPERT + r"weight", ("down",)),
)


OTHERS = re.compile(
    r".*norm.*"  # every kind of normalisation
    r"|(?:.*\.)?bias|.*_bias|.*\.masked_bias"  # also of experts, and masks kept as tensors
    r"|.*\b(?:router|gate|wg)(?:\..*)?\.(?:weight|wg\.weight)|.*router.*|.*ffn_gate_inp.*"
    r"|.*shared_expert_gate.*|.*\.gate\.wg\..*"
    r"|.*conv.*"
    r"|.*(?:rotary|rope|inv_freq|relative_attention_bias|rel_pos).*"
    r"|.*per_layer_.*|.*sinks?|.*\bscales?|.*layer_scale.*"
)
"""What a layer holds beside its projections: norms, biases, routers, convolutions, ..."""


_COMPILED = tuple((rule, re.compile(rule.pattern)) for rule in RULES)


@dataclass(frozen=True)
class TensorRole:
    """The projections that a tensor holds: several types where it joins them.

    stack: the beginning of the name, up to and with the layer's number. expert: None outside of
    routed experts, and for a tensor that holds all of them. layout: as in `Rule`.
    """

    stack: str
    layer: int
    types: tuple[str, ...]
    expert: int | None
    layout: str


def tensor_role(name: str, architecture: str | None = None) -> TensorRole | None:
    """What a tensor's name says of it, by the first row of `RULES` that fits; None for no row.

    Arguments: name, as checkpoints write it ("model.layers.0.self_attn.q_proj.weight");
    architecture, the `model_type` of the model.
    """
    for rule, pattern in _COMPILED:
        if rule.architectures and architecture not in rule.architectures:
            continue
        if match := pattern.fullmatch(name):
            expert = match.groupdict().get("expert")
            number = None if expert is None else int(expert)
            stack = name[: match.end("layer")]
            return TensorRole(stack, int(match["layer"]), rule.types, number, rule.layout)
    return None
