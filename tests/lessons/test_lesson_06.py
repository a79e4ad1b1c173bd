"""Lesson 06: sparse coding of images, the SAE laboratory, its figures, and what it ships."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Lasso

from mi_helpers.course.answers import Wrong
from mi_helpers.lessons.lesson_06 import claims, grid, image_coding, naming, rivals, universality
from mi_helpers.lessons.lesson_06 import experiments as sae_lab
from mi_helpers.lessons.lesson_06 import figures as sae_figures
from mi_helpers.lessons.lesson_06.exercises import score_names, turned_up
from mi_helpers.loading import load_model
from mi_helpers.plots import render
from mi_helpers.saes import concepts
from mi_helpers.saes.coder import SparseCoder, explained_variance, shrinkage
from mi_helpers.saes.concepts import (
    best_latents,
    both_signs,
    concept_scores,
    count_latents,
    own_latents,
    union_f1,
)
from mi_helpers.saes.features import Features, token_purity
from mi_helpers.saes.files import load_coder
from mi_helpers.saes.labels import LabelledTokens, labelled_tokens
from mi_helpers.saes.scores import Firings, score_units
from mi_helpers.saes.similarity import gaussian_like, matched_cosines, random_like, share_found
from mi_helpers.saes.training import TrainConfig, fit
from mi_helpers.widgets import corners


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-gemma")


def directions(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def sparse_rows(n, true, k=2, seed=0):
    """Sums of k of the true directions."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(n, len(true), generator=generator).topk(k).indices
    size = 1 + torch.rand(n, k, generator=generator)
    return (size[..., None] * true[which]).sum(1)


# -- images ----------------------------------------------------------------------------------


def test_whitening_makes_the_spectrum_of_an_image_flat():
    rng = np.random.default_rng(0)
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    noise = np.fft.fft2(rng.normal(size=(256, 256)))
    natural = np.fft.ifft2(noise / np.maximum(f, 1 / 256)).real  # amplitude 1/f
    white = image_coding.whiten(natural)
    assert white.std() == pytest.approx(1)
    power = np.abs(np.fft.fft2(white)) ** 2
    low, high = power[(f > 0.02) & (f < 0.05)].mean(), power[(f > 0.15) & (f < 0.2)].mean()
    assert low == pytest.approx(high, rel=0.25)
    before = np.abs(np.fft.fft2(natural)) ** 2
    assert before[(f > 0.02) & (f < 0.05)].mean() > 10 * before[(f > 0.15) & (f < 0.2)].mean()


def test_patches_are_pieces_of_the_images_and_depend_on_the_seed():
    images = [np.arange(400.0).reshape(20, 20), 1000 + np.arange(300.0).reshape(15, 20)]
    x = image_coding.patches(images, 7, size=3, seed=1)
    assert x.shape == (7, 9) and sum(row[0] >= 1000 for row in x.tolist()) == 3
    for row in x.reshape(-1, 3, 3):
        assert torch.equal(row - row[0, 0], torch.tensor([[0.0, 1, 2], [20, 21, 22], [40, 41, 42]]))
    assert torch.equal(x, image_coding.patches(images, 7, size=3, seed=1))
    assert not torch.equal(x, image_coding.patches(images, 7, size=3, seed=2))
    with pytest.raises(ValueError, match="Image 1 has 15 × 20 pixels"):
        image_coding.patches(images, 7, size=16)


def test_gaussian_rows_have_the_covariance_of_the_rows_they_are_like():
    x = sparse_rows(20_000, directions(12, 4), seed=3)
    like = gaussian_like(x, seed=1)
    assert torch.allclose(torch.cov(like.T), torch.cov(x.T), atol=0.05)
    assert torch.allclose(like.mean(0), x.mean(0), atol=0.05)


def test_sparse_codes_are_the_lasso_of_scikit_learn():
    filters, x = directions(20, 9), sparse_rows(6, directions(20, 9), k=3)
    codes = image_coding.sparse_codes(x, filters, penalty=0.2, steps=400)
    lasso = Lasso(alpha=0.2 / 9, fit_intercept=False, tol=1e-6, max_iter=100_000)
    for row, code in zip(x, codes, strict=True):
        want = lasso.fit(filters.T.double().numpy(), row.double().numpy()).coef_
        assert code.numpy() == pytest.approx(want, abs=1e-3)
    assert 0 < (codes != 0).float().mean() < 0.6


