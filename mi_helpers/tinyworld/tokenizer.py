"""The tokenizer of TinyWorld: trained on its text, lossless on any text.

Text is split the way GPT-2 splits it (a word with its leading space, punctuation, digits in
pairs), turned into bytes, and each piece is segmented by a Unigram model whose alphabet holds all
256 bytes: so nothing is ever unknown, and decode(encode(text)) == text.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mi_helpers.tinyworld import copying, facts, lexicon
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as in Gemma
COMMON = 20  # a piece seen this often in training becomes one token
FALL_BACK = 20.0  # nats
SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tiles(*words: str) -> Iterator[str]:
    """Each word as it stands inside a text, with its space."""
    for word in words:
        yield f" {word}"


def must_be_single() -> list[str]:
    """What the course relies on to be one token each."""
    places = {c for c in facts.city_country()}
    countries = lexicon.countries().values()
    starts = [*lexicon.people(), *places, *(c.name for c in countries)]
    pairs = [f"{n:02d}" for n in range(100)]
    return [*tiles(*copying.vocabulary()), *starts, *pairs, *tiles(*pairs)]


def splitter():
    """Text → pieces of bytes, each printed as one character: ' Paris' → 'ĠParis'."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(world: World, size: int = 3_840, documents: int = 60_000, seed: int = 0):
    """A `PreTrainedTokenizerFast` with `size` entries, trained on `documents` of the world.

    The vocabulary is a word model with a spelling model to fall back on. Words: everything of
    `must_be_single` and every piece seen `COMMON` times, with its log frequency as score.
    Spelling: pieces of a Unigram model trained on the same words, down to single bytes, each
    `FALL_BACK` nats worse, so that a word with an entry of its own is never spelled.
    """
    split = splitter()
    counts = Counter(must_be_single())
    stream = world.documents(seed)
    for _ in range(documents):
        document = next(stream)
        if document.family != "made_up":  # words that do not exist are to be spelled
            counts.update(piece for piece, _ in split.pre_tokenize_str(document.text))
    wanted = {split.pre_tokenize_str(word)[0][0] for word in must_be_single()}
    wanted |= {piece for piece, n in counts.items() if n >= COMMON}
    total = sum(counts.values())
    need = len(SPECIAL) + len(wanted.union(pre_tokenizers.ByteLevel.alphabet()))
    if size < need:
        raise ValueError(f"size is {size}; the words and the 256 bytes alone need {need} entries.")
    entries = {special: 0.0 for special in SPECIAL}
    entries |= {piece: math.log(max(counts[piece], 1) / total) for piece in sorted(wanted)}

    speller = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=1_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_piece_length=4,
        show_progress=False,
    )
    made_up = (world.document(i, "made_up").text for i in range(2_000))
    pieces = [piece for text in made_up for piece, _ in split.pre_tokenize_str(text)]
    speller.train_from_iterator([*pieces, *wanted], trainer)
    scores = dict(json.loads(speller.to_str())["model"]["vocab"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lowest = min(scores.values())
    ranked = sorted(alphabet) + sorted(scores, key=lambda piece: -scores[piece])
    for piece in ranked:
        if len(entries) == size:
            break
        if piece not in entries and piece != "<unk>":
            entries[piece] = scores.get(piece, lowest) - FALL_BACK

    tokenizer = Tokenizer(models.Unigram(list(entries.items()), unk_id=SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", SPECIAL.index("<bos>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def load_tokenizer(folder: Path):
    """The shipped tokenizer, through transformers' AutoTokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def offsets(tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids without `<bos>`, and (n, 2) character ranges that leave the leading space out."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ranges = np.array(encoding.offsets, dtype=int).reshape(-1, 2)
    for i, (start, end) in enumerate(ranges):
        if end - start > 1 and text[start] == " ":
            ranges[i, 0] = start + 1
    return encoding.ids, ranges


def token_labels(tokenizer, document: Document, kind: str) -> tuple[list[int], list]:
    """Token ids of a document with `<bos>` first, and one label of `kind` per token (or None).

    kind  a kind of span: a token carries a span's value when they share a character other than
          its space; for a document without such spans 'family' or a latent variable ('tense',
          'voice', …), which every token carries
    """
    ids, ranges = offsets(tokenizer, document.text)
    spans = document.find(kind)
    if not spans and (kind == "family" or kind in document.latents):
        value = document.family if kind == "family" else document.latents[kind]
        labels = [value] * len(ids)
    else:
        labels = [None] * len(ids)
    for span in spans:
        first = int(np.searchsorted(ranges[:, 1], span.start, side="right"))
        for i in range(first, len(ids)):
            if ranges[i, 0] >= span.end:
                break
            labels[i] = span.value
    return [tokenizer.bos_token_id, *ids], [None, *labels]


def token_posterior(tokenizer, world: World, document: Document) -> np.ndarray:
    """p(topic | tokens up to and with this one), (n_tokens with `<bos>`, n_topics)."""
    _, ranges = offsets(tokenizer, document.text)
    ends, rows = world.posterior(document)
    known = np.searchsorted(ends, ranges[:, 1], side="right") - 1
    return rows[np.concatenate([[0], known])]
