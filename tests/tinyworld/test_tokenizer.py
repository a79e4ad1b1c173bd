"""The tokenizer of TinyWorld: lossless on any text, one token per word, labels by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mi_helpers.tinyworld.__main__ import rates
from mi_helpers.tinyworld.source import Document, Span
from mi_helpers.tinyworld.tokenizer import (
    RATE,
    load_tokenizer,
    must_be_single,
    offsets,
    token_counts,
    token_labels,
    token_posterior,
    train_tokenizer,
)
from mi_helpers.tinyworld.world import World, batches

WORLD = World()
FAMILIES = sorted(World.families)
SEEDS = st.integers(0, 2**32)
SPACES = st.text(" \n\t\r\u00a0\u2003\u2028", min_size=1)
ODD = st.sampled_from(
    ["<bos>", "<eos>", "<pad>", "<unk>", "Ġ", "é", "e\u0301", "\x00", "\x7f", "\ufeff", "\u202e"]
    + ["👩‍👩‍👧", "𐍈", "ﬁ", "İ", "\U0010ffff", "▁", "5¾", "日本", "'s", "Oslo", "¹²³"]
)
# any Unicode text, and texts that are mostly what goes wrong: spaces, controls, special tokens
TEXTS = st.one_of(st.text(), st.lists(st.one_of(SPACES, ODD, st.text(max_size=3))).map("".join))
# byte → the letter that stands for it in a byte-level vocabulary: itself where it prints
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
PRINTED = {byte: chr(byte) for byte in PLAIN}
PRINTED |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTED)}


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(WORLD)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# -- text → tokens → text ------------------------------------------------------------------------


@settings(deadline=None, max_examples=400)
@given(TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_nothing_is_unknown(tokenizer, text):
    unknown = tokenizer.unk_token_id in ids_of(tokenizer, text)
    assert unknown == ("<unk>" in text)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(FAMILIES))
def test_documents_come_back_as_they_were(tokenizer, seed, family):
    text = WORLD.document(seed, family).text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_offsets_lose_no_character(tokenizer, text):
    """Every character is in some token's range, or is the space before one."""
    ids, ranges = offsets(tokenizer, text)
    assert ids == ids_of(tokenizer, text) and ranges.shape == (len(ids), 2)
    covered = set()
    for start, end in ranges:
        assert 0 <= start < end <= len(text)
        covered.update(range(start, end))
    assert all(text[i] == " " and i + 1 in covered for i in set(range(len(text))) - covered)
    assert (np.diff(ranges[:, 1]) >= 0).all()


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(FAMILIES))
def test_offsets_are_the_words_of_the_tokens(tokenizer, seed, family):
    text = WORLD.document(seed, family).text
    for token, (start, end) in zip(*offsets(tokenizer, text), strict=True):
        if text[start:end].isascii():
            assert tokenizer.decode([token]).removeprefix(" ") in (text[start:end], "")


# -- the vocabulary ------------------------------------------------------------------------------


def test_the_words_of_the_course_are_single_tokens(tokenizer):
    wanted = must_be_single()
    assert len(wanted) > 2_500
    assert {" Paris", "Mary", " Mary", "London", " virus", "07", " she"} <= {*wanted, " she"}
    split = [
        word
        for word in [*wanted, " she", " he", " is", " are"]
        if len(ids_of(tokenizer, word)) != 1
    ]
    assert split == []


def test_a_single_token_stays_single_inside_a_text(tokenizer):
    ids = ids_of(tokenizer, "When Mary and Peter went to Paris in 1107, Mary gave a book.")
    shown = [tokenizer.decode([i]) for i in ids]
    assert shown[:7] == ["When", " Mary", " and", " Peter", " went", " to", " Paris"]
    assert shown[7:] == [" in", " 11", "07", ",", " Mary", " gave", " a", " book", "."]


def test_the_vocabulary_has_the_size_it_should(tokenizer):
    assert 3_300 <= len(tokenizer) <= 4_096
    assert len(tokenizer) == tokenizer.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_bytes_in_the_vocabulary_are_those_of_utf_8(tokenizer):
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    bytes_of_text = set(every.encode())
    assert len(bytes_of_text) == 243
    vocabulary = tokenizer.get_vocab()
    assert {PRINTED[byte] for byte in bytes_of_text} == {t for t in vocabulary if len(t) == 1}


def test_no_token_is_without_text(tokenizer):
    """In 2M of the 50M tokens of training each comes at least 4 times; 20 are expected."""
    n = 2_000_000
    assert RATE * n == pytest.approx(20)
    counts = token_counts(WORLD, tokenizer, n, seed=1)
    assert n <= counts.sum() < n + 4_096
    rare = np.flatnonzero(counts < 4)
    assert {tokenizer.convert_ids_to_tokens(int(i)) for i in rare} == {"<pad>", "<unk>"}
    assert counts[[tokenizer.pad_token_id, tokenizer.unk_token_id]].sum() == 0