def test_learning_finds_the_filters_that_patches_were_made_of():
    true = directions(9, 9, seed=5)
    found = image_coding.learn(sparse_rows(4_000, true), 9, penalty=0.1, steps=300, batch=200)
    best = (found @ true.T).abs().max(0).values
    assert (best > 0.98).sum() >= 8
    blank = image_coding.learn(gaussian_like(sparse_rows(4_000, true)), 9, 0.1, 300)
    assert ((blank @ true.T).abs().max(0).values > 0.98).sum() <= 2


def test_spread_and_orientation_by_hand():
    point, flat = np.zeros((2, 8, 8))
    point[3, 5], flat[:] = 1, 1
    stripes = np.tile(np.cos(np.pi / 2 * np.arange(8)), (8, 1))
    dots = stripes * stripes.T
    filters = np.stack([point, flat, stripes, dots]).reshape(4, 64)
    assert image_coding.spread(filters)[:2] == pytest.approx([0, 1])
    assert image_coding.spread(filters)[2] > 0.9
    found = image_coding.orientation(filters)
    assert found[0] < 0.05 and found[2] > 0.8 and found[3] < 0.1
    local = stripes * np.exp(-((np.arange(8) - 3) ** 2 + (np.arange(8)[:, None] - 4) ** 2) / 4)
    three = np.stack([local, stripes, point]).reshape(3, 64)
    assert image_coding.localised_and_oriented(three) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no square"):
        image_coding.spread(np.ones((2, 12)))


def test_photographs_give_localised_oriented_filters_and_their_components_do_not():
    assert claims.learned_share(0) > 0.35
    assert claims.component_share(0) < 0.05


# -- training --------------------------------------------------------------------------------


def test_fit_finds_the_directions_that_rows_are_sums_of():
    true = directions(32, 24, seed=2)
    x = sparse_rows(6_000, true) + 1.0  # a common mean, which b_dec has to take up
    coder = fit(x, TrainConfig(64, 2, steps=300, batch=256))
    cosines = (F.normalize(coder.W_dec, dim=1) @ true.T).max(0).values
    assert (cosines > 0.95).float().mean() > 0.9
    assert explained_variance(x, coder(x)) > 0.95
    assert float(coder.scale_in) == 1.0
    again = fit(x, TrainConfig(64, 2, steps=300, batch=256))
    assert torch.equal(coder.W_dec, again.W_dec)
    assert not torch.equal(
        coder.W_dec, fit(x, TrainConfig(64, 2, steps=5, batch=256, seed=1)).W_dec
    )


def test_an_l1_penalty_makes_it_sparse_and_too_short():
    x = sparse_rows(4_000, directions(24, 12, seed=2))
    light, heavy = (
        fit(x, TrainConfig(24, activation="relu", sparsity=each, steps=200, batch=256))
        for each in (0.01, 0.3)
    )
    with torch.no_grad():
        l0 = [(coder.encode(x) > 0).float().sum(1).mean() for coder in (light, heavy)]
        short = [shrinkage(x, coder(x)) for coder in (light, heavy)]
    assert l0[1] < l0[0] and short[1] < short[0] < 1.02
    assert shrinkage(x, x.mean(0) + 0.8 * (x - x.mean(0))) == pytest.approx(0.8, abs=1e-4)


# -- concepts, splitting, sharing ------------------------------------------------------------


def made_firings():
    """10 rows; concept A at rows 0-4, B at 5-9. Latent 0: rows 0-3 · 1: rows 5-9 and 0 ·
    2: rows 0-9 · 3: row 4 · 4: never."""
    rows = [[0, 1, 2, 3], [0, 5, 6, 7, 8, 9], list(range(10)), [4], []]
    row = np.concatenate(rows).astype(int)
    latent = np.repeat(np.arange(5), [len(each) for each in rows])
    firings = Firings(row, latent, np.ones(len(row), np.float32), 10, 5)
    return firings, np.stack([np.arange(10) < 5, np.arange(10) >= 5], 1)


def test_latents_of_a_concept_by_hand():
    firings, truth = made_firings()
    assert count_latents(firings, truth).tolist() == [2, 1]
    assert count_latents(firings, truth, precision=0.9).tolist() == [2, 0]
    assert count_latents(firings, truth, recall=0.5).tolist() == [1, 1]
    assert count_latents(firings, truth, precision=0.4).tolist() == [3, 2]


