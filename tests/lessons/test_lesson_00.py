"""Lesions on tiny random models, by hand and by another route; the figures of lesson 00."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mi_helpers import plots, widgets
from mi_helpers.ablation import part_name
from mi_helpers.architecture import architecture
from mi_helpers.course.exercise import declared, evaluate, look_up
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_00 import exercises, experiments, figures
from mi_helpers.lessons.lesson_00.experiments import MODES, LesionLab
from mi_helpers.lessons.shared import family_losses, make_batch, shipped_model, token_pool
from mi_helpers.loading import empty_gemma2_2b
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import World

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "00_meet_the_model.ipynb"
FAMILIES = ("prose", "facts", "ioi", "repetition", "pronoun")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 8}
CONFIGS = {"gemma2": GEMMA, "gpt2": SIZES, "gpt_neox": SIZES | {"rotary_pct": 0.5}}


def make_tokenizer():
    """A word-level tokenizer of a few words of TinyWorld; the rest is <unk>."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>"]
    stream = World().documents(1)
    for text in (next(stream).text for _ in range(40)):
        words += [word for word in text.split(" ") if word]
    words += [" " + word for word in words[4:]]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words)) if i < 300}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    names = {f"{n}_token": f"<{n}>" for n in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build(family: str = "gemma2", context: int = 128) -> LanguageModel:
    torch.manual_seed(1)
    config = CONFIGS[family] | {"max_position_embeddings": context}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return LanguageModel(hf, make_tokenizer(), family)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model, answers=4, families=FAMILIES)


@pytest.fixture(scope="module")
def lab(model, batch):
    return LesionLab(model, batch, make_batch(model, 4, 7, FAMILIES))


def close(a: dict, b: dict, tolerance: float = 1e-5) -> bool:
    return list(a) == list(b) and all(abs(a[key] - b[key]) < tolerance for key in a)


# -- documents -------------------------------------------------------------------------------


def test_scored_tokens_are_the_answers(model):
    batch = make_batch(model, answers=6, families=("ioi",))
    stream = World().documents(20_000, "ioi")
    for row, position in zip(batch.rows.tolist(), batch.positions.tolist(), strict=True):
        document = next(d for d in stream if len(model.tokens(d.text)[0]) <= 24)
        assert (
            batch.ids[row, : batch.lengths[row]].tolist() == model.tokens(document.text)[0].tolist()
        )
        before = document.text[: document.find("answer")[0].start].rstrip()
        assert position == len(model.tokens(before)[0])


def test_a_batch_holds_enough_of_each_family(batch):
    counts = torch.bincount(batch.family)
    assert batch.names == FAMILIES and (counts >= 4).all()
    assert batch.ids.shape[1] <= 24 and (batch.positions < batch.lengths[batch.rows]).all()
    assert (batch.positions > 0).all()
    assert batch.inside().sum() == (batch.lengths - 1).sum()


def test_a_document_longer_than_the_context_is_cut_or_left_out():
    model = build(context=16)
    batch = make_batch(model, answers=200, families=("prose", "facts"), longest=12)
    assert batch.ids.shape[1] == 12
    stream = itertools.islice(World().documents(20_000, "prose"), int(batch.rows.max()))
    assert max(len(document.text.split()) for document in stream) > 16


def test_a_batch_that_cannot_be_had_is_said(model):
    with pytest.raises(ValueError, match="no family 'poems'"):
        make_batch(model, families=("poems",))
    with pytest.raises(ValueError, match="Too few documents of 'ioi' have 5 tokens"):
        make_batch(model, answers=1, families=("ioi",), longest=5)


# -- lesions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "mode", "message"),
    [
        ([("neuron", 0)], "mean", "no kind of part 'neuron'"),
        ([("mlp", 3)], "mean", "layers 0 to 2, not 3"),
        ([("mlp", 0, 1)], "mean", "takes no head"),
        ([("mlp", 0)], "blur", "no mode 'blur'"),
    ],
)
def test_an_impossible_lesion_is_said_in_one_sentence(lab, parts, mode, message):
    with pytest.raises(ModelError, match=message):
        lab.after(parts, mode)


def test_a_lesion_of_nothing_changes_nothing(model, batch):
    hooks = {site: lambda x: x for site in ("z", "attn_out", "mlp_out", "resid_post")}
    assert family_losses(model, batch, hooks) == family_losses(model, batch)


# -- losses ----------------------------------------------------------------------------------


def test_family_losses_are_those_of_single_documents(model, batch):
    each = {name: [] for name in batch.names}
    for row, position, family in zip(batch.rows, batch.positions, batch.family, strict=True):
        ids = batch.ids[row, : batch.lengths[row]]  # no padding
        each[batch.names[family]].append(model.loss(ids)[0, position - 1].item())
    by_hand = {name: sum(values) / len(values) for name, values in each.items()}
    assert close(family_losses(model, batch), by_hand)


