"""A tiny Qwen2 as a GGUF file, whole or in the states in which people have them."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def write_gguf(
    path: Path, *, without: Collection[str] = (), shard: tuple[int, int] | None = None, only: Collection[str] = ()
) -> None:
    """Random weights in float32. `without` and `only` choose tensors; `shard` is (number from 0, count)."""
    import gguf
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if shard is not None:
        writer.add_uint16("split.no", shard[0])
        writer.add_uint16("split.count", shard[1])
        writer.add_int32("split.tensors.count", len(shapes()))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for name, shape in shapes(len(tokens)).items():
        weight = rng.normal(size=shape).astype(np.float32)
        if name not in without and (not only or name in only):
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(vocabulary: int = 260) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by its name in the file."""
    kv = WIDTH // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (vocabulary, WIDTH)
    }  # fmt: skip
    for i in range(LAYERS):
        layer = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH)}
        layer |= {"attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH)}
        layer |= {"ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        found |= {f"blk.{i}.attn_{x}.bias": (WIDTH if x == "q" else kv,) for x in "qkv"}
    return found