def test_the_union_of_a_concepts_latents_is_chosen_on_the_first_half():
    """Rows 0-5 and 6-11 are alike; two latents share a concept, a third misleads in one half."""
    truth = np.tile([True, True, True, False, False, False], 2)[:, None]
    entries = [(0, 0), (1, 1), (6, 0), (7, 1), (2, 2), (3, 2), (4, 2), (8, 2)]
    row, latent = np.array(entries).T
    firings = Firings(row, latent, np.ones(8, np.float32), 12, 3)
    (f1,) = union_f1(firings, truth)
    assert f1 == pytest.approx(2 * 2 / (2 + 3))  # latents 0 and 1 say rows 6 and 7; 8 is missed


def test_matching_is_one_to_one_and_by_cosine():
    rows = torch.tensor([[2.0, 0, 0], [1, 0.1, 0]])
    others = torch.tensor([[0.5, 0, 0], [0, 1, 0], [0, 0, 7]])
    cosines = matched_cosines(rows, others)
    assert cosines == pytest.approx([1.0, 0.1 / 1.01**0.5], abs=1e-5)
    assert share_found(rows, others) == 0.5
    assert share_found(rows, torch.cat([others, rows])) == 1.0
    like = random_like(directions(500, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert like.norm(dim=1) == pytest.approx(torch.ones(500)) and like[:, 0].mean() > 0.5


def test_token_purity_by_hand():
    top = np.array([[0, 1, 2, 3], [4, 5, -1, -1], [0, 4, 5, 1]])
    blank = np.zeros((3, 4))
    features = Features(6, blank, blank, blank, top, blank, top, blank)
    tokens = np.array([7, 7, 7, 9, 8, 8])
    assert token_purity(features, tokens, least=4).tolist() == [0.75, 0.5]
    assert token_purity(features, tokens, least=2).tolist() == [0.75, 1.0, 0.5]


def test_ground_and_scores_on_the_model(model):
    ground = labelled_tokens(model, sae_lab.middle(model), 3_000, seed=5)
    assert len(ground.x) == len(ground.neurons) == len(ground.truth) == len(ground.tokens)
    assert ground.x.shape[1] == model.d_model and ground.neurons.shape[1] == model.d_mlp
    assert (ground.truth.sum(1) == 1).all() and "norwegian" in ground.names
    text = model.tokenizer.decode(ground.tokens[ground.only(["norwegian"]).truth[:, 0]])
    assert sum(word in text.split() for word in ("er", "den", "og", "det")) >= 3
    coder = SparseCoder(model.d_model, 300, k=4)
    found = concept_scores(coder, ground, ["norwegian"])
    assert set(found) == {"latent", "neuron", "random direction"}
    truth = ground.only(ground.scorable()[:1]).truth
    best = score_units(both_signs(torch.tensor(truth * -1.0)), truth, ["planted"]).best()[0]
    assert (best.unit, best.f1) == (1, 1.0)


def test_a_topics_words_are_its_nouns(model):
    ids = sae_lab.topic_words(model, "virology")
    words = {model.tokenizer.decode([i]).strip() for i in ids}
    assert {"virus", "viruses", "liver"} <= words and "Salk" not in words and len(words) == len(ids)
    with pytest.raises(ValueError, match="no topic 'norwegian'"):
        sae_lab.topic_words(model, "norwegian")


@pytest.mark.parametrize(("back", "alone"), [(0, 3.0), (1, 0.0)])
def test_a_planted_latent_is_told_by_the_company_of_its_words(model, monkeypatch, back, alone):
    """A latent along the topic's embeddings fires at its words in any company; one that reads
    whether the word before was the topic's, only where others stand around it."""
    words = torch.tensor(sae_lab.topic_words(model, "chess"))

    def read(_, ids, sites):
        assert sites == [sae_lab.middle(model)]
        is_word = torch.isin(ids, words).float()
        return [F.pad(is_word, (back, 0))[:, : ids.shape[1], None]]

    monkeypatch.setattr(sae_lab, "read_sites", read)
    coder = SparseCoder(1, 2, k=2)
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[3.0, -1]]))
        coder.b_enc.zero_(), coder.b_dec.zero_()
    found = [sae_lab.at_a_topics_words(model, coder, 0, "chess", share) for share in (1 / 24, 1.0)]
    assert found == pytest.approx([alone, 3.0], abs=0.5)
    with pytest.raises(ValueError, match="No word of chess came up in 2 lists"):
        sae_lab.at_a_topics_words(model, coder, 0, "chess", 0.0, n=2)


