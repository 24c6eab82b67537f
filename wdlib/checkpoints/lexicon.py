"""The names of tensors, as data: how to add a row, and how to test it, is in docs/architectures.md.

A name is read as stack, container, layer, block, leaf: of `model.layers.7.self_attn.q_proj.weight`
the stack is "model", the container "layers", the layer 7, the block "self_attn", the leaf "q_proj".
A stack may have any name. The words of a row are apart by spaces. `weight` at the end of a name,
and what `IGNORED` names, is left out before a name is looked up.
"""

CONTAINERS = (
    "layers layer h block blocks blk encoders decoder_layers resblocks encoder_layers self_attends "
    "albert_layer_groups attentions ffns"
)
"""The words before a layer's number."""

SAME_STACK = r"(?<=transformer\.)(?:attentions|ffns)$"
"""Words before a layer's number that make one stack: XLM keeps attention and MLP apart."""

IGNORED = r"(?<![^.])layer\.\d+\.|(?<![^.])albert_layers\.\d+\.|(?<=_proj)\.linear"
"""Parts of a name that say nothing: T5 numbers the parts of a layer."""

# Names that mean the same in every model ---------------------------------------------------------

ATTENTION = (
    "self_attn attention attn self_attention attention.self attention.attention attention.attn "
    "attn.attention self_attn.self self_attn.longformer_self_attn SelfAttention LocalSelfAttention "
    "TransientGlobalSelfAttention self_attention.attention self_att.self_attention "
    "multi_head_attention temporal_block mixer linear_attn self_attn.qkv_proj norm_attn_norm.attn "
    "attention.self_attention self_attn.output_projection mlstm_layer rel_attn"
)
CROSS_ATTENTION = (
    "encoder_attn cross_attn cross_attention crossattention crossattention.self "
    "crossattention.attention EncDecAttention encoder_decoder_attention.attention"
)
MLP = (
    "mlp feed_forward ffn ff mlp_block block_sparse_moe moe feedforward DenseReluDense "
    "mlp.DenseReluDense ffn.ffn feed_forward.mlp mixer"
)
EXPERTS = "experts"
SHARED_EXPERTS = "shared_experts shared_expert shared_mlp share_expert"

