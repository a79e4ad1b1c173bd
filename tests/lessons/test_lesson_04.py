"""Lesson 04: its prompts, what it measures on tiny-gemma, its figures and its claims."""

import pytest
import torch
from families import TEXT, build, make_tokenizer
from rounding import SHARE

from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.lens import TunedLens, ranks, read_out, read_stream
from mi_helpers.lessons.lesson_04 import claims
from mi_helpers.lessons.lesson_04.experiments import (
    asked_kind,
    bridge_scan,
    country_of,
    favourites,
    make_prompts,
    total_effects,
    word_tokens,
    world_stream,
)
from mi_helpers.lessons.lesson_04.figures import LENSES, LensViewer, lens_grid, lens_table, shown
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel
from mi_helpers.plots import render
from mi_helpers.widgets import corners


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-gemma")


@pytest.fixture(scope="module")
def gemma():
    return LanguageModel(build("gemma2"), make_tokenizer(), "gemma2")


# -- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["facts", "ioi", "two_hop", "agreement", "calendar"])
def test_prompts_end_before_their_answer(tiny, family):
    p = make_prompts(tiny, family, 30)
    for i, document in enumerate(p.documents):
        span = document.find("answer")[-1]
        answer = document.text[span.start : span.end]
        read = tiny.tokenizer.decode(p.ids[i, 1 : p.last[i] + 1])
        assert document.text.startswith(p.text(i)) and read.rstrip() == p.text(i)
        assert answer.startswith(tiny.tokenizer.decode([p.answer[i]]).strip())
    assert (p.answer != p.wrong).all()
    if family == "ioi":
        giver = [tiny.tokenizer.decode([token]).strip() for token in p.wrong]
        assert giver == [document.latents["S"] for document in p.documents]


def test_wrong_facts_are_of_the_same_kind(tiny):
    p = make_prompts(tiny, "facts", 60, count=1)
    kinds = {}
    for document, token in zip(p.documents, p.answer.tolist(), strict=True):
        kinds.setdefault(asked_kind(document), set()).add(token)
    for document, token in zip(p.documents, p.wrong.tolist(), strict=True):
        assert token in kinds[asked_kind(document)]
    assert len(kinds) > 3


def test_prompts_that_cannot_be_made(tiny):
    with pytest.raises(ValueError, match="0 of 3 prompts of 'norwegian'"):
        make_prompts(tiny, "norwegian", 3)
    with pytest.raises(ValueError, match="no family 'fact'"):
        make_prompts(tiny, "fact", 3)


def test_the_country_of_a_document(tiny):
    document = make_prompts(tiny, "two_hop", 1, relation="country", count=1).documents[0]
    assert f" {country_of(document)}." in document.text
    with pytest.raises(ValueError, match="No landmark"):
        country_of(make_prompts(tiny, "ioi", 1).documents[0])
    assert word_tokens(tiny, ["Paris"]).tolist() == [tiny.to_single_token(" Paris")]


def test_bridges(tiny):
    found = bridge_scan(tiny, "language", 30)
    assert all(share.shape == (7,) and share.max() <= 1 for share in found.values())
    assert (found["answer (of its kind)"] >= found["answer (of all)"]).all()
    assert (found["country (of countries)"] >= found["country (of all)"]).all()
    assert found["answer (of all)"][-1] > 0.7  # pairs that were never trained
    with pytest.raises(ValueError, match="no 'climate' here; there are: language"):
        bridge_scan(tiny, "climate")


def test_answers_are_there_at_the_end_and_not_at_the_start(tiny):
    blank = untrained(tiny)
    for family, choices in (("facts", {"count": 1}), ("ioi", {})):
        p = make_prompts(tiny, family, 60, 5, **choices)
        hits = (ranks(tiny, read_stream(tiny, p.ids, p.at), p.answer) == 1).float().mean(1)
        assert hits[0] < 0.1 and hits[-1] > 0.9
        none = ranks(blank, read_stream(blank, p.ids, p.at), p.answer) == 1
        assert none.float().mean() < 0.05


@pytest.mark.parametrize("unit", ["component", "head"])
def test_complete_on_tiny_gemma(tiny, unit):
    p = make_prompts(tiny, "ioi", 40, 3)
    split = direct_logit_attribution(tiny, p.ids, p.answer, p.wrong, unit, p.last)
    assert split.relative_error < SHARE
    assert (split.logit > 0).float().mean() > 0.9


def test_total_effects(tiny):
    """The last MLP's effect is direct: nothing reads it. The first one's is not."""
    p = make_prompts(tiny, "facts", 20, 2, count=1)
    total = total_effects(tiny, p)
    direct = direct_logit_attribution(tiny, p.ids, p.answer, p.wrong, pos=p.last).mean()
    assert list(total) == [name for name in direct if name != "embed"]
    by_hand = []
    _, cache = tiny.run_with_cache(p.ids, "mlp_out")
    rows = [cache["mlp_out", 2][i, 1 : last + 1] for i, last in enumerate(p.last)]
    mean = torch.cat(rows).mean(0)
    for hooks in (
        {},
        {("mlp_out", 2): lambda x: torch.cat([x[:, :1], mean.expand_as(x[:, 1:])], 1)},
    ):
        with tiny.hooks(hooks):
            _, run = tiny.run_with_cache(p.ids, "resid_final")
        logits = tiny.unembed(run["resid_final"], softcap=False)[p.at]
        rows = torch.arange(len(logits))
        by_hand.append((logits[rows, p.answer] - logits[rows, p.wrong]).mean().item())
    assert total["L2 MLP"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-3)
    assert total["L0 MLP"] > 3 * abs(direct["L0 MLP"])