def losses(lab, answers):
    """{family: mean loss} of what a lab read."""
    each = enumerate(lab.names)
    return {name: float(answers[lab.batch.family == i, 0].mean()) for i, name in each}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_lab_agrees_with_whole_runs(family):
    model = build(family)
    batch = make_batch(model, answers=2, families=FAMILIES)
    lab = LesionLab(model, batch, batch)
    assert close(losses(lab, lab.before), family_losses(model, batch))
    several = [[("head", 1, 2)], [("attn", 2)], [("mlp", 0)], [(2, 1), (0, 3), ("mlp", 1)]]
    for parts, mode in itertools.product(several, MODES):
        whole = family_losses(model, batch, lab.hooks(parts, mode))
        assert close(losses(lab, lab.after(parts, mode)), whole)
        assert not close(whole, losses(lab, lab.before), 1e-3)


def test_every_answer_is_computed_once(lab, monkeypatch):
    first = lab.after([(1, 0)], "zero")
    first[:] = -1  # what a caller does to the numbers stays with the caller
    monkeypatch.setattr(lab.model, "run_from_layer", None)
    assert (lab.after([("head", 1, 0)], "zero")[:, 0] > 0).all()


def test_the_reference_leaves_out_bos_and_padding(model, batch):
    found = token_pool(model, batch)
    assert set(found) == {(s, i) for s in ("z", "attn_out", "mlp_out") for i in range(3)}
    _, cache = model.run_with_cache(batch.ids[:1, : batch.lengths[0]], "mlp_out")
    n = batch.lengths[0] - 1
    assert torch.allclose(found["mlp_out", 2][:n], cache["mlp_out", 2][0, 1:], atol=1e-5)
    assert len(found["mlp_out", 2]) == batch.inside().sum()


def test_damage_is_after_less_before_by_document(lab):
    parts = lab.parts([0, 2])
    assert len(parts) == 2 * (4 + 1) and len(lab.parts()) == 3 * 5
    assert [part_name(part) for part in parts[3:5]] == ["L0 head 3", "L0 MLP"]
    table, found = lab.table(parts, "zero"), lab.damage([parts[3]], "zero")
    assert table.shape == (10, len(FAMILIES))
    for column, name in enumerate(lab.names):
        changes = lab.changes([parts[3]], name, "zero").numpy()  # (documents,)
        mean, error = found[name]
        assert table[3, column].item() == pytest.approx(mean, abs=1e-5)
        assert mean == pytest.approx(changes.mean(), abs=1e-5)
        alone = len(changes) == 1  # which says nothing about how much documents differ
        wanted = float("inf") if alone else changes.std(ddof=1) / len(changes) ** 0.5
        assert error == pytest.approx(wanted, abs=1e-5)


def test_the_lab_measures_with_what_it_is_given(model, batch):
    lab = LesionLab(model, batch, batch, measure=lambda after, before, document: (7, 0))
    assert set(lab.damage([(0, 0)]).values()) == {(7.0, 0.0)}


@pytest.mark.parametrize("part", [("head", 1, 2), ("mlp", 0, None)])
def test_noise_pushes_as_far_as_the_lesion(lab, monkeypatch, part):
    pushes = []
    monkeypatch.setattr(lab, "_run", lambda key, layer, hooks: pushes.append(hooks))
    lab.noise([part])
    (hook,) = pushes[0].values()
    site = "mlp_out" if part[0] == "mlp" else "attn_out"
    clean = lab._written(site, part[1], {})
    change = lab._written(site, part[1], lab.hooks([part])) - clean
    push = hook(torch.zeros_like(clean))
    assert torch.allclose(push.norm(dim=-1), change.norm(dim=-1), rtol=1e-4)
    assert not push[:, 0].any() and push[:, 1:].any()
    cosine = F.cosine_similarity(push[:, 1:], change[:, 1:], dim=-1)
    assert cosine.mean().abs() < 0.2


def test_the_strongest_dissociation_by_hand():
    damage = torch.tensor([[0.0, 0.1, 0.0], [6.0, 6.0, 6.0], [2.0, 0.0, 1.9], [0.1, 3.0, 0.1]])
    assert experiments.strongest_dissociation(damage) in [(2, 0, 3, 1), (3, 1, 2, 0)]


# -- facts and heads -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(model):
    return experiments.facts(model, 5)


def test_facts_end_before_their_city(model, known):
    assert len({each.prompt for each in known}) == 5
    for each in known:
        assert each.ids == model.tokens(each.prompt)[0].tolist()
        assert not each.prompt.endswith(each.city) and 0 not in each.landmark
        assert max(each.landmark) < len(each.ids)


