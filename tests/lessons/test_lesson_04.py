"""Lesson 04: its prompts, what it measures on tiny-gemma, its figures and its claims."""

import math
from pathlib import Path

import nbformat
import pytest
import torch
from families import build, make_tokenizer
from rounding import SHARE

from mi_helpers.ablation import Mean, ablate
from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.course.exercise import declared, evaluate, look_up
from mi_helpers.lens import TunedLens, depth_keys, logit_lens, ranks, read_out, read_stream
from mi_helpers.lessons.lesson_04 import causal, claims, exercises, experiments, figures
from mi_helpers.lessons.lesson_04.experiments import (
    asked_kind,
    bridge_scan,
    country_of,
    make_prompts,
    total_effects,
    word_tokens,
    world_stream,
)
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.loading import untrained
from mi_helpers.models import LanguageModel
from mi_helpers.plots import render

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "04_logit_lens.ipynb"


@pytest.fixture(scope="module")
def tiny():
    return shipped_model()


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


def test_settling_is_of_the_models_own_answer(tiny):
    p, depth = experiments.prompts_of(tiny, "facts", 20), experiments.settling(tiny, "facts", 20)
    for i, (row, last) in enumerate(zip(p.ids, p.last, strict=True)):
        tops = logit_lens(tiny, row[None, : last + 1], pos=-1)[:, 0].argmax(-1)
        same = (tops == tops[-1]).tolist()
        by_hand = next(d for d in range(len(same)) if all(same[d:]))
        assert depth[i] == by_hand


def test_a_uniform_guess_costs_what_it_costs(tiny):
    found = read_out(tiny, world_stream(tiny, 40))
    final = tiny.unembed(world_stream(tiny, 40)[-1]).double().log_softmax(-1)
    by_hand = (final.exp() * (final + math.log(tiny.d_vocab))).sum(-1).mean()
    assert experiments.uniform_cost(tiny, found) == pytest.approx(float(by_hand), abs=1e-3)


# -- a lens judged by intervention -----------------------------------------------------------


@pytest.fixture(scope="module")
def texts(gemma):
    ids = torch.randint(4, gemma.d_vocab, (6, 9), generator=torch.Generator().manual_seed(0))
    keys = depth_keys(gemma)
    _, cache = gemma.run_with_cache(ids, keys)
    return causal.Sentences(ids, torch.stack([cache[key] for key in keys]))


def test_sentences_are_of_one_length_and_their_stream_is_the_models(tiny):
    some = causal.sentences(tiny, 3, 8)
    assert some.ids.shape == (3, 8) and some.stream.shape == (7, 3, 8, 144)
    _, cache = tiny.run_with_cache(some.ids, [("resid_pre", 0), ("resid_post", 2)])
    assert torch.equal(some.stream[0], cache["resid_pre", 0])
    assert torch.equal(some.stream[3], cache["resid_post", 2])
    assert torch.equal(some.tokens(3), cache["resid_post", 2][:, 1:].flatten(0, 1))


