"""Scores by hand and against scikit-learn; features against a dense computation; contexts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_harvest import made_harvest, sparse_data
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from tiny_models import sentences, tiny_model

from mi_helpers.files import DATA, RunError
from mi_helpers.loading import load_model
from mi_helpers.saes import features as module
from mi_helpers.saes import figures as feature_figures
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import (
    Features,
    Highest,
    bin_edges,
    bin_of,
    chunks,
    collect,
    context,
    contexts,
    extreme_logits,
    firings,
    logit_effects,
    nearest_latents,
    scramble,
    write_latents,
)
from mi_helpers.saes.files import load_coder
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.labels import Labels, token_labels
from mi_helpers.saes.scores import Firings, score_units
from mi_helpers.saes.sources import open_source

# -- scores ----------------------------------------------------------------------------------


def as_firings(x):
    row, latent = np.nonzero(x > 0)
    return Firings(row, latent, x[row, latent].astype(np.float32), *x.shape)


def table(n, units, concepts, seed=0, sparse=True, coarse=False):
    """Values (n, units), some tied and most 0 if `sparse`, and truth (n, concepts)."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, concepts)) < 0.3
    x = rng.normal(size=(n, units)) + truth[:, :1] * np.linspace(0, 2, units)
    x = np.round(x, 1) if coarse else x
    return (np.maximum(x - 0.5, 0) if sparse else x).astype(np.float32), truth


def best_threshold(x, y):
    """The slow way: every value as a threshold."""
    return max(
        (2 * (y & (x >= t)).sum() / ((x >= t).sum() + y.sum()), t) for t in np.unique(x[x != 0])
    )


def test_a_unit_by_hand():
    x = np.array([3.0, 2, 2, 0, 0, 1] * 2)[:, None]
    truth = np.array([1, 1, 0, 0, 1, 0] * 2, bool)[:, None]
    found = score_units(as_firings(x), truth, ["c"])
    assert found.threshold[0, 0] == 2.0  # 2·2/(3+3); at 3: 2·1/(1+3); at 1: 2·2/(4+3)
    assert found.chosen[0, 0] == pytest.approx(2 / 3) == found.f1[0, 0]
    assert found.precision[0, 0] == pytest.approx(2 / 3) == found.recall[0, 0]
    # positives 3, 2, 0 against negatives 2, 0, 1: 3 + (½ + 1 + 1) + ½ wins of 9
    assert found.auroc[0, 0] == pytest.approx(6 / 9)
    best = found.best()[0]
    assert (best.concept, best.unit, best.threshold) == ("c", 0, 2.0)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("coarse", [True, False])
