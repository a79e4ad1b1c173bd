"""A tiny random Gemma 2 with a tokenizer of words, for tests that need any model at all."""

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mi_helpers.models import LanguageModel

WORDS = "the a cat dog sat on mat in hat and saw red big old ran far to it was not".split()
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def word_tokenizer(bos=True):
    """One token per word with its space, whatever is not in WORDS being <unk>."""
    pieces = SPECIAL + [space + word for word in WORDS for space in ("", " ")]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s+"), "isolated")
    made.decoder = decoders.Fuse()
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    if not bos:
        del special["bos_token"]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def tiny_model(seed=0, family="gemma2", tokenizer=None, **changes):
    """Three layers of 12 numbers; norms are random too, so that a forgotten gain shows."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": 0.3,
    }
    if family == "gemma2":
        settings |= {"query_pre_attn_scalar": 8, "sliding_window": 4}
    if family == "gpt_neox":
        settings |= {"num_attention_heads": 3, "rotary_pct": 0.5, "use_parallel_residual": True}
        settings = {
            k: v for k, v in settings.items() if k not in ("num_key_value_heads", "head_dim")
        }
    config = AutoConfig.for_model(family, **settings | changes)
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return LanguageModel(hf, tokenizer or word_tokenizer(), f"tiny {family} {seed}")


def sentences(n, seed=0):
    """n texts of 1 to 30 words."""
    rng = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(high, (1,), generator=rng))

    return [" ".join(WORDS[number(len(WORDS))] for _ in range(1 + number(30))) for _ in range(n)]
