"""Lesions on tiny random models, by hand and by another route; the figures of lesson 00."""

import itertools
import math
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mi_helpers import plots, widgets
from mi_helpers.ablation import Mean, Zero, ablate, part_name
from mi_helpers.architecture import architecture
from mi_helpers.lessons.lesson_00 import exercises as lesson_00
from mi_helpers.lessons.lesson_00 import experiments as lesions
from mi_helpers.lessons.lesson_00.experiments import MODES, LesionLab
from mi_helpers.lessons.shared import family_losses, make_batch, token_pool
from mi_helpers.loading import empty_gemma2_2b, load_model
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


def build(family: str = "gemma2") -> LanguageModel:
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
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


def test_a_batch_that_cannot_be_had_is_said(model):
    with pytest.raises(ValueError, match="no family 'poems'"):
        make_batch(model, families=("poems",))
    with pytest.raises(ValueError, match="Too few documents of 'ioi' have 5 tokens"):
        make_batch(model, answers=1, families=("ioi",), longest=5)


# -- lesions ---------------------------------------------------------------------------------


def test_the_exercises_make_the_same_lesions(model):
    z, reference = torch.randn(2, 5, 4, 6), torch.randn(9, 4, 6)
    zero = ablate(model, [(0, 1)], Zero())["z", 0](z.clone())
    mean = ablate(model, [(0, 1)], Mean({("z", 0): reference}))["z", 0](z.clone())
    assert torch.equal(zero, lesson_00.silence_head(z, 1))
    assert torch.allclose(mean, lesson_00.mean_lesion(z, 1, reference))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("neuron", 0), "no kind of part 'neuron'"),
        (("mlp", 3), "layers 0 to 2, not 3"),
        (("mlp", 0, 1), "takes no head"),
        (("mlp", 0, None, "blur"), "no mode 'blur'"),
    ],
)
def test_an_impossible_lesion_is_said_in_one_sentence(lab, arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.hooks(*arguments)


def test_a_lesion_of_nothing_changes_nothing(model, batch):
    hooks = {site: lambda x: x for site in ("z", "attn_out", "mlp_out", "resid_post")}
    assert family_losses(model, batch, hooks) == family_losses(model, batch)


def test_the_last_answer_is_cut_off_and_said(model):
    document = World().document(7, "ioi")
    prompt, truth, said = lesions.last_answer(model, document)
    assert f"{prompt} {truth}." == document.text and truth == document.latents["IO"]
    assert said == model.generate(prompt, 1)[len(prompt) :].strip()
    silent = {"resid_post": lambda x: 0 * x}  # all logits alike: the first token of all
    assert lesions.last_answer(model, document, silent)[2] == ""


# -- losses ----------------------------------------------------------------------------------


def test_family_losses_are_those_of_single_documents(model, batch):
    each = {name: [] for name in batch.names}
    for row, position, family in zip(batch.rows, batch.positions, batch.family, strict=True):
        ids = batch.ids[row, : batch.lengths[row]]  # no padding
        each[batch.names[family]].append(model.loss(ids)[0, position - 1].item())
    by_hand = {name: sum(values) / len(values) for name, values in each.items()}
    assert close(family_losses(model, batch), by_hand)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_lab_agrees_with_whole_runs(family):
    model = build(family)
    batch = make_batch(model, answers=2, families=FAMILIES)
    lab = LesionLab(model, batch, batch)
    assert close(lab.before(), family_losses(model, batch))
    for part, mode in itertools.product([("head", 1, 2), ("attn", 2), ("mlp", 0)], MODES):
        whole = family_losses(model, batch, lab.hooks(*part, mode=mode))
        assert close(lab.after(*part, mode=mode), whole)
        assert not close(lab.after(*part, mode=mode), lab.before(), 1e-3)


def test_every_answer_is_computed_once(lab, monkeypatch):
    first = lab.after("head", 1, 0, "zero")
    first["ioi"] = None  # what a caller does to the answer stays with the caller
    monkeypatch.setattr(lab.model, "run_from_layer", None)
    assert lab.after("head", 1, 0, "zero")["ioi"] is not None
    with pytest.raises(ValueError, match="layers 0 to 2"):
        lab.after("mlp", 9)


def test_the_reference_leaves_out_bos_and_padding(model, batch):
    found = token_pool(model, batch)
    assert set(found) == {(s, i) for s in ("z", "attn_out", "mlp_out") for i in range(3)}
    _, cache = model.run_with_cache(batch.ids[:1, : batch.lengths[0]], "mlp_out")
    n = batch.lengths[0] - 1
    assert torch.allclose(found["mlp_out", 2][:n], cache["mlp_out", 2][0, 1:], atol=1e-5)
    assert len(found["mlp_out", 2]) == batch.inside().sum()


def test_damage_is_after_less_before(lab):
    parts = lab.parts([0, 2])
    assert len(parts) == 2 * (4 + 1) and len(lab.parts()) == 3 * 5
    damage = lab.damage(parts, mode="zero")
    after, before = lab.after(*parts[3], mode="zero"), lab.before()
    assert damage.shape == (10, len(FAMILIES))
    assert damage[3].tolist() == pytest.approx([after[n] - before[n] for n in FAMILIES], abs=1e-5)
    assert [part_name(part) for part in parts[3:5]] == ["L0 head 3", "L0 MLP"]


@pytest.mark.parametrize("part", [("head", 1, 2), ("mlp", 0, None)])
def test_noise_pushes_as_far_as_the_lesion(lab, monkeypatch, part):
    pushes = []
    monkeypatch.setattr(lab, "_run", lambda key, layer, hooks: pushes.append(hooks))
    lab.noise(*part)
    (hook,) = pushes[0].values()
    site = "mlp_out" if part[0] == "mlp" else "attn_out"
    clean = lab._written(site, part[1], {})
    change = lab._written(site, part[1], lab.hooks(*part)) - clean
    push = hook(torch.zeros_like(clean))
    assert torch.allclose(push.norm(dim=-1), change.norm(dim=-1), rtol=1e-4)
    assert not push[:, 0].any() and push[:, 1:].any()
    cosine = F.cosine_similarity(push[:, 1:], change[:, 1:], dim=-1)
    assert cosine.mean().abs() < 0.2


def test_the_strongest_dissociation_by_hand():
    damage = torch.tensor([[0.0, 0.1, 0.0], [6.0, 6.0, 6.0], [2.0, 0.0, 1.9], [0.1, 3.0, 0.1]])
    assert lesions.strongest_dissociation(damage) in [(2, 0, 3, 1), (3, 1, 2, 0)]
    i, a, j, b = lesions.strongest_dissociation(damage)
    assert lesson_00.double_dissociation(damage, a, b) == (i, j)


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


def test_the_widget_of_the_lesson_draws_at_every_corner():
    """The very cell of the notebook, on the shipped model."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (source,) = [c.source for c in cells if "PARTS =" in c.source]
    model = load_model()
    shown = {}
    names = {
        "model": model,
        "early": 1,
        "lab": LesionLab(model, make_batch(model, answers=2)),
        "explore": lambda figure, **controls: shown.update(figure=figure, controls=controls),
        "before_after": plots.before_after,
        "MODES": MODES,
        "math": math,
    }
    exec(source, names)
    swept = list(widgets.corners(**shown["controls"]))
    assert len(swept) > 10
    for values in swept:
        assert plots.render(shown["figure"](**values)).startswith(b"\x89PNG")
