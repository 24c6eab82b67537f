"""Every type of model that transformers knows, tiny, from its configuration class."""

import re
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

_LAYERS = re.compile(
    r"(num_|n_)?layers?|(num_|n_|.*_)(hidden_|decoder_|encoder_)?layers?|depth|.*_depth|num_blocks"
)
_TINY = (
    # a field's name, its largest value; the first row that fits counts
    (r".*(token|pad|blank)_(id|idx)|.*_token_index", 3),
    (
        r".*(feature_layer|vision_layer|layer_index|_factor|_ratio|_cycles|chunk\w*|_stride|_kernel\w*"
        r"|_offset|per_layer_input|_heads?_ratio)",
        None,
    ),
    (
        r"first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts|moe_num_shared_experts"
        r"|attn_layer_offset|expert_layer_offset|(num_nextn_predict|num_mtp|num_kv_shared)_layers",
        1,
    ),
    (r"\w*(layer_period|_step|interval|_every_n_layers|_pattern|block_multiple_of)", 2),
    (r"(type|segment)_vocab_size", 2),
    (r".*vocab(ulary)?_size(_.*)?|.*_vocab", 96),
    (_LAYERS.pattern, 2),
    (r"(n|num_expert|topk)_group|topk_group", 1),
    (
        r".*(key_value|kv|query)_?(n_)?(heads|groups)|n_head_kv|multi_query_group_num"
        r"|\w*num_key_heads",
        2,
    ),
    (r".*(num|n)_\w*heads?|n_heads?|.*_heads", 4),
    (
        r".*head_(dim|size)|d_kv|d_head|kv_channels|attention_key_size|.*headdim|.*d_head|dim_head",
        8,
    ),
    (r".*(experts_per_tok|num_selected_experts|topk|top_k|moe_k|experts_per_token).*", 2),
    (r".*(num|n)_\w*experts.*", 4),
    (r".*lora_rank|.*_rank", 16),
    (r".*d_state|.*state_size", 8),
    (r"(.*_)?hidden_size(_.*)?", 32),
    (
        r".*(intermediate|ffn|inner|feed_?forward|filter|mlp|hidden)_(size|dim|hidden_size)(_\w+)?"
        r"|d_ff|dff|dim_ff|n_inner|moe_intermediate_size|expert_dim|\w*ffn_\w*dim",
        48,
    ),
    (r".*(position_embeddings|_positions|n_ctx|max_seq_len|_length|num_patches)", 64),
    (
        r".*(embed\w*|proj|model|width|projection|output|latents?|channels?|lru)_?(size|dim|width)s?"
        r"|d_model|n_embd|dim|.*width|.*_dim|d_embed|d_latents|.*_hidden|hidden_size\w*|.*embd_pdrop",
        32,
    ),
)


UNBUILT = {
    "evolla": "is in the list, and not in the mapping that is made of it",
    "ernie4_5_vl_moe": "its configuration does not survive `to_dict`",
    "gemma4_assistant": "its configuration does not survive `to_dict`",
    "gemma4_unified_assistant": "its configuration does not survive `to_dict`",
    "musicgen": "needs the configuration of its decoder, which is in no mapping",
    "musicgen_melody": "needs the configuration of its decoder, which is in no mapping",
    "vibevoice_asr": "its tokenizers of sound have no small form",
}
"""Types that are not built here, and why."""


def names(task: str) -> list[str]:
    """The types of a mapping that are built, and their variants, sorted."""
    types = mapping(task).keys() - UNBUILT
    return sorted({*types, *(name for at, name in VARIANTS if at == task)})


def mapping(name: str) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, MAPPINGS[name]))


def _tiny(key: str, value: int) -> int:
    size = next((s for p, s in _TINY if re.fullmatch(p, key)), None)
    return value if size is None else min(value, size)


