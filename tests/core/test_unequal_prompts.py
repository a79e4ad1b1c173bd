"""Prompts of unequal length: a batch, however it is padded, gives what each prompt gives alone."""

import pytest
import torch
from families import CONFIGS, build, make_tokenizer
from rounding import SHARE
from transformers import BatchEncoding

from mi_helpers.ablation import Gaussian, Mean, Zero
from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.gradients import attribution_patch
from mi_helpers.heads import head_scores
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.patching import LogitDiff, activation_patch, last_logits, normalised_logit_diff
from mi_helpers.paths import composition_effect, path_patch, path_patch_map
from mi_helpers.sweeps import Sweep, pair

FAMILIES = ["gemma2", "gpt2", "llama", "gpt_neox"]
CLEAN = [[2, 5, 7, 9, 11, 13], [2, 6, 8, 9], [2, 10, 8, 7, 12, 5, 17, 16]]
CORRUPTED = [[2, 5, 21, 9, 23, 13], [2, 6, 4, 9], [2, 10, 8, 6, 12, 18, 17, 22]]
OTHER_LENGTHS = [[2, 5, 21, 9, 13], [2, 6, 4, 4, 9], [2, 10, 12, 18, 17, 22]]
ANSWERS, WRONG = torch.tensor([30, 31, 32]), torch.tensor([33, 34, 35])
METRIC = LogitDiff(ANSWERS, WRONG)


@pytest.fixture(scope="module")
def loaded():
    return {family: LanguageModel(build(family), make_tokenizer(), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request, loaded):
    return loaded[request.param]


@pytest.fixture
def gemma(loaded):
    return loaded["gemma2"]


def padded(rows, side, token=0):
    longest = max(map(len, rows))
    fill = [[token] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)]
    )


def masked(rows, side, token=1):
    """What a Hugging Face tokenizer returns."""
    mask = padded([[1] * len(row) for row in rows], side)
    return BatchEncoding({"input_ids": padded(rows, side, token), "attention_mask": mask})


WAYS = {
    "rows": lambda rows: rows,
    "tensors": lambda rows: [torch.tensor(row) for row in rows],
    "padded right": lambda rows: padded(rows, "right"),
    "padded left": lambda rows: padded(rows, "left"),
    "masked right": lambda rows: masked(rows, "right"),
    "masked left": lambda rows: masked(rows, "left"),
}


def bound(model, *found):
    """What rounding may change: a share of the logits' size, over which the metric subtracts."""
    size = max(float(model(row).abs().max()) for row in CLEAN + CORRUPTED)
    return 2 * SHARE * max([size, *(float(x.abs().max()) for x in found)])


def alone(run, i, clean=CLEAN, corrupted=CORRUPTED):
    """The result for one prompt by itself."""
    return run(clean[i : i + 1], corrupted[i : i + 1], LogitDiff(ANSWERS[[i]], WRONG[[i]]).each, i)


AT = [[2, -1], [2, -2], [3, 5]]