def test_a_topics_latent_is_silent_at_its_word_among_random_words(model):
    coder = load_coder(sae_lab.CODER)
    ground = labelled_tokens(model, sae_lab.middle(model), 12_000, seed=1)
    (best,) = best_latents(coder, ground, ["aircraft"])
    alone, together = (
        sae_lab.at_a_topics_words(model, coder, best.unit, "aircraft", share, seed=1)
        for share in (1 / 24, 1.0)
    )
    assert together > 5 * alone and together > 1


def test_own_latents_are_named_and_topics_are_averaged_without_norwegian(monkeypatch):
    firings, truth = made_firings()
    monkeypatch.setattr(concepts, "firings", lambda coder, x: firings)
    names = ("norwegian", "virology")
    ground = LabelledTokens(torch.zeros(10, 2), torch.zeros(10, 2), truth, names, np.arange(10))
    own = own_latents(SparseCoder(2, 5, k=1), ground)
    assert own == {"norwegian": 2, "virology": 1}
    assert sae_lab.of_topics({"norwegian": 40, "a": 1, "b": 2}) == 1.5


# -- rivals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground(model):
    return rivals.ground(model, sae_lab.middle(model), seed=5, each=4, others=40)


def test_the_ground_is_of_all_families_and_its_neurons_of_all_blocks_below(model, ground):
    site = sae_lab.middle(model)
    n = len(ground.x)
    assert ground.x.shape == (n, model.d_model)
    assert ground.neurons.shape == (n, (site[1] + 1) * model.d_mlp)
    assert len(ground.truth) == len(ground.tokens) == len(ground.document) == n
    assert set(rivals.CONCEPTS) | {"other"} <= set(ground.names)
    assert (ground.truth.sum(1) == 1).all() and len(set(ground.document.tolist())) > 50
    documents = rivals.texts(4, 40, 5)
    assert {"prose", "norwegian", "ioi"} <= {d.family for d in documents}
    number = int(ground.document[0])
    text = documents[number].text
    here = model.tokenizer.decode(ground.tokens[ground.document == number])
    assert here.split()[-1] in text
    ids = model.tokens(text)
    _, cache = model.run_with_cache(ids, [site, ("post", 1)])
    rows = torch.from_numpy(ground.document == number)
    assert torch.allclose(ground.x[rows][-1], cache[site][0, -1], atol=1e-3)
    second = ground.neurons[rows][-1, model.d_mlp : 2 * model.d_mlp]
    assert torch.allclose(second, cache["post", 1][0, -1], atol=1e-3)


def test_facts_and_verdicts_are_about_nothing(model):
    documents = [next(sae_lab.open_source("tinyworld").world.documents(1, f)) for f in ("truth",)]
    said = rivals.subject(model.tokenizer, rivals.TinyWorldText(), documents[0])
    assert set(said) == {None}


def test_an_unknown_subject_is_said():
    with pytest.raises(ValueError, match="no topic and no family 'alchemy'"):
        rivals.texts(1, 1, 0, ["alchemy"])


def test_what_is_promising_holds_the_best_unit():
    rng = np.random.default_rng(0)
    truth = rng.random((400, 2)) < 0.1
    values = rng.normal(size=(400, 300))
    values[:, 17] += 3 * truth[:, 0]
    values[:, 250] -= 3 * truth[:, 1]
    both = both_signs(torch.from_numpy(values))
    found = rivals.promising(both, truth, most=3)
    assert {17, 550} <= set(found.tolist()) and len(found) <= 6
    exact = score_units(both, truth).best()
    quick = rivals.said_by_best(both, truth, ["a", "b"])
    for column, best in enumerate(exact):
        assert best.unit in found
        assert (quick[:, column] == (both[200:, best.unit] >= best.threshold)).all()