def test_scores_equal_scikit_learns(sparse, coarse):
    x, truth = table(300, 70, 3, sparse=sparse, coarse=coarse)
    found = score_units(as_firings(x) if sparse else x, truth)
    for c in range(3):
        for u in range(0, 70, 7):
            early, late = x[:150, u], x[150:, u]
            f1, threshold = best_threshold(early, truth[:150, c])
            assert found.chosen[c, u] == pytest.approx(f1, abs=1e-6)
            picked = late >= found.threshold[c, u]
            expected = precision_recall_fscore_support(
                truth[150:, c], picked, average="binary", zero_division=0
            )[:3]
            got = found.precision[c, u], found.recall[c, u], found.f1[c, u]
            assert got == pytest.approx(expected, abs=1e-6)
            assert found.auroc[c, u] == pytest.approx(roc_auc_score(truth[150:, c], late), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_firings_and_their_dense_table_score_alike(seed):
    x, truth = table(60, 5, 1, seed, coarse=True)
    if not (0 < truth[:30].sum() < 30 and 0 < truth[30:].sum() < 30):
        return
    sparse, dense = score_units(as_firings(x), truth), score_units(x, truth)
    assert np.allclose(sparse.auroc, dense.auroc, atol=1e-6)
    better = sparse.threshold > 0
    better &= dense.threshold > 0  # a dense unit may also choose to fire everywhere
    assert np.allclose(sparse.f1[better], dense.f1[better])


def test_the_best_unit_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    truth = rng.random((2_000, 4)) < 0.1
    x = np.maximum(rng.normal(size=(2_000, 40)) - 1.5, 0)
    x[:, 10:14] += 3 * truth
    found = score_units(as_firings(x), truth, list("abcd"))
    assert [best.unit for best in found.best()] == [10, 11, 12, 13]
    assert all(best.f1 > 0.85 and best.auroc > 0.98 for best in found.best())
    others = np.delete(found.auroc, range(10, 14), 1)
    assert abs(others - 0.5).max() < 0.1 and np.delete(found.f1, range(10, 14), 1).max() < 0.3


def test_a_unit_that_never_fires_scores_nothing():
    x, truth = table(100, 3, 1)
    x[:, 1] = 0
    found = score_units(as_firings(x), truth)
    assert found.f1[0, 1] == found.chosen[0, 1] == 0 and found.auroc[0, 1] == 0.5
    assert np.isinf(found.threshold[0, 1])


def test_bad_tables_are_said():
    x, truth = table(100, 3, 2)
    with pytest.raises(ValueError, match="The units have 100 rows, the truth has shape"):
        score_units(x, truth[:50])
    with pytest.raises(ValueError, match="hold NaN"):
        score_units(np.where(x > 1, np.nan, x), truth)
    truth[50:, 1] = False
    with pytest.raises(ValueError, match="'b' is the case at .* and at 0.0% of the second"):
        score_units(x, truth, ["a", "b"])


# -- the pass over the harvest ---------------------------------------------------------------


@pytest.fixture(scope="module")
def coder():
    made = SparseCoder(16, 50, k=4, seed=3)
    with torch.no_grad():
        made.b_enc[7] = -100  # never fires
    return made


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return made_harvest(tmp_path_factory.mktemp("h"), sparse_data(1_000), shard_rows=301, piece=9)


@pytest.fixture(scope="module")
def found(held, coder):
    return collect(held, coder)


@pytest.fixture(scope="module")
def dense(held, coder):
    with torch.no_grad():
        return coder.encode(held.slice(0, held.rows)[0]).numpy()


def piece_of(row):
    """Pieces of 9 rows that begin anew in each shard of 301."""
    return row // 301 * 1_000 + row % 301 // 9


def test_chunks_keep_pieces_whole(held):
    for size in (1, 50, 4_096):
        at = 0
        for first, x, piece in chunks(held, size):
            assert first == at and len(x) == len(piece) <= size + 9
            at += len(x)
            assert at == held.rows or piece_of(at - 1) != piece_of(at)
        assert at == held.rows


def test_counts_and_histograms_are_those_of_the_dense_table(found, dense):
    assert np.array_equal(found.count, (dense > 0).sum(0))
    assert np.allclose(found.total, dense.sum(0), rtol=1e-4)
    assert np.array_equal(found.histogram.sum(1), found.count)
    for latent in (0, 13, 49):
        value = dense[dense[:, latent] > 0, latent]
        assert np.array_equal(found.histogram[latent], np.histogram(value, bin_edges())[0])
    assert found.count[7] == 0 and found.dead == (dense > 0).any(0).__invert__().mean()
    assert found.frequency[3] == found.count[3] / 1_000


def test_histogram_bins_have_their_edges():
    value = np.array([1e-9, 0.99, 1.0, 1.18, 1.19, 2.0, 1e9])
    edges = bin_edges()
    where = bin_of(value)
    assert where[0] == 0 and where[-1] == 127
    assert all(edges[b] <= v < edges[b + 1] for b, v in zip(where[1:-1], value[1:-1], strict=True))


def test_top_contexts_are_exact_one_per_piece(found, dense):
    for latent in range(dense.shape[1]):
        best = {}
        for row in np.flatnonzero(dense[:, latent] > 0):
            kept = best.get(piece_of(row))
            if kept is None or dense[row, latent] > dense[kept, latent]:
                best[piece_of(row)] = row
        order = sorted(best.values(), key=lambda r: (-dense[r, latent], r))[:20]
        rows = found.top_row[latent][: len(order)]
        assert np.allclose(dense[rows, latent], dense[order, latent], atol=1e-5)
        assert set(found.top_row[latent][len(order) :]) <= {-1}
        assert len({piece_of(r) for r in rows}) == len(rows)
        assert np.allclose(found.top_value[latent][: len(order)], dense[rows, latent], atol=1e-5)


def test_chunks_change_nothing(held, coder, found, monkeypatch):
    monkeypatch.setattr(module, "chunks", lambda held: chunks(held, 37))
    again = collect(held, coder)
    for name, value in vars(found).items():
        assert np.allclose(value, getattr(again, name), atol=1e-5), name


def test_samples_are_fair_and_sorted(found, dense):
    for latent in (0, 13):
        rows = found.sample_row[latent]
        rows = rows[rows >= 0]
        fires = np.flatnonzero(dense[:, latent] > 0)
        assert len(rows) == min(len(fires), 100) and set(rows) <= set(fires)
        assert np.all(np.diff(dense[rows, latent]) <= 1e-5)
    few = int(np.argmin(np.where(found.count > 0, found.count, 10**9)))
    assert set(found.sample_row[few][found.sample_row[few] >= 0]) <= set(
        np.flatnonzero(dense[:, few])
    )


def test_the_scramble_is_even_and_not_the_same_for_two_latents():
    row = np.arange(20_000)
    one, two = scramble(np.full(20_000, 3), row), scramble(np.full(20_000, 4), row)
    for keys in (one, two):
        counts = np.histogram(keys, 20, (0, 1))[0]
        assert counts.min() > 850 and counts.max() < 1_150 and len(set(keys)) == 20_000
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.03


def test_quantiles_go_from_high_to_low(found, dense):
    rows = found.quantiles(13, 5)
    assert len(rows) == 5 and rows[0] == found.sample_row[13][0]
    assert np.all(np.diff(dense[rows, 13]) <= 0)
    assert found.quantiles(7) == []


def test_highest_keeps_the_first_of_equal_keys():
    kept = Highest(2, 2)
    one = np.zeros(3, int)
    kept.add(one, np.array([1.0, 1.0, 1.0]), np.array([5, 6, 7]), np.array([1.0, 2, 3]))
    kept.add(one[:1], np.array([1.0]), np.array([8]), np.array([4.0]))
    assert kept.row.tolist() == [[5, 6], [-1, -1]] and kept.value[0].tolist() == [1, 2]
    kept.add(one[:1], np.array([2.0]), np.array([9]), np.array([5.0]))
    assert kept.row[0].tolist() == [9, 5]


def test_features_come_back_from_their_file(found, tmp_path):
    found.save(tmp_path / "f.safetensors")
    again = Features.load(tmp_path / "f.safetensors")
    assert again.rows == found.rows
    assert all(np.array_equal(v, getattr(again, k)) for k, v in vars(found).items())
    (tmp_path / "f.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="truncated or damaged.*Run the features again"):
        Features.load(tmp_path / "f.safetensors")


def test_firings_are_the_dense_table(held, coder, dense):
    found = firings(coder, held.slice(0, held.rows)[0])
    again = np.zeros_like(dense)
    again[found.row, found.latent] = found.value
    assert np.allclose(again, dense, atol=1e-5) and np.all(np.diff(found.row) >= 0)


@pytest.mark.parametrize("latent", [-1, 50])
def test_a_latent_out_of_range_is_said(held, found, latent):
    with pytest.raises(ValueError, match=f"no latent {latent}: this coder has latents 0 to 49"):
        contexts(held, found, latent, None)
    with pytest.raises(ValueError, match=f"no latent {latent}"):
        found.quantiles(latent)


def test_a_coder_of_another_width_is_said(held):
    with pytest.raises(RunError, match="reads 12 numbers, the harvest .* has 16"):
        collect(held, SparseCoder(12, 50, k=4))


# -- contexts, logits, neighbours ------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def real(model, tmp_path_factory):
    """A harvest of the tiny model, and a coder that was not trained."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "t.txt").write_text("\n\n".join(sentences(60, seed=5)))
    source = open_source(str(folder / "t.txt"))
    config = HarvestConfig(("resid_post", 1), tokens=500, context=12, shard_tokens=200)
    held = harvest(model, source, folder / "h", config, progress=False)
    return held, SparseCoder(12, 30, k=3, seed=1), list(source.texts())


def test_the_firing_token_stands_in_brackets(model, real):
    held, coder, texts = real
    found = collect(held, coder)
    index = int(np.argmax(found.count))
    for each in contexts(held, found, index, model.tokenizer, n=5):
        text = str(each)
        assert text.count("[[") == text.count("]]") == 1 and "[[ " not in text
        plain = text.replace("[[", "").replace("]]", "")
        assert any(plain in whole for whole in texts)
        assert each.value == found.top_value[index][found.top_row[index] == each.row][0]
    name = model.tokenizer.decode
    short = context(held, found.top_row[index, 0], lambda i: name([i]), around=1)
    assert len(short.tokens) <= 3 and f"[[{short.tokens[short.at].strip()}]]" in str(short)


def test_every_row_finds_its_token(model, real):
    held, _, texts = real
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row in range(0, held.rows, 41):
        shard, local = held.locate(row)
        document, position = module.words(held, shard).place[local].tolist()
        each = context(held, row, lambda i: model.tokenizer.decode([i]))
        assert each.tokens[each.at] == model.tokenizer.decode([ids[document][position]])


@pytest.mark.parametrize("gain", [True, False])
def test_logit_effects_are_what_the_final_norm_and_unembedding_do(model, gain):
    """With the norm's scale held, a small step along a direction moves the logits like that."""
    d = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    found = logit_effects(model, d, gain)
    row = d * (1 + model.ln_final.weight) if gain else d
    expected = row @ model.lm_head.weight.T
    mean = expected[:, model.in_text].mean(1, keepdim=True)
    assert torch.allclose(found, expected - mean, atol=1e-5)
    with pytest.raises(ValueError, match="have 9 numbers, the stream has 12"):
        logit_effects(model, torch.zeros(1, 9))


def test_extreme_logits_and_neighbours(model, real):
    _, coder, _ = real
    (up, high), (down, low) = extreme_logits(model, coder, n=4)
    effects = logit_effects(model, coder.W_dec.detach())
    effects[:, ~model.in_text] = 0  # neither high nor low
    assert torch.equal(up, effects.topk(4).indices)
    assert torch.allclose(low, effects.topk(4, largest=False).values)
    assert (high > low).all() and up.shape == down.shape == (30, 4)
    near, cosine = nearest_latents(coder, 5)
    rows = torch.nn.functional.normalize(coder.W_dec.detach(), dim=1)
    both = (rows @ rows.T).fill_diagonal_(-2)
    assert torch.equal(near, both.topk(5).indices)
    assert torch.allclose(cosine, both.topk(5).values, atol=1e-6)


def test_what_latents_raise_and_lower_is_tokens_of_text():
    tiny = load_model("tiny-gemma")
    coder = load_coder(DATA / "sae" / "tiny_gemma")
    (up, _), (down, _) = extreme_logits(tiny, coder)
    assert tiny.in_text[up].all() and tiny.in_text[down].all()
    bare = logit_effects(tiny, coder.W_dec.detach()).abs().topk(10).indices
    assert (~tiny.in_text[bare]).any()  # or the mask would change nothing


def test_every_latent_is_written_as_a_line(model, real, tmp_path):
    held, coder, _ = real
    found = collect(held, coder)
    write_latents(tmp_path / "l.jsonl", held, coder, found, model)
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [line["latent"] for line in lines] == list(range(30))
    assert [line["fires"] for line in lines] == found.count.tolist()
    some = lines[int(np.argmax(found.count))]
    assert len(some["top"]) <= 20 and all("[[" in text for _, text in some["top"])
    assert len(some["raises"]) == len(some["lowers"]) == 10 == len(some["nearest"])
    values = [value for value, _ in some["top"]]
    assert values == sorted(values, reverse=True)


# -- TinyWorld's labels ----------------------------------------------------------------------


def test_labels_are_those_of_the_documents(tmp_path):
    model = tiny_model()
    world = open_source("tinyworld:prose,norwegian,facts,years", seed=2)
    config = HarvestConfig(("embed", None), tokens=2_000, context=20, shard_tokens=700)
    held = harvest(model, world, tmp_path, config, progress=False)
    labels = token_labels(held, model.tokenizer)
    assert len(labels.index) == held.rows
    for row in range(0, held.rows, 97):
        shard, local = held.locate(row)
        document = world.document(int(module.words(held, shard).place[local, 0]))
        name = labels.names[labels.index[row]] if labels.index[row] >= 0 else None
        if document.family == "prose":
            assert name is None or name in {s.value for s in document.find("topic")}
        else:
            assert (
                name == {"norwegian": "norwegian", "facts": None, "years": "other"}[document.family]
            )
    truth, names = labels.table()
    assert {"norwegian", "other"} < set(names) and len(truth) == labels.known.sum()
    assert (truth.sum(1) == 1).all() and truth.any(0).all()


def test_only_tinyworld_has_labels(held):
    with pytest.raises(RunError, match="Only TinyWorld has labels; this harvest is of made"):
        token_labels(held, None)


def test_unknown_rows_are_left_out():
    labels = Labels(("a", "b"), np.array([0, -1, 1, 0]))
    truth, _ = labels.table()
    assert truth.tolist() == [[True, False], [False, True], [True, False]]


# -- figures ---------------------------------------------------------------------------------


def test_the_dashboard_draws_every_latent(model, real):
    held, coder, _ = real
    found = collect(held, coder)
    page = feature_figures.Page(held, coder, found, model)
    for latent in (0, 15, 29, int(np.argmin(found.count))):
        assert feature_figures.dashboard(page, latent).axes
    with pytest.raises(ValueError, match="no latent 30"):
        feature_figures.dashboard(page, 30)
