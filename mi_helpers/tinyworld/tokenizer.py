"""The tokenizer of TinyWorld: trained on its text, lossless on any text, no token without text.

Text is split the way GPT-2 splits it (a word with its leading space, punctuation, digits in
pairs), turned into bytes, and each piece is segmented by a Unigram model whose alphabet holds the
243 bytes that occur in UTF-8: so nothing is ever unknown, and decode(encode(text)) == text.

Every token occurs in the training text, hundreds of times, but for two: `<pad>` and `<unk>`, which
Gemma has at ids 0 and 3, stand in no text.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mi_helpers.tinyworld import copying, counting, statements
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World, batches

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as in Gemma
RATE = 1e-5  # of all tokens, 500 in 50 million: what is rarer leaves the vocabulary
FALL_BACK = 20.0  # nats
PRONOUNS = ("she", "he", "her", "his", "it")
BRACKETS = "()[]{}"
BLOCK, ROWS, LENGTH = 100, 32, 128  # training reads BLOCK batches of a seed, then takes the next
SPELLED = ("made_up", "strings")  # families whose words are no words: they are to be spelled
SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tiles(*words: str) -> Iterator[str]:
    """Each word as it stands inside a text, with its space."""
    for word in words:
        yield f" {word}"


def must_be_single() -> list[str]:
    """What the course relies on to be one token each."""
    inside = [
        *(*copying.vocabulary(), *counting.NUMERALS, *counting.DAYS, *counting.MONTHS),
        *(*itertools.chain(*statements.WORDS.values()), *PRONOUNS, *BRACKETS),
    ]
    both = [*copying.starts(), *copying.PAIRS]  # inside a text, and where a text or line begins
    return [*tiles(*inside, *both), *both]


def splitter():
    """Text → pieces of bytes, each printed as one character: ' Paris' → 'ĠParis'."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_alphabet() -> list[str]:
    """The 243 bytes that occur in UTF-8, each as the byte level prints it."""
    codes = [*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, 0xF000]
    codes += range(0x10000, 0x110000, 0x10000)  # a character for each first byte of 3 or 4
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return sorted(
        set("".join(piece for code in codes for piece, _ in level.pre_tokenize_str(chr(code))))
    )


def train_tokenizer(world: World, documents: int = 100_000, seed: int = 0, pieces: int = 1_000):
    """A `PreTrainedTokenizerFast`, trained on `documents` of the world.

    The vocabulary is a word model with a spelling model to fall back on. Words: everything of
    `must_be_single` and every piece of text that comes at `RATE`, with its log frequency as score.
    Spelling: up to `pieces` pieces of a Unigram model trained on the same words, down to single
    bytes, each `FALL_BACK` nats worse, so that a word with an entry of its own is never spelled.

    What then comes at less than `RATE` in the same documents leaves the vocabulary, and its text
    is spelled with other tokens, which only become more frequent. `must_be_single` and the bytes
    stay: that they occur is up to the world.
    """
    split = splitter()
    stream = world.documents(seed)
    sample = [(d.text, d.family) for d in itertools.islice(stream, documents)]
    counts = Counter()
    for text, family in sample:
        if family not in SPELLED:
            counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    must = {split.pre_tokenize_str(word)[0][0] for word in must_be_single()}
    total = sum(counts.values())
    wanted = must | {piece for piece, n in counts.items() if n >= RATE * total}
    entries = {special: 0.0 for special in SPECIAL}
    entries |= {word: math.log(max(counts[word], 1) / total) for word in sorted(wanted)}
    for piece, score in spelling(world, wanted, pieces).items():
        entries.setdefault(piece, score - FALL_BACK)

    found = text_counts(assemble(entries), [text for text, _ in sample])
    stay = must.union(SPECIAL, byte_alphabet())
    enough = RATE * sum(found.values())
    return assemble({t: score for t, score in entries.items() if t in stay or found[t] >= enough})


def spelling(world: World, words: set[str], pieces: int) -> dict[str, float]:
    """Pieces of up to four bytes, the single bytes among them → log probability in words."""
    split, alphabet = splitter(), byte_alphabet()
    speller = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, initial_alphabet=alphabet, max_piece_length=4, show_progress=False
    )
    made_up = (world.document(i, "made_up").text for i in range(2_000))
    parts = [piece for text in made_up for piece, _ in split.pre_tokenize_str(text)]
    speller.train_from_iterator([*parts, *sorted(words)], trainer)
    scores = dict(json.loads(speller.to_str())["model"]["vocab"])
    scores.pop("<unk>", None)
    lowest = min(scores.values())
    # Bytes that no word has come lowest, in the order of a hash and 0.0001 apart: made equal here,
    # and the rest rounded, so that every run gives the same.
    low = {piece for piece, score in scores.items() if score < lowest + 0.05}
    scores |= dict.fromkeys(low.union(alphabet) - (scores.keys() - low), lowest)
    return {piece: round(scores[piece], 4) for piece in sorted(scores)}


def text_counts(tokenizer, texts: list[str]) -> Counter:
    """Token → how often it stands in the texts."""
    ids = Counter()
    for i in range(0, len(texts), 1_000):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 1_000]):
            ids.update(encoding.ids)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return Counter(dict(zip(names, ids.values(), strict=True)))


def assemble(entries: dict[str, float]):
    """The tokenizer with these entries (token → score), their ids in the order given."""
    tokenizer = Tokenizer(models.Unigram(list(entries.items()), unk_id=SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = splitter()
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


def token_counts(world: World, tokenizer, n_tokens: int, seed: int = 0) -> np.ndarray:
    """How often each id comes in the first `n_tokens` of training with this seed: (d_vocab,).

    Whole batches are counted, so a few tokens more. All that tiny-gemma is trained on is
    `token_counts(World(), tokenizer, 12_800 * 4_096)`, which takes a few minutes.
    """
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for step in range(math.ceil(n_tokens / (ROWS * LENGTH))):
        if step % BLOCK == 0:
            stream = batches(world, tokenizer, seed * 1_000_003 + step // BLOCK, LENGTH, ROWS)
        counts += np.bincount(next(stream).ravel(), minlength=len(counts))
    return counts


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