def test_rivals_are_chosen_on_the_first_half(ground):
    """A unit that is right in the second half alone is not chosen."""
    names = ("norwegian",)
    truth = ground.truth[:, [ground.names.index("norwegian")]]
    half = len(truth) // 2
    late = np.where(np.arange(len(truth)) >= half, truth[:, 0], ~truth[:, 0])
    units = np.stack([late, truth[:, 0] | (np.arange(len(truth)) % 7 == 0)], 1).astype(float)
    said = rivals.said_by_best(units, truth, names)
    assert (said[:, 0] == (units[half:, 1] > 0)).all()


def test_rivals_by_kind_and_their_intervals(model, ground):
    coder = load_coder(sae_lab.CODER)
    names = ground.scorable(rivals.CONCEPTS)
    told = rivals.tell(coder, ground, names)
    assert tuple(told) == rivals.KINDS
    judged = rivals.judge(told, ground, names, draws=60)
    latent, probe, always = (
        judged[kind] for kind in ("SAE latent", "logistic probe", "always fires")
    )
    assert latent.median > 0.6 > judged["random direction"].median
    assert abs(latent.median - probe.median) < 0.2
    half = len(ground.x) // 2
    for i, name in enumerate(names):
        share = ground.truth[half:, ground.names.index(name)].mean()
        assert always.f1[name] == pytest.approx(2 * share / (1 + share))
        assert told["always fires"][:, i].all()
    for kind in judged.values():
        assert kind.low <= kind.median <= kind.high and kind.behind[0] <= kind.behind[1]
    assert latent.behind == (0.0, 0.0)
    table = rivals.table(judged, rivals.CONCEPTS)
    assert table.count("\n") == len(judged) + 1 and f"{latent.median:.2f}" in table


def test_an_interval_is_of_documents_not_of_tokens():
    """Tokens of one document are alike: with two documents, one told and one not, F1 is 0 to 1."""
    truth = np.ones((200, 1), bool)
    ground = rivals.Ground(
        torch.zeros(400, 1),
        torch.zeros(400, 0),
        np.concatenate([truth, truth]),
        ("a",),
        np.zeros(400, int),
        np.repeat([0, 1, 2, 3], 100),
    )
    said = np.repeat([True, False], 100)[:, None]
    (found,) = rivals.judge({"it": said}, ground, ("a",)).values()
    assert found.f1["a"] == pytest.approx(2 / 3) and (found.low, found.high) == (0, 1)


# -- turning one up --------------------------------------------------------------------------


def test_a_latent_turned_up_raises_its_topic_and_a_random_direction_does_not(model):
    coder = load_coder(sae_lab.CODER)
    few = {"each": 4, "others": 20, "neurons": False}
    ground = rivals.ground(model, sae_lab.middle(model), names=[sae_lab.OPENING], **few)
    assert ground.neurons.shape[1] == 0
    with pytest.raises(ValueError, match="Too little of the text"):
        sae_lab.opening_latent(coder, rivals.ground(model, sae_lab.middle(model), **few))
    latent = sae_lab.opening_latent(coder, ground)
    nouns, ids = sae_lab.topic_words(model, sae_lab.OPENING), sae_lab.starts(model)
    assert ids.shape == (12, 24) and (ids[:, 0] == model.tokenizer.bos_token_id).all()

    def share(direction, strength):
        p = sae_lab.turned_up(model, ids, sae_lab.middle(model), direction, strength)
        own = turned_up(model, ids, sae_lab.middle(model), direction, strength)
        assert torch.allclose(p, own, atol=1e-4)  # the exercise's reference is the library's
        return float(p[:, 1:, nouns].sum(-1).mean())

    direction, other = coder.W_dec[latent].detach(), sae_lab.random_direction(coder)
    assert share(direction, 24) > 5 * share(direction, 0)
    assert share(other, 24) < 2 * share(direction, 0)


def test_text_is_written_from_probabilities(model):
    word = model.to_single_token(" virus")

    def always(ids):
        return torch.nn.functional.one_hot(torch.full(ids.shape, word), model.d_vocab).float()

    assert sae_lab.write_on(always, model, "The", 3).endswith("virus virus virus")


def test_a_model_without_an_autoencoder_is_told(model):
    assert sae_lab.coder_of(model).d_in == model.d_model
    other = load_model("tiny-gemma")
    other.name = "another"
    with pytest.raises(ValueError, match="No autoencoder of another"):
        sae_lab.coder_of(other)


# -- names -----------------------------------------------------------------------------------