def test_influences_are_those_of_the_exercise(gemma, texts):
    depth, read = 2, causal.lens_reader(gemma, None, 2)
    basis = causal.random_basis(torch.zeros(3, gemma.d_model))
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=0)
    on_lens, on_model = causal.influences(gemma, texts, depth, basis, read)
    h, mean = texts.stream[depth], texts.tokens(depth).mean(0)
    with torch.no_grad():
        for v, one, other in zip(basis, on_lens, on_model, strict=True):
            want = exercises.influence(read, h, v, mean)
            torch.testing.assert_close(one, want, atol=1e-5, rtol=1e-3)
            want = exercises.influence(lambda x: gemma.run_from_layer(x, depth), h, v, mean)
            torch.testing.assert_close(other, want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_causal_basis_finds_what_the_lens_reads(gemma, texts, tuned):
    lens = None
    if tuned:
        lens = TunedLens(gemma.n_layers, gemma.d_model)
        torch.nn.init.normal_(lens.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        lens.requires_grad_(False)
    tokens, read = texts.tokens(2), causal.lens_reader(gemma, lens, 2)
    basis = causal.lens_basis(gemma, tokens, 2, lens, k=4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-4, rtol=0)
    drawn = [causal.random_basis(basis, seed) for seed in range(5)]
    found, *chance = (causal.influences(gemma, texts, 2, b, read)[0] for b in (basis, *drawn))
    assert found[0] > max(each.max() for each in chance)


def test_rank_correlation_sees_order_alone():
    a = torch.tensor([0.1, 3.0, 2.0, 50.0])
    assert causal.rank_correlation(a, a.log()) == pytest.approx(1)
    assert causal.rank_correlation(a, -a) == pytest.approx(-1)
    assert causal.rank_correlation(a, torch.tensor([1.0, 2, 3, 4])) == pytest.approx(0.8)


# -- the answer and its rival ----------------------------------------------------------------


def test_what_is_written_on_names_is_the_attribution_of_each(tiny):
    p = make_prompts(tiny, "ioi", 12, 3, form="pair")
    people = experiments.names_of(tiny)
    parts, terms = experiments.written_on(tiny, p, people, "head")
    split = direct_logit_attribution(tiny, p.ids, p.answer, None, "head", p.last)
    place = experiments.place_in(people, p.answer)
    assert parts == split.names and torch.equal(people[place], p.answer)
    own = terms[torch.arange(12), :, place]
    torch.testing.assert_close(own, split.terms, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="none of the words"):
        experiments.place_in(people, torch.tensor([tiny.to_single_token(" the")]))


def test_a_head_that_only_lowers_the_rival_is_told_from_one_that_raises_the_answer():
    terms = torch.zeros(1, 2, 5)
    terms[0, 0, 1], terms[0, 1, 3] = 2.0, -2.0  # the answer is name 1, its rival name 3
    right, wrong = exercises.apart(terms + 7, torch.tensor([1]), torch.tensor([3]))
    assert right.tolist() == [2, 0] and wrong.tolist() == [0, -2]


# -- one answer, two routes ------------------------------------------------------------------


def test_twins_have_the_same_answers(tiny):
    both = experiments.twins(tiny, 8, seed=4)
    assert torch.equal(both.fact.answer, both.copy.answer)
    for row, last, answer in zip(both.copy.ids, both.copy.last, both.copy.answer, strict=True):
        read = row[1 : last + 1].tolist()
        at = read.index(int(answer))
        assert read.count(int(answer)) == 1 and read[:at] == read[-at:]  # begins again, as far


def test_harm_is_the_growth_of_the_loss(tiny):
    p = experiments.twins(tiny, 4).copy
    reference = {("mlp_out", 1): torch.randn(9, 144)}
    before, after = [], []
    for i, last in enumerate(p.last):
        ids = p.ids[[i], : last + 1]
        before.append(tiny(ids)[0, -1].log_softmax(-1)[p.answer[i]])
        with tiny.hooks(ablate(tiny, [("mlp", 1)], Mean(reference))):
            after.append(tiny(ids)[0, -1].log_softmax(-1)[p.answer[i]])
    want = float(torch.stack(before).mean() - torch.stack(after).mean())
    assert experiments.harm(tiny, p, ("mlp", 1), reference) == pytest.approx(want, abs=1e-4)


def test_one_part_for_both_prompts_earns_half_at_most():
    decided = [exercises.decides(part, "copy") + exercises.decides(part, "fact")
               for part in (("mlp", 0), (3, 2))]  # fmt: skip
    assert max(decided) / 2 <= 0.5


# -- figures ---------------------------------------------------------------------------------


def texts_of(picture) -> list[str]:
    return [text.get_text() for axes in picture.axes for text in axes.texts]


def test_directions_are_drawn_at_what_they_cost():
    costs = {"a lens": (torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0.2])), "random": ([1], [1])}
    picture = figures.lens_against_model(costs, "title")
    assert render(picture).startswith(b"\x89PNG")
    drawn = picture.axes[0].lines[0]
    assert drawn.get_xdata().tolist() == [0.5, 1e-5]  # no cost at all is drawn at the edge
    assert drawn.get_ydata() == pytest.approx([0.1, 0.2])


def test_parts_that_differ_most_are_named():
    picture = figures.two_written(["a", "$b", "c"], [1, 2, 3], [1, -2, 2], ("x", "y"), most=2)
    assert render(picture) and texts_of(picture) == ["$b", "c"]


def test_names_of_neighbours_stand_on_their_own_sides_and_small_parts_have_none():
    right, wrong = [-0.4, -0.2, 9, 1.7], [-3.8, -3.9, 2.4, 1.2]
    picture = figures.two_written(["upper", "lower", "far", "small"], right, wrong, ("x", "y"))
    side = {text.get_text(): text.xyann[1] for text in picture.axes[0].texts}
    assert side["upper"] > 0 > side["lower"] and set(side) == {"upper", "lower", "far"}


# -- the notebook and the ledger -------------------------------------------------------------


def test_the_notebook_asks_what_is_registered():
    """Each stub, check and prediction stands in the notebook as the room declares it."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = "\n".join(c.source for c in cells if c.cell_type == "code")
    for each in declared(4, "exercise"):
        assert each.stub.strip() in source and f'check("{each.id}", {each.name})' in source
    for each in declared(4, "prediction"):
        assert f'predict("{each.id}", "{each.question}"' in source
        assert all(f'"{option}"' in source for option in each.options)
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    main = [each for each in declared(4, "exercise") if "going further" not in each.title]
    assert all(f"### {each.id} {each.title}" in text for each in declared(4, "exercise"))
    assert sum(each.minutes for each in main) <= 60


def test_a_random_token_is_in_the_middle():
    assert claims.random_token_rank(0) == pytest.approx(0.5, abs=0.06)


def test_a_step_that_trains_the_model_is_told_so_and_spoils_no_later_check():
    def trains_all(model, A, b, h, final_logits, optimizer):
        with torch.no_grad():
            model.ln_final.weight.mul_(1.01)
        return exercises.tuning_step(model, A, b, h, final_logits, optimizer)

    before, checked = shipped_model().ln_final.weight.clone(), look_up("4.5", "exercise")
    assert "stays changed" in evaluate(checked, trains_all).message
    assert torch.equal(shipped_model().ln_final.weight, before)
    assert evaluate(checked, checked.reference).status == "right"