def test_gaze_and_memory_are_those_of_single_runs(model, known):
    looks, left = experiments.gaze(model, known), experiments.remembered(model, known)
    for i, each in enumerate(known):
        logits, cache = model.run_with_cache(torch.tensor(each.ids), "pattern")
        alone = cache["pattern"][:, 0, :, -1][..., each.landmark].sum(-1)
        assert torch.allclose(looks[i], alone, atol=1e-5)
        assert torch.allclose(left[i], logits[0, -1].softmax(-1)[each.answer], atol=1e-6)
    order = experiments.gaze_order(model, known)
    means = [float(looks.mean(0)[at]) for at in order]
    assert len(set(order)) == 12 and means == sorted(means, reverse=True)


def test_heads_silenced_at_random_are_a_mean_over_draws(model, known):
    heads = [(0, 1), (1, 2)]
    left = experiments.left_at_random(model, known, heads, 2, draws=40)
    whole = experiments.left_in_order(model, known, heads, 2)
    assert [mean for mean, _ in left[::2]] == pytest.approx([mean for mean, _ in whole[::2]])
    assert left[2][1] == pytest.approx(0, abs=1e-6)  # all of them, in every draw
    ones = [experiments.left_in_order(model, known, [head], 1)[1][0] for head in heads]
    assert min(ones) < left[1][0] < max(ones) and left[1][1] > 0


def test_what_is_said_instead_is_of_the_facts_that_are_lost():
    model = shipped_model()
    some = experiments.facts(model, 12)
    layer, head = 2, 3
    said = dict(experiments.said_instead(model, some, (layer, head)))
    for each in some:
        first = exercises.without_head(model, each.prompt, layer, head)[0, -1].argmax()
        assert (int(first) == each.answer) == (each.prompt not in said)
        assert model.str_tokens([int(first)])[0].strip() == said.get(each.prompt, each.city)


def test_a_head_followed_by_hand_is_the_model_s():
    model = shipped_model()
    _, cache = model.run_with_cache(experiments.FACT, ["pattern", "v", "attn_out"])
    for layer in range(model.n_layers):
        q, k = experiments.rotated(model, experiments.FACT, layer)
        given = cache["pattern", layer][0], cache["v", layer][0], model.weight("W_O", layer)
        for head in range(model.n_heads):
            pattern = exercises.attention_pattern(
                q[:, head], k[:, head], *experiments.scale_and_cap(model)
            )
            assert torch.allclose(pattern, given[0][head], atol=1e-4)
        writes = sum(exercises.head_writes(*given, h) for h in range(model.n_heads))
        added = model.part("ln1_post", layer)(writes)
        assert torch.allclose(added, cache["attn_out", layer][0], atol=1e-3)


def test_what_is_fetched_by_hand(model, known):
    found = experiments.fetched(model, known, 1, 2)
    _, cache = model.run_with_cache(torch.tensor(known[0].ids), [("z", 1)])
    write = cache["z", 1][0, -1, 2] @ model.weight("W_O", 1)[2]
    words = experiments.written_words(model, write, 1)
    others = [each.answer for each in known if each.answer != known[0].answer]
    beaten = [float(words[known[0].answer] > words[other]) for other in others]
    if others:
        assert found[0].item() == pytest.approx(sum(beaten) / len(beaten))


def test_shares_sum_to_one(model):
    sites = ["embed", "attn_out", "mlp_out", "resid_final"]
    _, cache = model.run_with_cache(experiments.FACT, sites)
    assert sum(experiments.shares(cache).values()) == pytest.approx(1, abs=1e-4)


def test_an_answer_that_leaves_its_hook_on_spoils_no_later_check():
    def leaves_it(model, text, layer, head):
        def silence(z):
            z[:, 1:, head] = 0

        model.add_hook(("z", layer), silence)
        return model(text)

    model = shipped_model()
    before, checked = model(experiments.FACT), look_up("0.5", "exercise")
    for answer in (leaves_it, exercises.for_good):
        assert "stays changed" in evaluate(checked, answer).message
        assert shipped_model() is model and torch.equal(model(experiments.FACT), before)
    assert evaluate(checked, checked.reference).status == "right"


# -- the investigation -----------------------------------------------------------------------


def test_a_number_draws_one_of_the_skills_that_a_lesion_takes():
    names = World.families
    damage = torch.zeros(4, len(names))

    def drawn():
        return {experiments.draw_skill(number, damage, names) for number in range(200)}

    assert drawn() == set(experiments.skills())  # none stands out: any
    for family, most in (("ioi", 1.0), ("calendar", 3.0), ("prose", 3.0), ("years", 0.9)):
        damage[2, list(names).index(family)] = most
    assert drawn() == {"ioi", "calendar"}
    assert experiments.draw_skill(7, damage, names) == experiments.draw_skill(7, damage, names)