def a_sample() -> naming.Sample:
    facts = {
        "about": ["chess"] * 4 + ["tennis"] * 4,
        "at": ["the", "queen", "the", "comma", "the", "queen", "the", "the"],
        "after": ["", "the", "queen", "the"] * 2,
    }
    values = np.zeros((8, 3), np.float32)
    values[:4, 0] = [8, 4, 2, 1.9]  # about chess, strongly but at the last
    values[[1, 5], 1] = 1  # at queen
    values[[1, 3, 5, 7], 2] = 1  # after the
    return naming.Sample({k: np.array(v) for k, v in facts.items()}, values)


def test_names_say_where():
    found = a_sample()
    assert naming.says("about: chess", found).tolist() == [True] * 4 + [False] * 4
    assert naming.says("at: queen, the", found).sum() == 7
    assert naming.says(" after:the&about :tennis", found).tolist() == [False] * 5 + [
        True,
        False,
        True,
    ]
    assert naming.says("at: comma", found).sum() == 1
    assert naming.strong(found, 0, 8.0).tolist() == [True] * 3 + [False] * 5
    assert naming.f1(np.array([1, 1, 0], bool), np.array([1, 0, 1], bool)) == 0.5
    assert naming.f1(np.zeros(3, bool), np.zeros(3, bool)) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [(3, "A name is a text"), ("chess", "is no name"), ("about: alchemy", "No text is about")],
)
def test_what_is_no_name_is_said(name, said):
    with pytest.raises(Wrong, match=said):
        naming.says(name, a_sample())


def test_the_best_name_is_found_by_counting(monkeypatch):
    monkeypatch.setattr(naming, "SEEN", 1)
    found = a_sample()
    assert naming.best_name(found, 1) == ("at: queen", 1.0)
    assert naming.best_name(found, 2) == ("after: the", 1.0)
    name, score = naming.best_name(found, 0)
    assert name == "about: chess & at: queen, the" and score == pytest.approx(0.98)
    assert naming.f1(naming.says("about: chess", found), naming.strong(found, 0, 8)) == 6 / 7
    sorts = ["about: chess", "about: ioi", "at: the", "after: of", "about: chess & at: the"]
    assert [naming.sort_of(each) for each in sorts] == [
        "topic",
        "about",
        "at",
        "after",
        "two things",
    ]


def test_names_of_what_is_none_of_the_five_are_refused():
    with pytest.raises(Wrong, match="none of the five"):
        score_names({10**6: "about: chess"})


# -- the same latents elsewhere --------------------------------------------------------------


def test_partners_are_at_the_same_tokens_of_the_same_text(model):
    found = universality.dictionaries(model, 2_000)
    assert {tuple(values.shape) for values in found.values()} == {(400, 4 * model.d_model)}
    one, other, shuffled = (found[k] for k in ("this one", "another seed", "in another order"))
    assert torch.equal(other.sort(0).values, shuffled.sort(0).values)
    best = {k: universality.correlations(one, v).amax(1) for k, v in found.items()}
    varies = one.std(0) > 0
    assert torch.allclose(best["this one"][varies], torch.ones(()), atol=1e-4)
    assert best["another seed"].mean() > best["in another order"].mean() + 0.1
    a = torch.tensor([[1.0, 0, 3], [2, 0, 1], [3, 0, 2]])
    assert universality.correlations(a, a)[0].tolist() == pytest.approx([1, 0, -0.5])


# -- the table -------------------------------------------------------------------------------


def test_a_plane_in_logarithms_is_found_again():
    width, k = np.meshgrid([100, 200, 400], [2, 4, 8])
    y = 3 * width**-0.25 * k**-0.5
    plane = sae_lab.fit_plane(width.ravel(), k.ravel(), y.ravel())
    assert (plane.width_slope, plane.k_slope) == pytest.approx((-0.25, -0.5))
    assert plane.r_squared == pytest.approx(1) and plane(300, 3) == pytest.approx(
        3 * 300**-0.25 * 3**-0.5
    )


def test_the_slope_in_width_is_of_one_k():
    common = {"activation": "topk", "seed": 0}
    rows = [common | {"width": w, "k": 4, "nmse": 5 * w**-0.5} for w in (100, 200, 800)]
    rows += [common | {"width": w, "k": 8, "nmse": 1.0} for w in (100, 200)]
    rows += [row | {"seed": 1, "nmse": 1.0} for row in rows]
    assert sae_lab.width_slope(rows, 4) == pytest.approx(-0.5)
    assert sae_lab.width_slope(rows, 8) == pytest.approx(0)