def sweeps(model):
    """Every function that takes a pair, as a function of it, the metric, and the prompts meant."""

    def positions(i):
        return Sweep("positions", positions=AT if i is None else AT[i : i + 1])

    def both(i):
        return Sweep("heads x positions", positions=AT if i is None else AT[i : i + 1])

    steps = {"steps": 3, "over": "layers"}
    return {
        "stream at positions": lambda a, b, m, i: activation_patch(
            model, a, b, "resid_pre", m, over=positions(i)
        ),
        "heads": lambda a, b, m, i: activation_patch(model, a, b, "z", m, "noise"),
        "patterns": lambda a, b, m, i: activation_patch(model, a, b, "pattern", m),
        "values at positions": lambda a, b, m, i: activation_patch(
            model, a, b, "v", m, over=both(i)
        ),
        "the last": lambda a, b, m, i: activation_patch(
            model, a, b, "resid_post", m, over=Sweep("layers", positions=-1)
        ),
        "zeros": lambda a, b, m, i: activation_patch(
            model, a, None, "mlp_out", m, "noise", Zero(), "layers"
        ),
        "gradients": lambda a, b, m, i: attribution_patch(model, a, b, "z", m),
        "gradients at positions": lambda a, b, m, i: attribution_patch(
            model, a, b, "k", m, over=both(i)
        ),
        "integrated": lambda a, b, m, i: attribution_patch(model, a, b, "mlp_out", m, **steps),
        "paths": lambda a, b, m, i: path_patch_map(model, a, b, [("v", 2, 1), "logits"], m),
        "a path": lambda a, b, m, i: path_patch(model, a, b, [(0, 1)], [("q", 2, 3)], m),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_each_prompt_gives_alone(loaded, family):
    """Every function on rows of ids; the other ways of giving them are below."""
    model = loaded[family]
    for name, run in sweeps(model).items():
        found = run(CLEAN, CORRUPTED, METRIC.each, None)
        for i in range(3):
            expected = alone(run, i)[..., 0]
            assert found[..., i].shape == expected.shape
            gap = (found[..., i] - expected).abs().max()
            assert gap <= bound(model, expected), (name, i)
        assert (found[..., 0] - found[..., 1]).abs().max() > 1e-3, name


@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_matter_how_the_batch_is_padded(model, way):
    """The rows that are run are the same, so the numbers are, to the last bit."""
    given = [WAYS[way](rows) for rows in (CLEAN, CORRUPTED)]
    tried = sweeps(model) if way == "padded left" else ["heads", "gradients", "a path"]
    for name in tried:
        run = sweeps(model)[name]
        assert torch.equal(run(*given, METRIC, None), run(CLEAN, CORRUPTED, METRIC, None)), name


def test_the_metric_is_that_of_each_prompt_alone(model):
    logits = last_logits(model, padded(CLEAN, "right"))
    for i, row in enumerate(CLEAN):
        assert (logits[i] - model(row)[0, -1]).abs().max() <= bound(model)
    args = padded(CLEAN, "left"), padded(CORRUPTED, "left"), ANSWERS, WRONG
    metric = normalised_logit_diff(model, *args)
    assert float(metric(last_logits(model, CLEAN))) == pytest.approx(1, abs=1e-4)
    assert float(metric(last_logits(model, CORRUPTED))) == pytest.approx(0, abs=1e-4)


@torch.no_grad()
def test_a_pair_of_unequal_prompts_patches_the_positions_that_are_given(model):
    """Against hooks alone: the other prompt's activation at its own position."""
    to, of = [[3, -1], [1, 2], [4, 5]], [[2, -1], [1, 3], [4, 2]]
    sweep = Sweep("positions", positions=of, source=to)
    found = activation_patch(model, CLEAN, OTHER_LENGTHS, "mlp_out", METRIC.each, over=sweep)
    guess = attribution_patch(model, CLEAN, OTHER_LENGTHS, "mlp_out", METRIC.each, over=sweep)
    assert found.shape == guess.shape == (4, 2, 3)
    for i in range(3):
        _, there = model.run_with_cache(CLEAN[i], "mlp_out")
        for layer in range(4):
            for j in range(2):

                def put(x, layer=layer, i=i, j=j, there=there):
                    x[:, of[i][j]] = there["mlp_out", layer][:, to[i][j]]
                    return x

                with model.hooks({("mlp_out", layer): put}):
                    logits = model(OTHER_LENGTHS[i])[0, -1]
                expected = logits[ANSWERS[i]] - logits[WRONG[i]]
                assert abs(found[layer, j, i] - expected) <= bound(model, found)


def test_negative_positions_count_from_the_end_of_each_prompt(gemma):
    args = gemma, CLEAN, OTHER_LENGTHS, "resid_post", METRIC.each
    found = activation_patch(*args, over=Sweep("positions", positions=-1))
    last = torch.stack([gemma(row)[0, -1] for row in CLEAN])
    assert (found[-1, 0] - METRIC.each(last)).abs().max() <= bound(gemma, found)
    each = [[len(row) - 1] for row in OTHER_LENGTHS], [[len(row) - 1] for row in CLEAN]
    same = activation_patch(*args, over=Sweep("positions", positions=each[0], source=each[1]))
    assert torch.equal(found, same)


def test_a_right_padded_batch_is_no_longer_read_at_its_padding(gemma):
    found = activation_patch(gemma, padded(CLEAN, "right"), padded(CORRUPTED, "right"), "z", METRIC)
    plain = activation_patch(gemma, CLEAN, CORRUPTED, "z", METRIC)
    assert torch.equal(found, plain)


# ------------------------------------------------------------------ integrated gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "z", "v", "pattern"])
def test_integrated_gradients_of_a_layer_sum_to_its_patch(loaded, family, site):
    """The midpoint rule's error falls with steps²: four times as many leave a sixteenth, or an
    eighth where the first are too few to follow the line's bends."""
    model = loaded[family]
    args = model, CLEAN[:1], CORRUPTED[:1], site, METRIC_OF_ONE
    true = activation_patch(*args, over="layers")
    gaps = [
        (attribution_patch(*args, over="layers", steps=n) - true).abs().max() for n in (1, 16, 64)
    ]
    moved = (true - true.mean()).abs().max()
    assert gaps[2] <= max(0.05 * moved, 20 * bound(model, true)), (gaps, moved)
    assert gaps[2] <= max(gaps[1] / 8, 20 * bound(model, true))


METRIC_OF_ONE = LogitDiff(ANSWERS[:1], WRONG[:1])


def test_integrated_parts_sum_to_the_layer(gemma):
    args = gemma, CLEAN, CORRUPTED, ["z", "mlp_out"], METRIC
    base = attribution_patch(*args, over="layers", steps=4)
    finest = {"z": "heads x positions", "mlp_out": "positions"}
    for site, over in finest.items():
        one = (gemma, CLEAN[:1], CORRUPTED[:1], site, METRIC_OF_ONE)
        parts = attribution_patch(*one, over=over, steps=4)
        value = METRIC_OF_ONE(last_logits(gemma, CORRUPTED[:1]))
        whole = attribution_patch(*one, over="layers", steps=4)
        assert torch.allclose((parts - value).flatten(1).sum(1) + value, whole, atol=1e-5)
    assert base["z"].shape == base["mlp_out"].shape == (4,)


# ------------------------------------------------------------------- what cannot be served


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": "positions"}, "positions do not line up.* give a position for each"),
        ({"over": Sweep("positions", positions=[[1], [2]])}, "positions are for 2 prompts.* 3"),
        ({"over": Sweep("positions", positions=[[1], [2], [8]])}, "positions are .8.*from 0 to 7"),
        ({"over": Sweep("positions", positions=[4])}, "positions are .4.*from 0 to 3"),
        ({"over": Sweep("positions", positions=[[1, 2], [2], [3]])}, "several lengths"),
        ({"over": Sweep("positions", source=[[1]])}, "give positions, too"),
        ({"over": Sweep("layers", positions=[1, 1], source=[0, 2])}, "no position twice"),
        ({"corrupted": OTHER_LENGTHS}, "Prompt 0 has 5 tokens .* and 6 in the other"),
        ({"corrupted": OTHER_LENGTHS, "site": "pattern", "over": Sweep(positions=-1)}, "A pattern"),
        ({"corrupted": Gaussian([1])}, "noise is drawn for prompts of one"),
        ({"corrupted": None, "mode": "noise", "ablation": Mean(CLEAN[:1])}, "as many tokens"),
        ({"clean": padded(CLEAN, "right").masked_fill(padded(CLEAN, "right") == 9, 0)}, "between"),
        ({"clean": {"input_ids": CLEAN[:1]}}, "no attention_mask"),
    ],
)
def test_what_cannot_be_served_is_refused(gemma, changes, message):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "site": "z", "metric": METRIC}
    if "over" in changes and changes["over"] == "positions":
        given["site"] = "mlp_out"
    with pytest.raises(ModelError, match=message):
        activation_patch(gemma, **(given | changes))