@pytest.mark.parametrize(
    "given", [[(2, 1), ("mlp", 0)], {(2, 1), ("mlp", 0)}, [("head", 2, 1), ("mlp", 0, None)]]
)
def test_parts_may_be_written_in_several_ways(given):
    assert exercises.parts_in(given) == (("head", 2, 1), ("mlp", 0, None))


def test_a_lesion_of_everything_is_not_selective(monkeypatch):
    harm = {name: (9.0, 0.1) for name in experiments.skills()}
    monkeypatch.setattr(exercises, "judge", lambda: SimpleNamespace(damage=lambda parts: harm))
    assert exercises.selectivity([(0, 0)], experiments.skills()[0]) == 0
    harm |= dict.fromkeys(experiments.skills()[1:], (-0.2, 0.1))
    assert exercises.selectivity([(0, 0)], experiments.skills()[0]) == 1


# -- figures ---------------------------------------------------------------------------------


def boxes(picture):
    """The rectangles of a figure's texts, in pixels, once it is laid out."""
    plots.render(picture)
    renderer = matplotlib.backends.backend_agg.FigureCanvasAgg(picture).get_renderer()
    texts = [text for axes in picture.axes for text in axes.texts if text.get_text()]
    return [text.get_window_extent(renderer) for text in texts], picture.bbox


@pytest.mark.parametrize("family", [*CONFIGS, "gemma-2-2b"])
def test_the_architecture_map_overlaps_no_text(family):
    model = empty_gemma2_2b() if family == "gemma-2-2b" else build(family)
    rows = architecture(model)
    picture = plots.architecture_map(rows, f"A title: {model.n_parameters:,}", model.parallel)
    placed, page = boxes(picture)
    assert len(placed) > 20
    for one, other in itertools.combinations(placed, 2):
        assert not one.overlaps(other)
    for box in placed:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


def test_the_architecture_map_says_every_shape():
    model = empty_gemma2_2b()
    picture = plots.architecture_map(architecture(model))
    said = " | ".join(text.get_text() for text in picture.axes[0].texts)
    for piece in ("8 × 256", "4 × 256", "9216", "256000", "embed's, tied", "blocks 1 to 25"):
        assert piece in said
    assert "attention in even blocks sees the last 4096 tokens only" in said


def test_before_after_prints_both_numbers_and_keeps_its_limits():
    picture = plots.before_after({"a": 1.0, "b": -0.001}, {"a": 20.0, "b": 0.0}, limits=(0, 5))
    axes = picture.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.00 → 20.00", "0.00 → 0.00"] and axes.get_xlim() == (0, 5)
    assert max(axes.lines[1].get_xdata()) == 5
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()
    plots.render(plots.before_after({"a": 0.0}, {"a": 0.0}))


def test_the_figures_of_the_lesson_draw_at_every_corner(model, lab, known):
    controls = {"part": figures.part_names(model), "layer": (0, model.n_layers - 1, 1)}
    for values in widgets.corners(**controls):
        drawn = figures.next_tokens(model, "The", **values)
        assert plots.render(drawn).startswith(b"\x89PNG")
        damage = lab.damage([figures.part_called(values["part"], values["layer"])])
        drawn = figures.estimates({"": damage}, "title", limits=(-1, 6))
        assert plots.render(drawn).startswith(b"\x89PNG")


def test_estimates_say_every_number_and_keep_their_limits():
    series = {"lesion": {"a": (20.0, 1.0), "b": (-0.001, 0.25)}, "noise": {"a": (1.0, 0.5)}}
    picture = figures.estimates(series, limits=(-1, 6))
    said = [text.get_text() for text in picture.axes[0].texts]
    assert said == ["20.00 ± 2.00", "0.00 ± 0.50", "1.00 ± 1.00"]
    assert picture.axes[0].get_xlim() == (-1, 6)


def test_the_table_of_shapes_has_both_models():
    table = figures.shape_table(build(), empty_gemma2_2b())
    assert "| · q | queries | 4 × 6 | 8 × 256 |" in table and "256000" in table


def test_the_notebook_asks_what_is_registered():
    """Each stub, check and prediction stands in the notebook as the room declares it."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = "\n".join(c.source for c in cells if c.cell_type == "code")
    for each in declared(0, "exercise"):
        assert each.stub.strip() in source and f'check("{each.id}", {each.name})' in source
    for each in declared(0, "prediction"):
        assert f'predict("{each.id}", "{each.question}"' in source
        assert all(f'"{option}"' in source for option in each.options)
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    main = [each for each in declared(0, "exercise") if "going further" not in each.title]
    assert all(f"### {each.id} {each.title}" in text for each in declared(0, "exercise"))
    assert sum(each.minutes for each in main) <= 60