def test_curves_are_read_between_their_points():
    assert sae_lab.at_equal_l0(4, {2: 1.0, 8: 3.0}) == pytest.approx(2)
    with pytest.raises(ValueError, match="from L0 2.0 to 8.0, not to 9.0"):
        sae_lab.at_equal_l0(9, {2: 1.0, 8: 3.0})


def test_what_ships_is_made_the_same_twice(model, tmp_path):
    small = {"widths": (1, 2), "ks": (4,), "penalties": ()}
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        files = grid.make_sae(
            model, folder, tokens=3_000, steps=3, grid_steps=3, grid=small, say=lambda _: None
        )
        made.append([(path.name, path.read_bytes()) for path in files])
    assert made[0] == made[1]
    assert [name for name, _ in made[0]] == ["grid.csv", "cfg.json", "sae_weights.safetensors"]
    rows = sae_lab.read_grid(tmp_path / "one" / "grid.csv")
    assert [(r["activation"], r["width"], r["seed"]) for r in rows] == [
        ("topk", 144, 0),
        ("topk", 288, 0),
        ("topk", 144, 1),
        ("topk", 288, 1),
    ]
    assert rows[0]["shared"] is None and 0 <= rows[2]["shared"] <= 1


def test_the_shipped_autoencoder_and_table_are_of_the_shipped_model(model):
    coder = load_coder(sae_lab.CODER)
    assert (coder.d_in, coder.d_latent, coder.k) == (model.d_model, 8 * model.d_model, sae_lab.K)
    assert coder.W_dec.detach().norm(dim=1) == pytest.approx(torch.ones(coder.d_latent), abs=1e-4)
    ground = labelled_tokens(model, sae_lab.middle(model), 3_000, seed=77)
    with torch.no_grad():
        assert explained_variance(ground.x, coder(ground.x)) > 0.8
    rows = sae_lab.select(sae_lab.read_grid(), activation="topk", seed=0)
    cells = {(row["width"], row["k"]) for row in rows}
    assert cells == {(w * model.d_model, k) for w in grid.WIDTHS for k in grid.KS}


def test_a_missing_table_is_said(tmp_path):
    with pytest.raises(ValueError, match="make-sae"):
        sae_lab.read_grid(tmp_path / "none.csv")


# -- figures ---------------------------------------------------------------------------------


def test_the_explorer_at_every_corner():
    rows = sae_lab.read_grid()
    runs = sae_lab.select(rows, activation="topk", seed=0)
    widths, ks = (sorted({row[name] for row in runs}) for name in ("width", "k"))
    for values in corners(width=widths, k=ks):
        assert len(render(sae_figures.sparsity_explorer(rows, **values))) > 10_000
    with pytest.raises(ValueError, match="No run has k 3"):
        sae_figures.sparsity_explorer(rows, widths[0], 3)


def test_figures_draw():
    rows = sae_lab.read_grid()
    runs = sae_lab.select(rows, activation="topk", seed=0)
    plane = sae_lab.fit_plane(*([row[name] for row in runs] for name in ("width", "k", "nmse")))
    filters = {"one": directions(10, 16), "two": directions(7, 16)}
    for figure in (
        sae_figures.frontier(rows),
        sae_figures.splitting(rows, sae_lab.K),
        sae_figures.scaling(rows, plane),
        sae_figures.filter_panels(filters, columns=4),
        sae_figures.curves([{"step": 1, "a": 2.0}, {"step": 2, "a": 1.0}], {"a": "a title"}),
        sae_figures.histograms({"a": [0.1, 0.2], "b": [2.0]}, mark=0.7),
    ):
        assert len(render(figure)) > 5_000


def test_a_mosaic_keeps_every_filter_in_its_place():
    tiles = sae_figures.mosaic(np.arange(1, 13.0).reshape(3, 4), columns=2)
    assert tiles.shape == (5, 5)
    assert tiles[:2, :2].ravel() == pytest.approx(np.array([1, 2, 3, 4]) / 4)
    assert tiles[3:, :2].ravel() == pytest.approx(np.array([9, 10, 11, 12]) / 12)
    assert np.isnan(tiles[2]).all()