def test_counts_are_those_of_the_batches_of_training(tokenizer):
    """tiny-gemma reads 100 batches of a seed, then takes the next."""
    expected = np.zeros(len(tokenizer), dtype=int)
    for seed, steps in ((2_000_006, 100), (2_000_007, 1)):
        for batch in itertools.islice(batches(WORLD, tokenizer, seed=seed), steps):
            np.add.at(expected, batch.ravel(), 1)
    counts = token_counts(WORLD, tokenizer, 100 * 4_096 + 1, seed=2)
    np.testing.assert_array_equal(counts, expected)


def test_every_token_that_is_a_text_is_the_token_of_that_text(tokenizer):
    """The others hold a part of a character, which has no text of its own."""
    byte = {letter: value for value, letter in PRINTED.items()}
    whole = 0
    for token, i in tokenizer.get_vocab().items():
        if i > 3:
            try:
                text = bytes(byte[letter] for letter in token).decode()
            except UnicodeDecodeError:
                continue
            whole += 1
            assert ids_of(tokenizer, text) == [i], token
            assert tokenizer.decode([i]) == text
    assert len(tokenizer) - whole < 140


def test_a_fresh_call_gives_the_same_vocabulary():
    first, again = (train_tokenizer(WORLD, documents=2_000) for _ in range(2))
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()


def test_special_tokens_have_the_ids_of_gemma(tokenizer):
    names = ("<pad>", "<eos>", "<bos>", "<unk>")
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3


# -- through transformers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def test_a_saved_tokenizer_loads_with_autotokenizer(tokenizer, loaded):
    text = "The Eiffel Tower is in\nParis,  of course. 😀"
    for other in loaded:
        assert other(text).input_ids == tokenizer(text).input_ids
        assert other.decode(other.encode(text), skip_special_tokens=True) == text
        assert len(other) == len(tokenizer)
        assert [other.pad_token_id, other.eos_token_id, other.bos_token_id] == [0, 1, 2]


def test_bos_comes_first_and_nothing_comes_last(tokenizer, loaded):
    for other in (tokenizer, *loaded):
        ids = other(["Mary", "Mary met John."]).input_ids
        assert [row[0] for row in ids] == [2, 2] and [row.count(2) for row in ids] == [1, 1]
        assert ids[0] == [2, *ids_of(tokenizer, "Mary")]
        assert other("").input_ids == [2]


def test_shorter_rows_are_padded_on_the_right(tokenizer):
    rows = tokenizer(["Mary", "Mary met John."], padding=True).input_ids
    assert len(rows[0]) == len(rows[1]) and rows[0][2:] == [0] * (len(rows[0]) - 2)


# -- labels by token -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(SEEDS, st.sampled_from(FAMILIES), st.sampled_from(((), ("templates",), ("entities",))))
def test_labelled_tokens_spell_what_the_span_labels(tokenizer, seed, family, held):
    document = WORLD.document(seed, family, held)
    for span in document.spans:
        alone = Document(document.text, family, spans=[span])
        ids, labels = token_labels(tokenizer, alone, span.kind)
        assert len(ids) == len(labels) and ids == tokenizer(document.text).input_ids
        assert labels[0] is None
        marked = [i for i, label in enumerate(labels) if label is not None]
        assert marked == list(range(marked[0], marked[-1] + 1))
        assert {str(labels[i]) for i in marked} == {str(span.value)}
        spelled = tokenizer.decode([ids[i] for i in marked])
        assert spelled.removeprefix(" ") == document.text[span.start : span.end]


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(FAMILIES))
def test_all_spans_of_a_kind_are_labelled_at_once(tokenizer, seed, family):
    document = WORLD.document(seed, family)
    for kind in {span.kind for span in document.spans}:
        _, together = token_labels(tokenizer, document, kind)
        one_by_one = [None] * len(together)
        for span in document.find(kind):
            alone = Document(document.text, family, spans=[span])
            labels = token_labels(tokenizer, alone, kind)[1]
            one_by_one = [
                a if a is not None else b for a, b in zip(labels, one_by_one, strict=True)
            ]
        assert together == one_by_one


def test_a_latent_variable_labels_every_token(tokenizer):
    document = WORLD.document(0, "prose")
    for kind, value in (("family", "prose"), ("tense", document.latents["tense"])):
        ids, labels = token_labels(tokenizer, document, kind)
        assert labels == [None] + [value] * (len(ids) - 1)


def test_spans_go_before_a_latent_variable_of_the_same_name(tokenizer):
    document = WORLD.document(0, "agreement")
    assert "number" in document.latents
    ids, labels = token_labels(tokenizer, document, "number")
    words = [tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True) if label]
    assert words == [" " + document.text[s.start : s.end] for s in document.find("number")]


def test_a_kind_without_spans_labels_nothing(tokenizer):
    ids, labels = token_labels(tokenizer, WORLD.document(0, "ioi"), "year")
    assert len(ids) == len(labels) and set(labels) == {None}