# -- lenses on TinyWorld ---------------------------------------------------------------------


def test_sampled_stream(tiny):
    stream = world_stream(tiny, 50, seed=3)
    assert stream.shape == (7, 50, 144)
    assert torch.equal(stream, world_stream(tiny, 50, seed=3))
    bos = tiny.run_with_cache(torch.tensor([[2]]), "resid_pre")[1]["resid_pre", 0][0, 0]
    assert not (stream[0] == bos).all(-1).any()  # never the first token
    words = read_out(tiny, stream).top[0]  # tied: the embedding reads the token itself
    assert len(words.unique()) > 15


def test_favourites(tiny):
    stream = world_stream(tiny, 60)
    got = favourites(tiny, stream)
    for depth, (token, share, sure) in enumerate(got):
        p = tiny.unembed(stream[depth]).softmax(-1)
        counts = [int((p.argmax(-1) == t).sum()) for t in range(tiny.d_vocab)]
        assert counts[token] == max(counts) and share == pytest.approx(max(counts) / 60)
        assert sure == pytest.approx(p[p.argmax(-1) == token, token].mean().item(), abs=1e-5)


# -- figures ---------------------------------------------------------------------------------


CONTROLS = {
    "prompt": "The Eiffel Tower is in the city of",
    "layer": (-1, 5),
    "back": (0, 8),
    "lens": list(LENSES),
    "follow": "France",
}


@pytest.fixture(scope="module")
def viewer(tiny):
    return LensViewer(tiny, TunedLens(6, 144))


def test_the_viewer_at_every_corner(viewer):
    for values in corners(**CONTROLS):
        assert render(viewer.figure(**values)).startswith(b"\x89PNG")


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts + axes.get_yticklabels()]


def test_the_viewer_shows_what_the_lens_reads(viewer, tiny):
    prompt = "The Eiffel Tower is in the city of"
    figure = viewer.figure(prompt, layer=5)
    p = tiny(prompt)[0, -1].softmax(-1)
    best = p.topk(5)
    for value, token in zip(best.values, best.indices, strict=True):
        assert f"{value:.3f}" in texts(figure)
        assert repr(tiny.tokenizer.decode([token])) in texts(figure)
    followed = viewer.figure(prompt, layer=5, follow="France")
    france = tiny.to_single_token(" France")
    assert str(int((p > p[france]).sum()) + 1) in texts(followed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "word " * 300}, "more than tiny-gemma's context"),
        ({"back": 9}, "go back 0 to 8"),
        ({"layer": 6}, "choose -1 to 5"),
        ({"lens": "other"}, "There is no 'other' here"),
        ({"follow": "Flurbzork"}, "choose a word that is one token"),
    ],
)
def test_what_the_viewer_cannot_draw_is_said(viewer, change, message):
    values = {"prompt": "The Eiffel Tower is in the city of"} | change
    with pytest.raises(ValueError, match=message):
        viewer.figure(**values)


def test_any_typed_text_is_drawn_or_answered(viewer, gemma):
    for prompt in ("x", "Flurbzork 漢字 $x_1$ \n <eos> {}", "a" * 60):
        assert render(viewer.figure(prompt, layer=0))
    with pytest.raises(ValueError, match="is not in gemma2's vocabulary: use other words"):
        LensViewer(gemma).figure("The Flurbzork")
    with pytest.raises(ValueError, match="choose one of logit lens"):
        LensViewer(gemma).figure(TEXT, lens="tuned lens")


def test_the_grid(gemma):
    p = torch.full((2, 3), 0.5)
    tops = [["a", " b", "$c"], ["d", "e", "f\n"]]
    figure = lens_grid([" x", "y", "z"], ["embed", "0"], tops, p)
    assert render(figure)
    assert "$c" in texts(figure) and "f↵" in texts(figure)
    with pytest.raises(ValueError, match="expected"):
        lens_grid([" x", "y"], ["embed", "0"], tops, p)
    assert shown("abcdefghijklmnop") == "abcdefghij…"


def test_the_table():
    text = lens_table(
        ["embed", "0"], [[" a", "|"], ["<bos>", "\n"]], torch.tensor([[0.5, 0.25]] * 2)
    )
    lines = text.splitlines()
    assert lines[0] == "| after block | 1 | 2 |" and lines[1] == "|---|---|---|"
    assert lines[2] == "| embed | `␣a` 0.500 | <code>&#124;</code> 0.250 |"
    assert [line.count("|") for line in lines] == [4] * 4


# -- the ledger ------------------------------------------------------------------------------


def test_a_random_token_is_in_the_middle():
    assert claims.random_token_rank(0) == pytest.approx(0.5, abs=0.06)