ATTENTION_LEAVES = {
    "q": "q_proj query query_proj q_lin q wq wq_du Wq to_q project_q q_head",
    "k": "k_proj key key_proj k_lin k wk wk_dv Wk to_k project_k k_head",
    "v": "v_proj value value_proj v_lin v wv wv_dv Wv to_v project_v v_head",
    "o": (
        "o_proj out_proj dense output.dense out_lin o wo wo_ud Wo to_out attention_out output "
        "c_proj proj projection projection_layer post_proj final_proj"
    ),
}
MLP_LEAVES = {
    "gate": "gate_proj w1 wi_0 linear_gate w_in.w_0 fc12 proj_up_gate",
    "up": (
        "up_proj w3 wi wi_1 fc1 c_fc dense_h_to_4h lin1 fc_in linear_fc1 linear_1 layer_1 "
        "linear_up dense1 w_in.w_1 fc11 proj_up dense.dense"
    ),
    "down": (
        "down_proj w2 wo fc2 c_proj dense_4h_to_h lin2 fc_out linear_fc2 linear_2 layer_2 "
        "linear_down dense2 Wo w_out proj_down output.dense"
    ),
}
WHOLE = {
    # block and leaf together: names of llama.cpp, and leaves that alone would say too little
    "attention": {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output attn_o attn_out"},
    "cross-attention": {
        "q": "cross_attn_q",
        "k": "cross_attn_k",
        "v": "cross_attn_v",
        "o": "cross_attn_o cross_attn_output",
    },
    "mlp": {
        "gate": "ffn_gate",
        "up": "fc1 intermediate.dense feed_forward.intermediate ffn_up",
        "down": "fc2 output.dense feed_forward.output ffn_down",
    },
    "experts": {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"},
    "shared expert": {"gate": "ffn_gate_shexp", "up": "ffn_up_shexp", "down": "ffn_down_shexp"},
}

# Names that stay what they are: projections that are none of the seven ------------------------

OWN = {
    # Multi-head latent attention: DeepSeek V2 and V3, Kimi, MiniCPM3
    "q_a": "self_attn.q_a_proj attention.q_a_proj attention.wq_a attn.wq_a attn_q_a",
    "q_b": (
        "self_attn.q_b_proj self_attn.q_gate_proj attention.q_b_proj attention.wq_b attn.wq_b "
        "attn_q_b"
    ),
    "kv_a": (
        "self_attn.kv_a_proj_with_mqa attention.kv_a_proj_with_mqa attention.wkv_a_with_mqa "
        "attn_kv_a_mqa"
    ),
    "kv_b": "self_attn.kv_b_proj attention.kv_b_proj attention.wkv_b attn_kv_b",
    # One matrix for keys and values, outputs in two steps: DeepSeek V4
    "kv": "self_attn.kv_proj attn.wkv",
    "o_a": "self_attn.o_a_proj attn.wo_a",
    "o_b": "self_attn.o_b_proj attn.wo_b",
    # Linear attention, state-space models and gated convolutions
    "in_proj": (
        "linear_attn.in_proj mamba.in_proj mixer.in_proj conv.in_proj shortconv.in_proj ssm_in"
    ),
    "out_proj": (
        "linear_attn.out_proj mamba.out_proj mixer.out_proj conv.out_proj shortconv.out_proj "
        "ssm_out"
    ),
    "in_proj_qkv": "linear_attn.in_proj_qkv",
    "in_proj_z": "linear_attn.in_proj_z",
    "in_proj_qkvz": "linear_attn.in_proj_qkvz",
    "x_proj": "mamba.x_proj mixer.x_proj ssm_x",
    "dt_proj": "mamba.dt_proj mixer.dt_proj ssm_dt",
    "linear_x": "temporal_block.linear_x",
    "linear_y": "temporal_block.linear_y",
    "linear_out": "temporal_block.linear_out",
    # Gates of the attention's output, as wide as the attention
    "attention_gate": (
        "self_attn.gate_proj self_attn.g_proj attention.g_proj linear_attn.g_proj "
        "self_attn.output_gate self_attn.linear_gate "
        "self_attn.output_projection.gate_proj mlstm_layer.ogate_preact attn.gate_attn attn_gate"
    ),
    "gate_a": "self_attn.g_a_proj ssm_g_a",
    "gate_b": "self_attn.g_b_proj ssm_g_b",
    "forget_gate": "attention.f_proj self_attn.f_proj self_attn.forget_gate.f_proj",
    "forget_gate_a": "self_attn.f_a_proj self_attn.forget_gate.f_a_proj ssm_f_a",
    "forget_gate_b": "self_attn.f_b_proj self_attn.forget_gate.f_b_proj ssm_f_b",
    # Global attention beside the sliding one, and attention to entities: Longformer, LUKE
    "q_global": "attention.self.query_global self_attn.longformer_self_attn.query_global",
    "k_global": "attention.self.key_global self_attn.longformer_self_attn.key_global",
    "v_global": "attention.self.value_global self_attn.longformer_self_attn.value_global",
    "q_w2e": "attention.self.w2e_query",
    "q_e2w": "attention.self.e2w_query",
    "q_e2e": "attention.self.e2e_query",
    # Relative positions: XLNet, Inkling
    "relative": "rel_attn.r self_attn.r_proj attn.wr_du",
    # One matrix for queries and keys: Reformer. Values of this token and the last: Zaya
    "qk": "attention.self_attention.query_key",
    "v_current": "self_attn.qkv_proj.v_proj_current",
    "v_delayed": "self_attn.qkv_proj.v_proj_delayed",
    # A convolution's part of the attention: ConvBERT
    "conv_out": "attention.self.conv_out_layer",
    # Low-rank and expert-wide maps beside the MLP: Gemma 3n, Muse Spark
    "laurel_left": "laurel.linear_left laurel_l",
    "laurel_right": "laurel.linear_right laurel_r",
    "pre_expert": "mlp.pre_expert_proj",
    "post_expert": "mlp.post_expert_proj",
    "latent_down": "ffn_latent_down",
    "latent_up": "ffn_latent_up",
    # RWKV
    "receptance": "attention.receptance",
    "mlp_receptance": "feed_forward.receptance",
    # The indexer of sparse attention: DeepSeek V3.2, GLM
    "indexer_q": "self_attn.indexer.wq_b attention.indexer.wq_b indexer.attn_q_b",
    "indexer_k": "self_attn.indexer.wk attention.indexer.wk indexer.attn_k",
    "indexer_qk": "self_attn.indexer.index_qk_proj",
    # Compressed keys and values: DeepSeek V4
    "compressor_kv": "self_attn.compressor.kv_proj attn.compressor.wkv",
    "compressor_gate": "self_attn.compressor.gate_proj attn.compressor.wgate",
    "indexer_compressor_q": "self_attn.compressor.indexer.q_b_proj attn.indexer.wq_b",
    "indexer_compressor_kv": ("self_attn.compressor.indexer.kv_proj attn.indexer.compressor.wkv"),
    "indexer_compressor_gate": (
        "self_attn.compressor.indexer.gate_proj attn.indexer.compressor.wgate"
    ),
}
"""The type's name, and the names of tensors. They are listed, and read where they are asked for."""

BESIDE = "laurel_left laurel_right pre_expert post_expert latent_down latent_up mlp_receptance"
"""Those that are beside the MLP; the others are of attention, or stand in its place."""

STANDS_FOR = {
    "q": "q q_b qk receptance",
    "k": "k k_b kv kv_b qk",
    "v": "v v_b kv kv_b v_current",
    "o": "o o_b",
}
"""What stands for each type in layers with attention, which have all four."""

NEEDS = (
    ("q_a", "q_b"),
    ("q_b", "q_a"),
    ("kv_a", "kv_b k_b"),
    ("kv_b", "kv_a"),
    ("k_b", "v_b"),
    ("v_b", "k_b"),
    ("k_b", "kv_a"),
    ("kv", "q_b"),
    ("o_a", "o_b"),
    ("o_b", "o_a"),
    ("v_current", "v_delayed"),
    ("in_proj", "out_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_qkv", "out_proj"),
    ("in_proj_qkvz", "out_proj"),
    ("in_proj_z", "in_proj_qkv"),
    ("out_proj", "in_proj in_proj_qkv in_proj_qkvz"),
    ("x_proj", "dt_proj"),
    ("dt_proj", "x_proj"),
    ("linear_x", "linear_y"),
    ("linear_y", "linear_out"),
    ("linear_out", "linear_x"),
    ("gate_a", "gate_b"),
    ("gate_b", "gate_a"),
    ("forget_gate_a", "forget_gate_b"),
    ("forget_gate_b", "forget_gate_a"),
    ("indexer_q", "indexer_k"),
    ("indexer_k", "indexer_q"),
    ("compressor_kv", "compressor_gate"),
    ("compressor_gate", "compressor_kv"),
    ("laurel_left", "laurel_right"),
    ("laurel_right", "laurel_left"),
    ("pre_expert", "post_expert"),
    ("post_expert", "pre_expert"),
    ("latent_down", "latent_up"),
    ("latent_up", "latent_down"),
)
"""A type, and those of which a layer that has it needs one."""

# What is no projection --------------------------------------------------------------------------

OTHERS = (
    r"(?:.*\.)?\w*norm\w*|\w*(?:self_attn|attn)\.\w+_l2_clip\.scale",
    r"\w*layernorm\.(?:mlp\.)?\w+|ada_rms_norm\.\w+",
    r"(?:.*[._])?bias(?:es)?",
    # routers, and gates of one column for each head or expert
    r"(?:.*[._])?router(?:\..*)?|mlp\.gate\.(?:wg|tid2eid)|ffn\.gate\.tid2eid",
    r".*shared_expert_gate",
    r"ffn_gate_inp(?:_shexp)?",
    r"(?:self_attn|attention|linear_attn)\.(?:a_proj|b_proj|in_proj_a|in_proj_b|in_proj_ba)",
    r"indexer\.proj|(?:self_attn|attention|attn)\.(?:compressor\.)?indexer\.(?:scorer\.)?weights_proj",
    r"self_attn\.indexer\.index_kpool_compress_\w+",
    r"(?:self_attn|attn)\.(?:indexer\.)?compressor\.(?:indexer\.)?(?:ape|position_bias)",
    r"mlp\.gate\.(?:down_proj|router_mlp\.\w+)",
    r"attention_input\.query|self_attn\.sink_proj|attn\.attn_sink_proj|\w*sinks?",
    r"mlstm_layer\.[if]gate_preact",
    r"self_attn\.dt_proj",
    r"temporal_block\.rg_lru\..*",
    # convolutions, and constants of state-space models and linear attention
    r"(?:.*[._])?(?:s?conv|convolution|conv1d|conv_1d|conv_kernel_layer|conv_qk_\w+)"
    r"(?:\.(?:conv|conv1d|static_w\w*|weight_proj))?",
    r".*A_log",
    r"ssm_(?:a|d|conv1d(?:_[qkv])?|ba|alpha|beta|dt)|shortconv\.conv",
    r"self_attn\.(?:(?:diagonal|key|query)_decay|slope_rate)",
    # mixtures of residual streams (hyper-connections)
    r"(?:attn|ffn)_hc\.\w+|hc_\w+|hc_pre\..*|\w+_hyper_connection\.\w+|altup\.\w+|altup_\w+",
    # positions
    r"(?:.*\.)?(?:rotary_emb\w*|inv_freq|rope_freqs|relative_attention_bias|relative_pos\w*)"
    r"(?:\.\w+)?",
    r"attn\.rel_(?:pos_[hw]|logits_proj\.proj)|self_attn\.rel_logits_proj\.proj",
    r"attn_rel_b|cross_attn_rel_b|attn_rot_embd",
    # Gemma 3n and 4: inputs of each layer
    r"per_layer_(?:input_gate|projection)|inp_gate|proj",
    r"(?:rel_attn|attention)\.(?:seg_embed|r_\w_bias|r_kernel)|self_attn\.\w+_l2_clip\.scale",
    r"attention\.self\.key_conv_attn_layer\.\w+|(?:attention|feed_forward)\.time_mix_\w+",
    # constants of a quantised copy (I-BERT), masks, adapters of languages (X-MOD)
    r".*weight_integer",
    r".*\.masked_bias",
    r"output\.adapter_modules\..*",
)
"""Patterns of block and leaf: routers, norms, convolutions, gates, positions, ..."""

ROUTERS = r"(?:(?:mlp|block_sparse_moe|feed_forward|ffn|mixer|moe)\.)?gate"
"""Patterns of what is a router in a layer with experts, and unknown in another."""

# Names that mean something in some models only -------------------------------------------------

_PERMUTED = (
    "llama deci baichuan bailingmoe granite granitemoe granitehybrid granite_swa smollm3 "
    "mistral3 arcee olmo deepseek minicpm internlm2 xverse llama-embed arctic chameleon "
    "llada nanbeige"
)

BOUND = (
    # `model_type` or `general.architecture`; block and leaf; types in their order; layout
    ("gpt2 openai-gpt", "attn.c_attn", "q k v", "transposed"),
    ("gpt2 openai-gpt", "attn.c_proj", "o", "transposed"),
    ("gpt2 openai-gpt", "mlp.c_fc", "up", "transposed"),
    ("gpt2 openai-gpt", "mlp.c_proj", "down", "transposed"),
    ("gpt2", "crossattention.q_attn", "q", "transposed"),
    ("gpt2", "crossattention.c_attn", "k v", "transposed"),
    ("gpt2", "crossattention.c_proj", "o", "transposed"),
    ("gpt_neox gpt_neox_japanese", "attention.query_key_value", "q k v", "by head"),
    ("bloom falcon", "self_attention.query_key_value", "q k v", "by group"),
    ("persimmon fuyu", "self_attn.query_key_value", "q k v", "by head"),
    ("gpt_bigcode", "attn.c_attn", "q k v", "by group"),
    ("internlm2", "attention.wqkv", "q k v", "by group"),
    ("codegen", "attn.qkv_proj", "q v k", "by 4"),
    ("mpt modernbert nomic_bert", "attn.Wqkv", "q k v", ""),
    ("phi3 phi4_multimodal", "self_attn.qkv_proj", "q k v", ""),
    ("chatglm", "self_attention.query_key_value", "q k v", ""),
    ("baichuan", "self_attn.W_pack", "q k v", ""),
    ("qwen", "attn.c_attn", "q k v", ""),
    ("qwen", "mlp.w1", "up", ""),
    ("qwen", "mlp.w2", "gate", ""),
    ("minimax", "self_attn.qkv_proj", "q k v", "by head"),
    ("qwen3_next qwen3_5_text qwen3_5_moe_text", "self_attn.q_proj", "q attention_gate", "by head"),
    (
        "phi3 phi4_multimodal glm glm4 glm4v_text glm_ocr_text",
        "mlp.gate_up_proj",
        "gate up",
        "",
    ),
    ("chatglm", "mlp.dense_h_to_4h", "gate up", ""),
    ("moshi", "mlp.fc1", "gate up", ""),
    ("molmo2 molmo2_text", "self_attn.att_proj", "q k v", ""),
    ("molmo2 molmo2_text", "self_attn.attn_out", "o", ""),
    ("molmo2 molmo2_text", "mlp.ff_proj", "up gate", ""),
    ("molmo2 molmo2_text", "mlp.ff_out", "down", ""),
    ("dbrx", "norm_attn_norm.attn.Wqkv", "q k v", ""),
    ("dbrx", "ffn.experts.mlp.w1", "gate", ""),
    ("dbrx", "ffn.experts.mlp.v1", "up", ""),
    ("dbrx", "ffn.experts.mlp.w2", "down", "transposed"),
    ("xlnet", "rel_attn.q", "q", "flat, transposed"),
    ("xlnet", "rel_attn.k", "k", "flat, transposed"),
    ("xlnet", "rel_attn.v", "v", "flat, transposed"),
    ("xlnet", "rel_attn.o", "o", "flat"),
    ("xlnet", "rel_attn.r", "relative", "flat, transposed"),
    ("rwkv", "feed_forward.key", "up", ""),
    ("rwkv", "feed_forward.value", "down", ""),
    ("inkling_text inkling2_text", "mlp.experts.w13_weight", "gate up", "by column"),
    ("inkling_text inkling2_text", "mlp.experts.w2_weight", "down", ""),
    ("inkling_text", "mlp.shared_experts.shared_w13_weight", "gate up", "by column"),
    ("inkling_text", "mlp.shared_experts.shared_w2_weight", "down", ""),
    ("jamba lfm2_moe", "feed_forward.experts.gate_up_proj", "gate up", ""),
    (
        "gemma4_text gemma4_unified_text diffusion_gemma_text",
        "experts.gate_up_proj",
        "gate up",
        "",
    ),
    ("gte", "attention.qkv_proj", "q k v", ""),
    ("gte", "mlp.up_gate_proj", "up gate", ""),
    ("jina_embeddings_v3", "mixer.Wqkv", "q k v", ""),
    ("jina_embeddings_v3", "mixer.out_proj", "o", ""),
    ("deberta", "attention.self.in_proj", "q k v", "by head"),
    ("ctrl", "ffn.0", "up", ""),
    ("ctrl", "ffn.2", "down", ""),
    ("albert", "ffn", "up", "mlp"),
    ("albert", "ffn_output", "down", "mlp"),
    ("xlm flaubert", "q_lin", "q", ""),
    ("xlm flaubert", "k_lin", "k", ""),
    ("xlm flaubert", "v_lin", "v", ""),
    ("xlm flaubert", "out_lin", "o", ""),
    ("xlm flaubert", "lin1", "up", "mlp"),
    ("xlm flaubert", "lin2", "down", "mlp"),
    ("modernbert modernbert-decoder", "mlp.Wi", "gate up", ""),
    (
        (
            "afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2_text deepseek_v2 "
            "deepseek_v3 deepseek_v32 deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe "
            "flex_olmo flint glm4_moe glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa "
            "hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text kimi_linear kolibri1 laguna "
            "mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mistral4 "
            "mistral_large4_text mixtral muse_spark_text olmoe phimoe qwen2_moe qwen3_5_moe_text "
            "qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text qwen4_exp_text solar_open "
            "step3p5 unlimited_ocr_text zaya"
        ),
        "mlp.experts.gate_up_proj",
        "gate up",
        "",
    ),
    (
        "granitemoe granitemoe_swa granitemoeshared granitemoehybrid",
        "block_sparse_moe.experts.gate_up_proj",
        "gate up",
        "",
    ),
    (
        "granitemoe granitemoeshared granitemoehybrid",
        "block_sparse_moe.input_linear",
        "gate up",
        "experts",
    ),
    (
        "granitemoe granitemoeshared granitemoehybrid",
        "block_sparse_moe.output_linear",
        "down",
        "experts",
    ),
    ("granitemoeshared granitemoehybrid", "shared_mlp.input_linear", "gate up", ""),
    ("granitemoeshared granitemoehybrid", "shared_mlp.output_linear", "down", ""),
    ("step3p5", "moe.gate_proj", "gate", "experts"),
    ("step3p5", "moe.up_proj", "up", "experts"),
    ("step3p5", "moe.down_proj", "down", "experts"),
    ("minimax_m3_vl_text", "mlp.shared_experts.gate_up_proj", "gate up", ""),
    ("aria_text", "mlp.experts.gate_up_proj mlp.experts.fc1", "gate up", "transposed"),
    ("aria_text", "mlp.experts.down_proj mlp.experts.fc2", "down", "transposed"),
    ("gpt_oss", "mlp.experts.gate_up_proj", "gate up", "transposed, by column"),
    ("gpt_oss", "mlp.experts.down_proj", "down", "transposed"),
    ("llama4 llama4_text", "feed_forward.experts.gate_up_proj", "gate up", "transposed"),
    ("llama4 llama4_text", "feed_forward.experts.down_proj", "down", "transposed"),
    # Meta's and Mistral's own files ("consolidated"), whose rotary embedding pairs the halves of a
    # head as llama.cpp does: told by the name of their stack, and not by the configuration beside
    ("mistral_large4 mistral_large4_text", "layers: attention.wq", "q", ""),
    ("mistral_large4 mistral_large4_text", "layers: attention.wk", "k", ""),
    ("*", "layers: attention.wq", "q", "rope"),
    ("*", "layers: attention.wk", "k", "rope"),
    # llama.cpp. Its converter brings all attention that is joined into one order, and the rows of q
    # and k of these models into the order of its own rotary embedding (conversion/*.py: `permute`,
    # `_reverse_hf_permute`, `undo_permute`).
    (_PERMUTED, "attn_q", "q", "rope"),
    (_PERMUTED, "attn_k", "k", "rope"),
    (_PERMUTED, "attn_qkv", "q k v", "rope"),
    ("qwen3next qwen35 qwen35moe", "attn_q", "q attention_gate", "by head"),
    ("qwen3next qwen35 qwen35moe", "attn_qkv", "in_proj_qkv", ""),
    ("qwen3next qwen35 qwen35moe", "attn_gate", "in_proj_z", ""),
    ("*", "attn_qkv", "q k v", ""),
    ("*", "attn_k_b", "k_b", "stacked, transposed"),
    ("*", "attn_v_b", "v_b", "stacked"),
    ("*", "ffn_gate_up_exps", "gate up", ""),
    ("phi3 glm4 chatglm plamo2 plamo3 modern-bert", "ffn_up", "gate up", ""),
    ("granite_swa", "ffn_up_shexp", "gate up", ""),
)

REFUSED = {
    "zamba zamba2": "its layers share one attention and one MLP",
    "longcat_flash": "each of its layers holds two attentions and two MLPs",
    "jetmoe": "its attention is a mixture of experts",
    "funnel": "its layers lie in blocks of different lengths",
    "mobilebert": "each of its layers holds several MLPs between bottlenecks",
    "squeezebert": "it has grouped convolutions in place of matrices",
}
"""Types of models whose layers have no matrix for each layer and type, and why."""

VALUES_FROM_KEYS = "diffusion_gemma_text"
"""Types of models of which some layers have no values of their own, and no field says so."""

# What stands around the projections -------------------------------------------------------------

NORMS_BEFORE = {
    "attention": (
        "input_layernorm attn_norm attention_norm ln_1 ln_attn norm_1 self_attention_layer_norm "
        "pre_attention_layernorm norm_attn_norm.norm_1 attention.layer_norm layer_norm1 norm1"
    ),
    "mlp": (
        "pre_feedforward_layernorm pre_ff_layernorm pre_mlp_layernorm ffn_norm ln_2 ln_mlp norm_2 "
        "norm_attn_norm.norm_2 layer_norm2 norm2 post_attention_layernorm"
    ),
}
"""Norms whose output a block reads, by their names in a layer: the first that is there. Norms after
a block have other names, but for `post_attention_layernorm`: see `NORMS_AFTER`."""

NORMS_AFTER = {
    "q": "self_attn.q_norm self_attn.q_layernorm attn.q_norm attention.q_norm attn_q_norm",
    "k": "self_attn.k_norm self_attn.k_layernorm attn.k_norm attention.k_norm attn_k_norm",
    "o": "post_self_attn_layernorm post_attention_norm",
    "down": "post_feedforward_layernorm post_ffw_norm post_mlp_layernorm",
}
"""Norms that read what a projection gives, by their names in a layer: the projection's length then
changes nothing. In a layer with one after `down`, `post_attention_layernorm` is one after `o`."""

ZERO_CENTRED = (
    "gemma gemma2 gemma3 gemma3_text recurrent_gemma vaultgemma t5gemma t5gemma2 paligemma "
    "nemotron qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp "
    "qwen4_exp_text minimax_m3_vl_text muse_spark_text muse_glimmer_text step3p7_text"
)
"""Types of models whose norms multiply by one more than their weights, as transformers stores them.
The converter of llama.cpp adds the one."""

EMBEDDINGS = "embed_tokens token_embd wte word_embeddings tok_embeddings embed_in"
"""Names of the matrix with a row for each token: the last words of a name outside of layers."""
