"""Steering against arithmetic by hand: what is added, clamped or erased, where, at what cost."""

from functools import partial

import numpy as np
import pytest
import torch
from families import CONFIGS, TEXT, build, make_tokenizer

from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.patching import last_logits
from mi_helpers.probes import project_out
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.steering import (
    Add,
    Clamp,
    Erase,
    Latent,
    Response,
    dose_response,
    random_directions,
    steered,
    text_losses,
)

IDS = torch.tensor([[2, 5, 7, 9, 11, 13, 15], [2, 6, 8, 9, 12, 13, 16]])
SITE = ("resid_post", 1)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(build(request.param), make_tokenizer(), request.param)


@pytest.fixture(scope="module")
def gemma():
    return LanguageModel(build("gemma2"), make_tokenizer(), "gemma2")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coder_of(model, **changes):
    """A coder of 30 latents with biases, scales and rows of any length."""
    coder = SparseCoder(model.d_model, 30, k=6, seed=1, **changes)
    with torch.no_grad():
        coder.W_dec *= 1 + draw(30, 1).abs()
        coder.b_enc += 0.3 * draw(30)
        coder.b_dec += 0.3 * draw(coder.d_out)
        coder.scale_in.fill_(0.7), coder.scale_out.fill_(0.7 if not coder.transcoder else 1.3)
    return coder


def stream_and_logits(model, steering, site=SITE, positions=None, ids=IDS):
    with steered(model, site, steering, positions):
        logits, cache = model.run_with_cache(ids, [site])
    return cache[site], logits


# -- what is done to a vector --------------------------------------------------------------------


def by_hand(model, change, positions):
    """The stream at `SITE` with each chosen position changed, and the logits after it."""
    _, cache = model.run_with_cache(IDS, [SITE])
    stream = cache[SITE].clone()
    for row in range(len(IDS)):
        for at in positions:
            stream[row, at] = change(stream[row, at])
    return stream, model.run_from_layer(stream, 2)