def test_a_label_on_part_of_a_token_labels_the_token_but_not_its_space(tokenizer):
    text = "Mary, virus Paris."
    for start, end, words in (
        (0, 2, ["Mary"]),
        (5, 6, []),
        (6, 7, [" virus"]),
        (3, 8, ["Mary", ",", " virus"]),
    ):
        document = Document(text, "test", spans=[Span(start, end, "part", 1)])
        ids, labels = token_labels(tokenizer, document, "part")
        marked = [tokenizer.decode([i]) for i, label in zip(ids, labels, strict=True) if label]
        assert marked == words


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_the_posterior_by_token_knows_each_word_when_it_ends(tokenizer, seed):
    document = WORLD.document(seed, "prose")
    table = token_posterior(tokenizer, WORLD, document)
    _, ranges = offsets(tokenizer, document.text)
    assert table.shape == (len(ranges) + 1, len(WORLD.topics))
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(table[0], 1 / len(WORLD.topics))
    ends, rows = WORLD.posterior(document)
    for (_, end), row in zip(ranges, table[1:], strict=True):
        read = max(i for i, at in enumerate(ends) if at <= end)
        np.testing.assert_array_equal(row, rows[read])
    topics = token_labels(tokenizer, document, "topic")[1]
    assert all(row[WORLD.topics.index(t)] > 0 for t, row in zip(topics, table, strict=True) if t)


# -- batches for training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(tokenizer):
    """The first 900 documents of seed 5, each as token ids with `<bos>` and `<eos>`."""
    texts = [document.text for document in itertools.islice(WORLD.documents(5), 900)]
    return [(2, *ids, 1) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Rows of batches of seed 5, each cut behind its `<eos>`."""
    some = itertools.islice(batches(WORLD, tokenizer, seed=5, length=96, rows=16), 6)
    return [
        [tuple(part) for part in np.split(row, np.flatnonzero(row == 1) + 1) if len(part)]
        for row in np.concatenate(list(some))
    ]


@pytest.mark.parametrize("length, rows", [(128, 32), (64, 5)])
def test_batches_have_their_shape(tokenizer, length, rows):
    batch = next(batches(WORLD, tokenizer, seed=0, length=length, rows=rows))
    assert batch.shape == (rows, length) and batch.dtype == np.uint16
    assert batch.max() < len(tokenizer)


def test_every_row_begins_with_bos_and_is_full(rows):
    assert {row[0][0] for row in rows} == {2}
    assert {sum(map(len, row)) for row in rows} == {96}


def test_rows_are_the_stream_in_order(rows, stream):
    """Only a row's last document is cut; none is skipped, moved or written twice."""
    parts = [part for row in rows for part in row]
    assert parts == [
        ids[: len(part)] for ids, part in zip(stream[: len(parts)], parts, strict=True)
    ]
    cut = [row[-1][-1] != 1 for row in rows]
    assert all(part[-1] == 1 for row in rows for part in row[:-1])
    assert 0 < sum(cut) <= len(rows)


def test_what_stands_at_a_rows_start_has_the_mixtures_own_lengths(tokenizer):
    """Rows filled with whatever fits would have no short documents there, and train a model so."""
    some = itertools.islice(batches(WORLD, tokenizer, seed=6, rows=128), 16)
    firsts = [(row.tolist() + [1]).index(1) + 1 for row in np.concatenate(list(some))]
    texts = [document.text for document in itertools.islice(WORLD.documents(6), 6_000)]
    lengths = [len(ids) + 2 for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    for limit in (20, 40, 80):
        share, among_rows = np.mean(np.array(lengths) <= limit), np.mean(np.array(firsts) <= limit)
        error = np.sqrt(share * (1 - share) * (1 / len(firsts) + 1 / len(lengths)))
        assert abs(share - among_rows) < 4 * error, limit


def test_a_padded_call_before_changes_no_batch(tokenizer):
    clean = next(batches(WORLD, tokenizer, seed=3, length=64, rows=4))
    tokenizer(["one", "one two three four"], padding=True, truncation=True, max_length=3)
    np.testing.assert_array_equal(next(batches(WORLD, tokenizer, seed=3, length=64, rows=4)), clean)


def test_equal_seeds_give_equal_batches(tokenizer):
    def take(seed):
        stream = batches(WORLD, tokenizer, seed=seed, rows=4)
        return [next(stream) for _ in range(3)]

    first, again, other = take(1), take(1), take(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], first[1])  # a batch is not overwritten by the next one


def test_the_speed_is_told_in_tokens_per_second(tokenizer):
    for family in (None, "ioi"):
        letters, tokens = rates(WORLD, tokenizer, family, seconds=0.05).splitlines()
        assert letters.endswith("characters per second of one core")
        assert tokens.startswith("generated and tokenized: ") and " tokens per second" in tokens