def shrink(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration, each size tiny, and as many layers as there are kinds of them."""
    fields = {k: v for k, v in fields.items() if isinstance(k, str) and not k.endswith("2id")}
    depths = {v for k, v in fields.items() if _LAYERS.fullmatch(k) and type(v) is int}
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) in depths}
    layers = max([2, *(len(set(map(str, v))) for v in lists.values() if isinstance(v[0], str))])
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if key == "per_layer_config":
            continue
        if key == "head_dim" and value is None:
            found[key] = 8
        elif isinstance(value, dict):
            found[key] = shrink(value)
        elif key in lists:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else list(value)
            found[key] = (kinds + kinds[-1:] * layers)[:layers]
        elif type(value) is int:
            size = _tiny(key, value)
            grown = _LAYERS.fullmatch(key) and size == 2 and lists
            found[key] = layers if grown else size
        else:
            found[key] = value
    return found


_GEMMA = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_DOTS3 = {
    "num_key_value_heads": 4,
    "ngram_vocab_size_base": 50,
    "per_layer_config": {},
    "head_dim": 16,
}
_QWEN4 = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}
_ROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 99.0}},
    "codegen": {"rotary_dim": 8},
    "gemma3n_text": _GEMMA | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": None},
    "gemma4_text": _GEMMA,
    "gemma4": {"text_config": _GEMMA},
    "gemma3n": {
        "text_config": _GEMMA | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": None}
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "reformer": {"axial_pos_embds_dim": [8, 24]},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3, "audio_config": {"adapter_input_size": 32}},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "cohere_compass_text": _ROPE,
    "cohere_compass": {"text_config": _ROPE},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "florence2": {
        "vision_config": {"depths": [1] * 4, "embed_dim": [32] * 4, "num_heads": [4] * 4}
        | {"num_groups": [4] * 4}
    },
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 32}},
    "cosmos3_edge": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    },
    "aria": {"projector_patch_to_query_dict": {"1225": 128}},
    "chameleon": {
        "vocabulary_map": {"<image>": 4},
        "vq_config": {"base_channels": 32, "num_embeddings": 32},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 4, "<|extra_200|>": 5},
        "vq_config": {"base_channels": 32, "codebook_size": 32},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_num_experts": 4}},
}
"""Fields of a type's configuration that have to be something else."""


_FEWER = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
VARIANTS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("causal", "glm4_moe, all layers routed"): ("glm4_moe", {"first_k_dense_replace": 0}),
    ("causal", "gemma4_text, experts"): ("gemma4_text", {"enable_moe_block": True, **_FEWER}),
    ("causal", "gemma4_text, values from keys"): ("gemma4_text", {"attention_k_eq_v": True}),
    ("causal", "gpt_bigcode, all heads"): ("gpt_bigcode", {"multi_query": False}),
    ("causal", "falcon, all heads"): ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("causal", "falcon, new decoder"): (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    ),
    ("causal", "deepseek_v3, full queries"): ("deepseek_v3", {"q_lora_rank": None}),
    ("causal", "granitemoehybrid, dense"): ("granitemoehybrid", {"num_local_experts": 0}),
    ("causal", "qwen2_moe, a dense layer"): ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("causal", "bert, cross-attention"): (
        "bert",
        {"is_decoder": True, "add_cross_attention": True},
    ),
    ("causal", "roberta, cross-attention"): (
        "roberta",
        {"is_decoder": True, "add_cross_attention": True},
    ),
    ("causal", "gpt2, cross-attention"): ("gpt2", {"add_cross_attention": True}),
    ("seq2seq", "t5, gated"): ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("image-text", "mllama, cross-attention"): (
        "mllama",
        {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    ),
}
"""Types with other fields, which hold what the usual ones do not."""


def merge(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    both = dict(fields)
    for key, value in others.items():
        inner = both.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            both[key] = merge(inner, value)
        else:
            both[key] = value
    return both


_AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "image-text": "AutoModelForImageTextToText",
}


def configuration(kind: str, more: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    others = merge(EXCEPTIONS.get(kind, {}), more)
    fields = merge(made(**others.pop("first", {})).to_dict(), others.pop("before", {}))
    left_out = ("transformers_version", "architectures", "_name_or_path", "model_type")
    fields = {k: v for k, v in fields.items() if k not in left_out}
    return made(**merge(shrink(fields), others))


def _config(task: str, name: str) -> Any:
    kind, more = VARIANTS.get((task, name), (name, {}))
    made = configuration(kind, more)
    if kind == "reformer":
        made.is_decoder = task == "causal"
    return made


def _without_timm(made: Callable[..., Any]) -> Callable[..., Any]:
    """`AutoModel.from_config`, but for vision towers that another library makes."""
    import torch

    def build(config: Any, **options: Any) -> Any:
        if "timm" in type(config).__name__.lower() or config.model_type == "gemma3n_vision":
            return torch.nn.Identity()
        return made(config, **options)

    return build


def build(task: str, kind: str) -> Any:
    """A tiny model of a type or variant: normal weights, and biases of zero."""
    from transformers import AutoModel

    towers = patch.object(AutoModel, "from_config", _without_timm(AutoModel.from_config))
    with towers, warnings.catch_warnings(action="ignore"):  # of modules that have no weights
        return _built(task, kind)


def _built(task: str, kind: str) -> Any:
    import torch
    import transformers

    auto = getattr(transformers, _AUTO[task])
    config = _config(task, kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 12_000_000:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = auto.from_config(_config(task, kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model