@pytest.mark.parametrize("kind", ["add", "clamp", "erase", "erase to a centre"])
def test_a_vector_by_hand_in_every_family(model, kind):
    v, centre = draw(model.d_model), draw(model.d_model, seed=1)
    steering, change = {
        "add": (Add(v, -2.5), lambda x: x - 2.5 * v),
        "clamp": (Clamp(v, 3.0), lambda x: x + (3.0 - (x @ v) / (v @ v)) * v),
        "erase": (Erase(v.numpy()), lambda x: x - (x @ v) / (v @ v) * v),
        "erase to a centre": (Erase(v, centre), lambda x: x - ((x - centre) @ v) / (v @ v) * v),
    }[kind]
    clean = model.forward(IDS)
    stream, logits = stream_and_logits(model, steering)
    wanted = by_hand(model, change, range(1, 7))
    torch.testing.assert_close(stream, wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, wanted[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[:, 1:], clean[:, 1:], atol=1e-3)
    assert torch.equal(logits[:, 0], clean[:, 0])  # before the first position that is steered
    assert torch.equal(model.forward(IDS), clean) and not model.hooked


def test_erase_is_the_projection_of_probes(gemma):
    v, centre = draw(gemma.d_model), draw(gemma.d_model, seed=1)
    stream, _ = stream_and_logits(gemma, Erase(v, centre), positions=slice(None))
    _, cache = gemma.run_with_cache(IDS, [SITE])
    torch.testing.assert_close(stream, project_out(cache[SITE], v, centre), atol=1e-5, rtol=1e-5)


def test_heads_stand_side_by_side(gemma):
    v = draw(gemma.n_heads * gemma.d_head)
    stream, _ = stream_and_logits(gemma, Add(v), ("z", 2))
    _, cache = gemma.run_with_cache(IDS, [("z", 2)])
    added = (stream - cache["z", 2])[:, 1:]
    torch.testing.assert_close(added, v.view(4, 6).expand_as(added), atol=1e-5, rtol=1e-5)


# -- latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_a_latent_is_clamped_by_what_is_missing_of_its_activation(gemma, activation):
    coder = coder_of(gemma, activation=activation)
    _, cache = gemma.run_with_cache(IDS, [SITE])
    f = coder.encode(cache[SITE])
    number = int((f > 0).float().mean((0, 1)).sub(0.5).abs().argmin())  # fires here, not there
    fires = f[:, 1:, number] > 0
    assert fires.any() and not fires.all()
    stream, _ = stream_and_logits(gemma, Clamp(Latent(coder, number), 4.0))
    wanted = f.clone()
    wanted[:, 1:, number] = 4.0
    unexplained = cache[SITE] - coder.decode(f)
    torch.testing.assert_close(stream, coder.decode(wanted) + unexplained, atol=1e-5, rtol=1e-5)
    off, _ = stream_and_logits(gemma, Clamp(Latent(coder, number), 0.0))
    assert torch.equal(off[:, 1:][~fires], cache[SITE][:, 1:][~fires])  # nothing to take out
    added, _ = stream_and_logits(gemma, Add(Latent(coder, number), 2.0))
    torch.testing.assert_close(
        (added - cache[SITE])[0, 3], 2.0 * coder.W_dec[number] / 0.7, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("reads", [("ln2_normalized", 1), ("mlp_in", 1), ("resid_pre", 1)])
def test_a_transcoders_latent_reads_one_site_and_writes_another(gemma, reads):
    coder = coder_of(gemma, d_out=gemma.d_model, activation="relu")
    into, site = Latent(coder, 3, reads), ("mlp_out", 1)
    read, before = read_sites(gemma, IDS, [reads, site])
    stream, _ = stream_and_logits(gemma, Clamp(into, 2.0), site)
    missing = 2.0 - coder.encode(read)[..., 3]
    wanted = before + missing[..., None] * coder.W_dec[3] / 1.3
    torch.testing.assert_close(stream[:, 1:], wanted[:, 1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="a latent reads before it writes"):
        stream_and_logits(gemma, Clamp(Latent(coder, 3, ("mlp_in", 2)), 2.0), site)


# -- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (None, [range(1, 7), range(1, 7)]),
        (slice(None), [range(7), range(7)]),
        (slice(4, None), [range(4, 7), range(4, 7)]),
        (slice(-2, None), [range(5, 7), range(5, 7)]),
        (3, [[3], [3]]),
        ([0, -1], [[0, 6], [0, 6]]),
        ([[1, 2], [3, -1]], [[1, 2], [3, 6]]),
        (torch.tensor([[1], [2]]), [[1], [2]]),
    ],
)
def test_only_the_chosen_positions_change(gemma, positions, chosen):
    v = draw(gemma.d_model)
    stream, _ = stream_and_logits(gemma, Add(v), positions=positions)
    _, cache = gemma.run_with_cache(IDS, [SITE])
    changed = (stream != cache[SITE]).any(-1)
    wanted = torch.zeros(2, 7, dtype=torch.bool)
    for row, at in enumerate(chosen):
        wanted[row, list(at)] = True
    assert torch.equal(changed, wanted)


def test_negative_positions_count_from_the_end_of_a_padded_text(gemma):
    texts = ["The cat sat", TEXT]
    ids = gemma.tokens(texts, pad=True)
    for positions in (-1, [-1], slice(-1, None), [[-1], [-1]]):
        stream, _ = stream_and_logits(gemma, Add(draw(gemma.d_model)), positions=positions, ids=ids)
        _, cache = gemma.run_with_cache(ids, [SITE])
        changed = (stream != cache[SITE]).any(-1).nonzero().tolist()
        assert changed == [[0, 3], [1, 9]]


def test_a_run_that_begins_in_the_middle_is_steered_too(gemma):
    _, cache = gemma.run_with_cache(IDS, [("resid_pre", 1)])
    with steered(gemma, SITE, Add(draw(gemma.d_model), 2.0), -1):
        whole = gemma.forward(IDS)
        torch.testing.assert_close(gemma.run_from_layer(cache["resid_pre", 1], 1), whole)


def test_a_text_is_written_as_its_steered_runs_say(model):
    """Token by token: each is the likeliest of a whole run, steered by hand."""
    v, ids = draw(model.d_model), model.tokens("The cat")
    n = ids.shape[1]
    for positions in (None, -1, slice(n, None)):
        with steered(model, SITE, Add(v, 3.0), positions):
            written = model.generate("The cat", 5)
        so_far = ids
        for _ in range(5):
            at = {None: slice(1, None), -1: slice(-1, None)}.get(
                positions if not isinstance(positions, slice) else 0, slice(n, None)
            )
            _, cache = model.run_with_cache(so_far, [SITE], stop_at_layer=2)
            stream = cache[SITE].clone()
            stream[:, at] += 3.0 * v
            token = model.run_from_layer(stream, 2)[0, -1].argmax()
            so_far = torch.cat([so_far, token.view(1, 1)], 1)
            if token == model.tokenizer.eos_token_id:
                break
        assert written == model.tokenizer.decode(so_far[0], skip_special_tokens=True)


def test_contexts_nest_and_end_with_an_error(gemma):
    v, clean = draw(gemma.d_model), gemma.forward(IDS)
    with steered(gemma, SITE, Add(v, 1.0)), steered(gemma, SITE, Add(v, 2.0)):
        both = gemma.forward(IDS)
    with steered(gemma, SITE, Add(v, 3.0)):
        torch.testing.assert_close(gemma.forward(IDS), both)
    with pytest.raises(ModelError, match="from 0 to 6"), steered(gemma, SITE, Add(v), 12):
        gemma.forward(IDS)
    assert torch.equal(gemma.forward(IDS), clean) and not gemma.hooked
    assert not gemma.part("embed")._forward_pre_hooks


# -- dose and response -----------------------------------------------------------------------------


def test_a_dose_response_by_hand(gemma):
    v, prompts, texts = draw(gemma.d_model), ["The cat", TEXT], ["The cat sat", TEXT, "Rome is in"]

    def concept(model):
        return last_logits(model, prompts).softmax(-1)[:, 7]

    found = dose_response(gemma, SITE, partial(Add, v), [0.0, 1.0, -30.0], concept, texts)
    assert found.concept.shape == (3, 2) and found.loss.shape == (3, 3)
    torch.testing.assert_close(found.concept[0], found.concept_clean)
    torch.testing.assert_close(found.loss[0], found.loss_clean)
    for row, dose in enumerate([0.0, 1.0, -30.0]):
        for column, text in enumerate(texts):
            with steered(gemma, SITE, Add(v, dose)):
                loss = gemma.loss(text).mean()
            torch.testing.assert_close(found.loss[row, column], loss)
        with steered(gemma, SITE, Add(v, dose)):
            torch.testing.assert_close(found.concept[row], concept(gemma))
    torch.testing.assert_close(found.cost, found.loss.mean(1) - found.loss_clean.mean())
    least = float(found.cost[1:].min()) - 1e-4
    assert found.breaks(float(found.cost.max()) + 1) is None
    if least > 0:
        assert found.breaks(least) == 1.0
    assert torch.equal(text_losses(gemma, texts), found.loss_clean)


def test_the_dose_that_breaks_is_the_least_in_absolute_value():
    doses, loss = torch.tensor([-8.0, -2.0, 1.0, 4.0]), torch.tensor([[5.0], [3.5], [2.1], [3.4]])
    found = Response(doses, doses, loss, doses[0], torch.tensor([2.0]))
    assert (found.breaks(), found.breaks(2.0), found.breaks(9.0)) == (-2.0, -8.0, None)


def test_what_is_written_can_be_the_concept(gemma):
    found = dose_response(
        gemma,
        SITE,
        lambda dose: Clamp(draw(gemma.d_model), dose),
        [5.0],
        lambda model: [model.generate(p, 3).count("cat") for p in ("The", "Rome")],
        IDS,
    )
    assert found.concept.shape == (1, 2) and found.concept_clean.shape == (2,)


# -- the control ----------------------------------------------------------------------------------


def test_random_directions_have_the_directions_length_and_follow_the_seed():
    v = 7 * draw(40)
    found = random_directions(v, 500, seed=3)
    torch.testing.assert_close(found.norm(dim=1), v.norm().expand(500))
    assert torch.equal(found, random_directions(v.numpy(), 500, seed=3))
    assert not torch.equal(found, random_directions(v, 500, seed=4))
    cosines = torch.nn.functional.cosine_similarity(found, v[None])
    assert cosines.abs().max() < 0.6 and abs(float(cosines.mean())) < 0.03
    assert float(found.mean(0).norm() / v.norm()) < 0.1


def test_random_directions_like_activations_stay_in_their_space():
    rows = torch.zeros(50, 6)
    rows[:, :2] = draw(50, 2) * torch.tensor([9.0, 1.0])
    rows += 5  # a mean, which is no direction
    found = random_directions(torch.ones(6), 400, like=rows)
    torch.testing.assert_close(found[:, 2:], torch.zeros(400, 4), atol=1e-5, rtol=0)
    spread = found[:, :2].var(0)
    assert spread[0] > 5 * spread[1]  # lengths are equal, so less than 81 times
    with pytest.raises(ModelError, match="all the same"):
        random_directions(torch.ones(6), 3, like=torch.ones(5, 6))


def test_free_random_directions_have_no_part_along_the_direction():
    """Rows that vary mostly along it: what is drawn like them is nearly that direction."""
    v = 3 * draw(6)
    rows = draw(50, 6, seed=1) + 9 * draw(50, 1, seed=2) * v / v.norm()
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(random_directions(v, 200, like=rows), v[None]).abs().mean() > 0.8
    for like in (rows, None):
        found = random_directions(v, 200, like=like, free=True)
        torch.testing.assert_close(found.norm(dim=1), v.norm().expand(200))
        assert cosine(found, v[None]).abs().max() < 1e-5
        assert float(found.mean(0).norm() / v.norm()) < 0.3  # not all the same
    with pytest.raises(ModelError, match="along the direction alone"):
        random_directions(v, 3, like=draw(50, 1) * v, free=True)


def test_bfloat16_is_steered_in_float32(gemma):
    half = LanguageModel(build("gemma2").bfloat16(), make_tokenizer(), "half")
    v = draw(half.d_model).bfloat16()
    stream, _ = stream_and_logits(half, Add(v, 0.37), positions=slice(None))
    _, cache = half.run_with_cache(IDS, [SITE])
    assert torch.equal(stream, (cache[SITE].float() + 0.37 * v.float()).bfloat16())
    assert np.isfinite(text_losses(half, IDS).numpy()).all()


def test_a_latent_of_normalised_inputs_writes_in_the_size_of_each_input(gemma):
    coder = coder_of(gemma, activation="relu")
    coder.layer_norm = True
    _, cache = gemma.run_with_cache(IDS, [SITE])
    f = coder.encode(cache[SITE])
    wanted = f.clone()
    wanted[:, 1:, 3] = 4.0
    unexplained = cache[SITE] - coder.decode(f, cache[SITE])
    stream, _ = stream_and_logits(gemma, Clamp(Latent(coder, 3), 4.0))
    torch.testing.assert_close(
        stream, coder.decode(wanted, cache[SITE]) + unexplained, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"positions": slice(1.5, None)}, "whole numbers, and a step above 0"),
        ({"positions": slice("a")}, "whole numbers, and a step above 0"),
        ({"positions": slice(None, None, -1)}, "whole numbers, and a step above 0"),
        ({"positions": slice(None, None, 0)}, "whole numbers, and a step above 0"),
        ({"dose": 10**400}, "value is .*expected a finite number"),
        ({"v": lambda v: v * 1e-30}, "expected 1e-15 to 1e15"),
        ({"v": lambda v: v * 1e30}, "expected 1e-15 to 1e15"),
        ({"v": lambda v: v + 1j}, "is a Tensor: expected numbers"),
        ({"v": lambda v: (v + 1j).numpy()}, "is a ndarray: expected numbers"),
    ],
)
def test_what_cannot_be_steered_is_said_before_it_runs(gemma, given, said):
    v = given.get("v", lambda v: v)(draw(gemma.d_model))
    steering, positions = Clamp(v, given.get("dose", 1.0)), given.get("positions")
    with pytest.raises(ModelError, match=said), steered(gemma, SITE, steering, positions):
        pass
    if "dose" in given:
        with pytest.raises(ModelError, match="centre"), steered(gemma, SITE, Erase(v, 10**400)):
            pass


def test_a_site_may_be_a_list_and_what_a_latent_reads_is_a_site(gemma):
    v = draw(gemma.d_model)
    with steered(gemma, list(SITE), Add(v)):
        found = gemma.forward(IDS)
    with steered(gemma, SITE, Add(v)):
        torch.testing.assert_close(found, gemma.forward(IDS))
    with pytest.raises(ModelError, match="reads is 'mlp_in'"):
        Latent(coder_of(gemma), 1, "mlp_in")


def test_a_concept_has_one_shape_at_every_dose(gemma):
    calls = []

    def grows(_):
        calls.append(1.0)
        return calls

    with pytest.raises(ModelError, match="shape \\(2,\\) at dose 1, and \\(1,\\) without"):
        dose_response(gemma, SITE, partial(Add, draw(gemma.d_model)), [1.0], grows, IDS)


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ModelError, match="seed is"):
        random_directions(torch.ones(3), 2, seed=2**70)
