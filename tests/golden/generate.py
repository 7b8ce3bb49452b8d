"""Tiny checkpoints with reference logits: the golden data of this folder.

The files beside this script were written with transformers 5.23.0 (phi3, glm4, cohere2, ministral3, mixtures of experts,
deepseek_v3, qwen3_next, qwen3_5 and gpt_oss with 5.17.0), torch 2.15.0 (CPU) and safetensors 0.8.0.
Another version of torch may draw other random numbers, so nothing is ever regenerated silently: a folder that exists
is left alone and ends the run, unless `--replace` is given.

    python generate.py [--replace] [--into FOLDER] [CASE ...]

Every case is a folder with
    config.json          the configuration as transformers 5 writes it
    config.v4.json       for some cases: the same model in the spelling of transformers 4
    model.safetensors    the weights (`sharded`: three shards and model.safetensors.index.json)
    logits.safetensors   `input_ids` (I64 [24]) and `logits` (F32 [24, vocabulary]) of one row without cache

The weights are rounded to the stored type before the logits are computed in f32 with eager attention, so an f32
forward over the stored values has to reproduce the logits. The initialisation is deliberately not the usual one:
with norms of one, biases of zero and small weights most switches of an architecture would be invisible.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

INPUT_IDS = torch.arange(1, 25)
DEFAULT_ROPE = dict(rope_type="default", rope_theta=10000.0)
TOKEN_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
COMMON = dict(
    vocab_size=40,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=0.01,
)

# name: (model type, stored type, arguments beyond COMMON)
CASES = {
    "llama2": ("llama", torch.float32, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=2, head_dim=6, max_position_embeddings=64,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE)),
    # Of the seven frequencies one is kept, one lies in the smooth band and the others are divided.
    "llama3": ("llama", torch.bfloat16, dict(
        hidden_size=20, num_hidden_layers=2, head_dim=14, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=128))),
    "llama_linear": ("llama", torch.float32, dict(
        hidden_size=24, intermediate_size=31, num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=64,
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    # The 24 tokens exceed max_position_embeddings.
    "llama_dynamic": ("llama", torch.float32, dict(
        hidden_size=24, intermediate_size=31, num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=16,
        rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0))),
    # The ramp is 0, 0, 0.45, 1, 1; rounding its ends would make it 0, 0, 0.5, 1, 1.
    "llama_yarn": ("llama", torch.float32, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_key_value_heads=1, head_dim=10,
        max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=32,
                             beta_fast=2.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7, truncate=False))),
    "mistral": ("mistral", torch.float32, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=2, head_dim=6, max_position_embeddings=64,
        sliding_window=7, tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE)),
    # The ramp is 0, 0.5, 1; without rounding its ends it would be 0, 0.27, 1.
    "qwen2": ("qwen2", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=3, max_position_embeddings=128, use_sliding_window=True, sliding_window=7,
        max_window_layers=1, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=32,
                             beta_fast=2.0, beta_slow=0.5))),
    "qwen2_untied": ("qwen2", torch.float16, dict(
        hidden_size=24, num_hidden_layers=3, max_position_embeddings=64, use_sliding_window=False,
        tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "qwen3": ("qwen3", torch.bfloat16, dict(
        hidden_size=20, num_hidden_layers=3, head_dim=10, max_position_embeddings=64, use_sliding_window=True,
        sliding_window=7, max_window_layers=1, attention_bias=False, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "gemma2": ("gemma2", torch.bfloat16, dict(
        hidden_size=20, num_hidden_layers=3, head_dim=10, max_position_embeddings=64, sliding_window=7,
        query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, tie_word_embeddings=True,
        rope_parameters=DEFAULT_ROPE)),
    "gemma3_text": ("gemma3_text", torch.bfloat16, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=4, head_dim=6, max_position_embeddings=64,
        sliding_window=7, query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
                             sliding_attention=DEFAULT_ROPE))),
    "ministral": ("ministral", torch.bfloat16, dict(
        hidden_size=20, num_hidden_layers=3, head_dim=10, max_position_embeddings=64, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters=DEFAULT_ROPE)),
    "olmo2": ("olmo2", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
    "olmo3": ("olmo3", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=30, num_hidden_layers=4, max_position_embeddings=64, sliding_window=7,
        pad_token_id=0, eos_token_id=2,
        rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=500000.0, factor=4.0),
                             sliding_attention=dict(rope_type="default", rope_theta=500000.0)))),
    "granite": ("granite", torch.float32, dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, max_position_embeddings=64,
        embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.1,
        tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE)),
    "smollm3": ("smollm3", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=4, max_position_embeddings=64,
        no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7, **TOKEN_IDS, attention_bias=True,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=2000000.0))),
    # Twelve positions were seen in training: the 24 tokens rotate by the long list.
    "phi3": ("phi3", torch.bfloat16, dict(
        hidden_size=40, intermediate_size=36, num_hidden_layers=2, max_position_embeddings=64,
        original_max_position_embeddings=12, sliding_window=7, **TOKEN_IDS, tie_word_embeddings=False,
        partial_rotary_factor=0.6,
        rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.6,
                             short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.0, 3.0]))),
    # As many positions as in training: the short list, biases of nothing, no partial rotation.
    "phi3_short": ("phi3", torch.float32, dict(
        hidden_size=40, intermediate_size=36, num_hidden_layers=2, max_position_embeddings=64,
        original_max_position_embeddings=24, sliding_window=None, **TOKEN_IDS, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="longrope", rope_theta=10000.0,
                             short_factor=[1.0, 1.1, 1.2, 1.3, 1.4], long_factor=[1.0, 2.0, 3.0, 4.0, 5.0]))),
    "glm4": ("glm4", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=2, head_dim=12, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
        attention_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "cohere2": ("cohere2", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=4, max_position_embeddings=64, sliding_window=7, logit_scale=0.25,
        layer_norm_eps=0.01, **TOKEN_IDS, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=50000.0))),
    # A dense layer between mixtures, shares that do not add up to one, and an expert of all tokens.
    "qwen2_moe": ("qwen2_moe", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=20, num_hidden_layers=3, max_position_embeddings=64, moe_intermediate_size=12,
        shared_expert_intermediate_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False,
        mlp_only_layers=[1], use_sliding_window=True, sliding_window=7, max_window_layers=3,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "qwen3_moe": ("qwen3_moe", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=20, num_hidden_layers=3, head_dim=10, max_position_embeddings=64,
        moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "mixtral": ("mixtral", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=64, sliding_window=7,
        num_local_experts=4, num_experts_per_tok=2, rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    # Queries grow three times within the 24 tokens.
    "ministral3": ("ministral3", torch.bfloat16, dict(
        hidden_size=20, num_hidden_layers=2, head_dim=10, max_position_embeddings=64, sliding_window=None,
        tie_word_embeddings=True, pad_token_id=0,
        rope_parameters=dict(rope_type="yarn", rope_theta=50.0, factor=8.0, original_max_position_embeddings=8,
                             beta_fast=1.0, beta_slow=0.1, mscale=1.0, mscale_all_dim=1.0,
                             llama_4_scaling_beta=0.1))),
    # Experts of all layers of a kind in one tensor.
    "qwen3_moe_stacked": ("qwen3_moe", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=20, num_hidden_layers=1, head_dim=10, max_position_embeddings=64,
        moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, rope_parameters=DEFAULT_ROPE)),
    "olmoe": ("olmoe", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=12, num_hidden_layers=2, max_position_embeddings=64, num_experts=5,
        num_experts_per_tok=2, **TOKEN_IDS, rope_parameters=DEFAULT_ROPE)),
    # Narrowed queries, keys and values, grouped experts with a correction, and a dense layer first.
    "deepseek_v3": ("deepseek_v3", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=2, num_key_value_heads=4,
        n_shared_experts=1, n_routed_experts=8, kv_lora_rank=8, q_lora_rank=10, qk_rope_head_dim=6, v_head_dim=10,
        qk_nope_head_dim=8, n_group=4, topk_group=2, num_experts_per_tok=2, first_k_dense_replace=1,
        max_position_embeddings=64, num_mtp_layers=0,
        rope_parameters=dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=16,
                             beta_fast=2, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7))),
    # Queries as wide as they are, values wider than keys, halves that turn, two shared experts.
    "deepseek_v3_wide": ("deepseek_v3", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=1, num_key_value_heads=4,
        n_shared_experts=2, n_routed_experts=4, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4, v_head_dim=12,
        qk_nope_head_dim=4, n_group=1, topk_group=1, num_experts_per_tok=3, norm_topk_prob=False,
        routed_scaling_factor=1.5, first_k_dense_replace=0, rope_interleave=False, max_position_embeddings=64,
        num_mtp_layers=0, rope_parameters=DEFAULT_ROPE)),
    # Three layers of a delta rule and one of attention whose output is gated.
    "qwen3_next": ("qwen3_next", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=4, head_dim=12, max_position_embeddings=64, linear_conv_kernel_dim=4,
        linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=2, linear_num_value_heads=4,
        moe_intermediate_size=12, shared_expert_intermediate_size=16, num_experts=6, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "qwen3_5_text": ("qwen3_5_text", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=3, head_dim=16, max_position_embeddings=64, linear_conv_kernel_dim=3,
        linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
                             mrope_section=[2, 1, 1]))),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", torch.bfloat16, dict(
        hidden_size=24, num_hidden_layers=2, head_dim=16, max_position_embeddings=64, linear_key_head_dim=6,
        linear_value_head_dim=10, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=12,
        shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25,
                             mrope_section=[2, 0, 0]))),
    # Scores of nothing, biases everywhere, gate and up in turn.
    "gpt_oss": ("gpt_oss", torch.bfloat16, dict(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, head_dim=18, max_position_embeddings=256,
        sliding_window=7, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="yarn", rope_theta=50.0, factor=4.0, beta_fast=2.0, beta_slow=0.5,
                             truncate=False, original_max_position_embeddings=32))),
    # Experts of 4-bit floats.
    "gpt_oss_mxfp4": ("gpt_oss", torch.bfloat16, dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8, max_position_embeddings=64,
        sliding_window=7, num_local_experts=3, num_experts_per_tok=2, rope_parameters=DEFAULT_ROPE)),
    # Tied, and the file names the shared matrix lm_head.weight instead of model.embed_tokens.weight.
    "one_lm_head": ("llama", torch.float32, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=2, head_dim=6, max_position_embeddings=64,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
    # A null window, where an absent key would mean a window of 4096.
    "sharded": ("mistral", torch.float32, dict(
        hidden_size=20, intermediate_size=36, num_hidden_layers=2, head_dim=6, max_position_embeddings=64,
        sliding_window=None, tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE)),
}
SHARD_SIZE = "15KB"

# What config.v4.json drops from config.json, and what it says instead.
NOT_IN_VERSION_4 = ["dtype", "rope_parameters", "transformers_version"]
VERSION_4 = {
    "llama3": ([], dict(
        rope_theta=500000.0,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=128))),
    "llama_linear": (["head_dim"], dict(
        rope_theta=10000.0,
        rope_scaling=dict(type="linear", factor=4.0))),
    "qwen2": (["layer_types"], dict(
        rope_theta=50.0,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=2.0,
                          beta_slow=0.5))),
    "gemma3_text": (["layer_types", "_sliding_window_pattern"], dict(
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=3)),
}


def copied(value):
    """A copy through JSON: a configuration edits the dictionaries it is built from."""
    return json.loads(json.dumps(value))


def build(case, **changes):
    """The f32 model of a case, holding weights that its stored type represents exactly."""
    model_type, stored, arguments = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **copied(COMMON | arguments | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(initial(name, parameter, noise).to(stored).float())
            if case == "gpt_oss_mxfp4" and name.endswith("_proj") and parameter.ndim == 3:
                parameter.copy_(from_mxfp4(*to_mxfp4(parameter)))
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.copy_((0.1 * torch.randn(buffer.shape, generator=random)).to(stored).float())
    return model


MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def to_mxfp4(weight):
    """Codes, two in a byte, and powers of two of every 32 inputs; `weight` is experts x inputs x outputs."""
    blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
    scales = (blocks.abs().amax(-1) / 6.0).log2().ceil() + 127
    codes = (blocks / 2.0 ** (scales[..., None] - 127))[..., None].sub(MXFP4).abs().argmin(-1)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), scales.to(torch.uint8)


def from_mxfp4(codes, scales):
    pairs = torch.stack([MXFP4[(codes % 16).long()], MXFP4[(codes // 16).long()]], -1).flatten(-2)
    return (pairs * 2.0 ** (scales[..., None].float() - 127)).flatten(2).transpose(1, 2)


def initial(name, parameter, noise):
    if parameter.ndim == 1 and "norm" in name:
        base = 0.0 if parameter.abs().max() == 0 else 1.0  # zero: the norm multiplies by 1 + weight
        return base + 0.2 * noise
    if parameter.ndim == 1:
        return 0.2 * noise
    if "embed" in name:
        return noise
    return 1.3 * noise / parameter.shape[-1] ** 0.5


@torch.no_grad()
def logits_of(model):
    return model(INPUT_IDS[None], use_cache=False).logits[0].float().contiguous()


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.float().eval()  # experts of 4-bit floats come as bfloat16


def write(case, folder):
    """Writes one folder and returns its logits."""
    model = build(case)
    logits = logits_of(model)
    sizes = dict(max_shard_size=SHARD_SIZE) if case == "sharded" else {}
    model.to(CASES[case][1]).save_pretrained(folder, **sizes)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case == "one_lm_head":
        rename_embedding(folder / "model.safetensors")
    if case == "gpt_oss_mxfp4":
        pack_experts(folder)
    if case == "qwen3_moe_stacked":
        stack_experts(folder / "model.safetensors")
    if case in VERSION_4:
        write_version_4(case, folder)
    tensors = dict(input_ids=INPUT_IDS, logits=logits)
    safetensors.torch.save_file(tensors, folder / "logits.safetensors")
    return logits


def rename_embedding(path):
    tensors = safetensors.torch.load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(tensors, path, metadata=dict(format="pt"))


def pack_experts(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for name in [name for name in tensors if name.endswith("_proj")]:
        blocks, scales = to_mxfp4(tensors.pop(name).float())
        tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    safetensors.torch.save_file(tensors, path, metadata=dict(format="pt"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stack_experts(path):
    tensors = safetensors.torch.load_file(path)
    start = "model.layers.0.mlp.experts"
    if f"{start}.gate_up_proj" not in tensors:
        taken = lambda part: [tensors.pop(f"{start}.{expert}.{part}.weight") for expert in range(4)]
        both = [torch.cat(pair) for pair in zip(taken("gate_proj"), taken("up_proj"))]
        tensors |= {f"{start}.gate_up_proj": torch.stack(both), f"{start}.down_proj": torch.stack(taken("down_proj"))}
    safetensors.torch.save_file(tensors, path, metadata=dict(format="pt"))


def write_version_4(case, folder):
    config = json.loads((folder / "config.json").read_text())
    dropped, added = VERSION_4[case]
    added = added | dict(torch_dtype=config["dtype"])
    kept = {key: value for key, value in config.items() if key not in NOT_IN_VERSION_4 + dropped}
    text = json.dumps(dict(sorted((kept | added).items())), indent=2)
    (folder / "config.v4.json").write_text(text + "\n")


def check(case, folder, logits):
    """Reads the folder back and returns a few words about it."""
    _, stored, arguments = CASES[case]
    assert logits.shape == (24, COMMON["vocab_size"]) and logits.isfinite().all()
    apart = torch.cdist(logits, logits) + 1e9 * torch.eye(24)
    assert apart.min() > 0.1, "two tokens have the same logits"
    words = [f"max {logits.abs().max():.2f}", f"nearest rows {apart.min():.2f}"]

    saved = safetensors.torch.load_file(folder / "logits.safetensors")
    assert set(saved) == {"input_ids", "logits"} and torch.equal(saved["logits"], logits)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")
    weights = {}
    for path in folder.glob("model*.safetensors"):
        weights |= safetensors.torch.load_file(path)
    assert all(tensor.dtype in (stored, torch.uint8) or "e_score" in name for name, tensor in weights.items())

    if case == "one_lm_head":
        assert "lm_head.weight" in weights and "model.embed_tokens.weight" not in weights
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
        model = build(case)
        model.load_state_dict(weights)
        assert torch.equal(logits_of(model), logits)
    else:
        assert torch.equal(logits_of(load(folder)), logits), "the folder read back gives other logits"
    if case == "sharded":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
        assert len(shards) == 3 and "logits.safetensors" not in shards
    if case in VERSION_4:
        assert torch.equal(logits_of(version_4(folder)), logits), "config.v4.json means another model"
        words.append("config.v4.json bit-identical")

    if arguments.get("sliding_window"):
        words.append(f"window 8: {difference(case, logits, sliding_window=8)}")
    rope = arguments["rope_parameters"]
    if "full_attention" in rope:
        plain = rope | dict(full_attention=dict(rope_type="default", rope_theta=rope["full_attention"]["rope_theta"]))
        words.append(f"full layers unscaled: {difference(case, logits, rope_parameters=plain)}")
    elif rope["rope_type"] != "default":
        kept = ["llama_4_scaling_beta", "original_max_position_embeddings", "partial_rotary_factor"]
        plain = dict(rope_type="default", rope_theta=rope["rope_theta"], **{key: rope[key] for key in kept if key in rope})
        words.append(f"plain rope: {difference(case, logits, rope_parameters=plain)}")
    if rope.get("rope_type") == "yarn":
        flipped = rope | dict(truncate=not rope.get("truncate", True))
        words.append(f"truncate flipped: {difference(case, logits, rope_parameters=flipped)}")
    return ", ".join(words)


def version_4(folder):
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / "config.v4.json", Path(copy) / "config.json")
        shutil.copy(folder / "model.safetensors", copy)
        return load(copy)


def difference(case, logits, **changes):
    """How far a changed argument moves the logits; an invisible change is an error."""
    moved = (logits_of(build(case, **changes)) - logits).abs().max()
    assert moved > 20 * 1e-4 * logits.abs().max(), f"{case}: {changes} moves the logits by {moved} only"
    return f"{moved:.2f}"


def main():
    parser = argparse.ArgumentParser(description="Writes tiny checkpoints with reference logits.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these (default: all)")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    parser.add_argument("--replace", action="store_true", help="overwrite folders that exist")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    cases = options.cases or list(CASES)
    present = [case for case in cases if (options.into / case).exists()]
    if present and not options.replace:
        sys.exit(f"refusing to replace {', '.join(present)} (use --replace)")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    total = 0
    for case in cases:
        folder = options.into / case
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = check(case, folder, write(case, folder))
        size = sum(path.stat().st_size for path in folder.iterdir())
        total += size
        stored = str(CASES[case][1]).removeprefix("torch.")
        print(f"{case:14} {size:6} bytes  {stored:9} {words}")
    print(f"{len(cases)} folders, {total} bytes")


if __name__ == "__main__":
    main()
