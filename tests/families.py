"""A tiny random model of every family, and a tokenizer for them; nothing touches the network."""

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mi_helpers.models import LanguageModel

TEXT = "The Eiffel Tower is in the city of Paris"  # 10 tokens with BOS, more than any window
WORDS = [*TEXT.split(), "Rome", "cat", "sat"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
D_VOCAB = 48  # more rows than words, as in real models
COMMON = {
    "vocab_size": D_VOCAB,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # 4 heads of 6 = 24, which is not d_model
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,
}
GEMMA = COMMON | {"query_pre_attn_scalar": 6, "sliding_window": 3}
DERIVED = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 32}
SQUARE = {k: v for k, v in DERIVED.items() if k != "num_key_value_heads"}
NEOX = SQUARE | {"rotary_pct": 0.5}
CONFIGS = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 3},
    "qwen2": DERIVED,
    "qwen3": COMMON,
    "gpt2": SQUARE | {"n_inner": 24},
    "gpt_neox": NEOX | {"use_parallel_residual": True},
    "gpt_neox_sequential": NEOX | {"use_parallel_residual": False},
}


def build(family, **changes):
    """A tiny random Hugging Face model; norms and biases are random too, so that errors show."""
    settings = {k: v for k, v in (CONFIGS[family] | changes).items() if k != "intermediate_size"}
    if family != "gpt2":
        settings["intermediate_size"] = 24
    config = AutoConfig.for_model(family.removesuffix("_sequential"), **settings)
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            assert p.abs().sum() > 0, name
    return hf


def build_empty(family):
    config = build(family).config
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return LanguageModel(hf, make_tokenizer())


def make_tokenizer():
    vocab = {w: i for i, w in enumerate(SPECIAL)}
    for word in WORDS:
        vocab |= {w: len(vocab) + i for i, w in enumerate((word, " " + word))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