def test_padding_that_may_be_text_is_refused(loaded):
    """Where the end of text stands for padding, only a mask or rows can tell."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = LanguageModel(loaded["llama"].hf, tokenizer, "llama")
    for side in ("right", "left"):
        batches = [padded(rows, side, token=1) for rows in (CLEAN, CORRUPTED)]
        with pytest.raises(ModelError, match="which may be text: give rows without padding, or"):
            activation_patch(model, *batches, "z", METRIC)
    found = activation_patch(model, *(masked(x, "right") for x in (CLEAN, CORRUPTED)), "z", METRIC)
    assert torch.equal(found, activation_patch(model, CLEAN, CORRUPTED, "z", METRIC))


def test_a_padding_token_beyond_the_vocabulary():
    """Added to the tokenizer, for which the model has no row."""
    tokenizer = make_tokenizer()
    model = LanguageModel(build("llama", vocab_size=len(tokenizer)), tokenizer, "llama")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.d_vocab
    metric = LogitDiff(torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]))
    batches = [padded(rows, "right", model.d_vocab) for rows in (CLEAN, CORRUPTED)]
    found = activation_patch(model, *batches, "z", metric)
    assert torch.equal(found, activation_patch(model, CLEAN, CORRUPTED, "z", metric))
    assert model.in_text.sum() == model.d_vocab - 1  # <unk> stands in no text
    assert model.tokens(["The cat", "Paris"], pad=True).shape == (2, 3)


def test_path_patching_needs_prompts_that_line_up(gemma):
    with pytest.raises(ModelError, match="a path is patched at every position"):
        path_patch(gemma, CLEAN, OTHER_LENGTHS, [(0, 0)], "logits", METRIC)


def test_a_pair_is_of_one_length(gemma):
    with pytest.raises(ModelError, match="4 to 8 tokens: choose prompts of one length"):
        pair(gemma, CLEAN, CORRUPTED)


def test_other_functions_count_from_the_end_of_each_prompt(gemma):
    split = direct_logit_attribution(gemma, padded(CLEAN, "left"), ANSWERS.tolist())
    for i, row in enumerate(CLEAN):
        one = direct_logit_attribution(gemma, row, int(ANSWERS[i]))
        assert torch.allclose(split.terms[i], one.terms[0], atol=1e-5)
    with pytest.raises(ModelError, match="row 0 has padding"):
        gemma.run_with_cache(padded(CLEAN, "right"), "resid_post", pos=-1)
    with pytest.raises(ModelError, match="without padding"):
        head_scores(gemma, padded(CLEAN, "right"))
    args = [(1, 2)], (padded(CLEAN, "right"), padded(CORRUPTED, "right"), ANSWERS)
    rows = composition_effect(gemma, [(1, 2)], (CLEAN, CORRUPTED, ANSWERS))
    assert torch.equal(composition_effect(gemma, *args), rows)
    assert set(FAMILIES) <= set(CONFIGS)
