"""The sparse training step: exact selection, exact gradients, the same optimiser, resumable."""

import copy
import threading
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from mi_helpers.loading import load_model
from mi_helpers.saes import products as sparse_products
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.products import (
    Products,
    TopK,
    by_latent,
    dots,
    largest,
    quickest,
    top_k,
    weighted_sums,
)
from mi_helpers.saes.step import SparseStep, StepConfig
from mi_helpers.tinyworld.world import World

PRODUCTS = {kind: Products((kind,), "highest") for kind in ("int8", "bfloat16", "float32")}
LOW = PRODUCTS["bfloat16"]
EPSILON = torch.finfo(torch.float32).eps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# ---------------------------------------------------------------- sums over pairs

PAIRS = torch.randint(0, 9, (7, 3), generator=generator())
TABLE, WEIGHTS, X = randn(9, 5), randn(7, 3, seed=1), randn(7, 5, seed=2)


@pytest.fixture(params=["kernels", "large table", "plain"])
def kernels(request, monkeypatch):
    """The CPU's kernels, for tables small and large, and what other devices use in their place."""
    if request.param == "large table":
        monkeypatch.setattr(sparse_products, "_CACHE", 0)
    if request.param == "plain":
        monkeypatch.setattr(sparse_products, "_FAST", {})
    return request.param


def test_weighted_sums_and_dots_are_sparse_products(kernels):
    dense = torch.zeros(7, 9).index_put_(
        (torch.arange(7)[:, None].expand(7, 3), PAIRS), WEIGHTS, accumulate=True
    )
    assert torch.allclose(weighted_sums(TABLE, PAIRS, WEIGHTS), dense @ TABLE, atol=1e-6)
    assert torch.allclose(dots(X, TABLE, PAIRS), (X @ TABLE.T).gather(1, PAIRS), atol=1e-6)


def test_pairs_by_latent_give_the_transposed_product(kernels):
    order, offsets = by_latent(PAIRS, 9)
    dense = torch.zeros(7, 9).index_put_(
        (torch.arange(7)[:, None].expand(7, 3), PAIRS), WEIGHTS, accumulate=True
    )
    sums = weighted_sums(X, order // 3, WEIGHTS.flatten()[order], offsets)
    assert torch.allclose(sums, dense.T @ X, atol=1e-6)


@pytest.mark.parametrize("d_latent", [40, 300_000])
def test_pairs_are_sorted_by_latent_and_then_by_row(d_latent, kernels):
    """Beyond 65,536 latents the numbers are sorted in two halves of 16 bits."""
    latents = torch.randint(0, d_latent, (500, 8), generator=generator())
    order, offsets = by_latent(latents, d_latent)
    expected = torch.sort(latents.flatten(), stable=True)
    assert torch.equal(order, expected.indices)
    assert torch.equal(offsets.diff(), torch.bincount(latents.flatten(), minlength=d_latent))


# ---------------------------------------------------------------- the exact top k


def distribution(name, rows=600, d=96, d_latent=1200):
    """Inputs and latents: five ways in which selecting in bfloat16 could go wrong."""
    x, W = randn(rows, d), torch.nn.functional.normalize(randn(d_latent, d, seed=1), dim=1)
    if name == "heavy tails":
        x = x.pow(3)
    if name == "outlier dimension":
        x[:, 3] = x[:, 3] * 50 + 300
    if name == "low rank":
        x = x[:, :6] @ randn(6, d, seed=2)
    if name == "twins":  # every latent has several that differ by less than bfloat16 can tell
        W = W[:30].repeat(40, 1) + 1e-4 * W
    return x, W, 0.1 * randn(d_latent, seed=3) * (name != "twins")


DISTRIBUTIONS = ("normal", "heavy tails", "outlier dimension", "low rank", "twins")


def best(x, W, bias, k):
    return (x.double() @ W.double().T + bias.double()).topk(k)


def rounding(x, W, bias):
    """How far float32's x @ W.T + bias may be off, by row, whatever the order of its sums.

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, equation 3.5.
    """
    products = (x.shape[1] + 2) * x.norm(dim=1) * W.norm(dim=1).max()
    return EPSILON / 2 * (products + 2 * bias.abs().max())


def told_apart(x, W, bias, k):
    """The rows whose k-th value is beyond the next by more than rounding: elsewhere it chooses."""
    values = best(x, W, bias, k + 1).values
    return values[:, -2] - values[:, -1] > 2 * rounding(x, W, bias)


def misses(x, W, bias, k):
    """The share of rows whose true top k are not all among the k + 8 candidates of bfloat16."""
    n = k + sparse_products.EXTRA["bfloat16"]
    _, candidates = TopK(W, LOW)._candidates(x, bias, n)
    found = (best(x, W, bias, k).indices[:, :, None] == candidates[:, None]).any(2).all(1)
    return 1 - found.float().mean().item()


@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_top_k_are_those_of_float32(name, products, kernels):
    x, W, bias = distribution(name)
    indices, values = top_k(x, W, bias, 16, products)
    expected = best(x, W, bias, 16)
    assert ((values - expected.values).abs().amax(1) <= rounding(x, W, bias)).all()
    same = (indices.sort().values == expected.indices.sort().values).all(1)
    assert same[told_apart(x, W, bias, 16)].all()  # elsewhere either is right
    assert same.float().mean() > (0.95 if name == "twins" else 0.995)


def test_candidates_alone_would_not_do():
    """The test above has something to find: without the second look, twins are mixed up."""
    assert misses(*distribution("twins"), 16) > 0.5


SELECTS = {"numpy": lambda scores: True, "torch": lambda scores: False}


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("length", [30, 1152, 1153, 4096, 18432])
def test_the_largest_of_folded_rows_are_the_largest(length, select, monkeypatch):
    monkeypatch.setattr(sparse_products, "_numpy_selects", SELECTS[select])
    scores = randn(50, length)
    scores[:, ::7] = scores[:, 3:4]  # ties
    values, indices = largest(scores, 24)
    assert torch.equal(values.sort().values, scores.topk(24).values.sort().values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(row.unique()) == 24 for row in indices)


@pytest.mark.parametrize("select", SELECTS)
def test_what_is_no_number_is_largest(select, monkeypatch):
    """So a dictionary that has diverged is found out, and not passed over."""
    monkeypatch.setattr(sparse_products, "_numpy_selects", SELECTS[select])
    x, W, bias = distribution("normal")
    W[5, 3] = torch.nan
    indices, values = TopK(W, PRODUCTS["float32"])(x, bias, 16)
    assert (indices[:, 0] == 5).all() and values[:, 0].isnan().all()
    assert (values[:, 1:-1] >= values[:, 2:]).all()


def test_steps_are_the_same_whoever_selects(monkeypatch):
    x, found = randn(300, 24), {}
    for name, select in SELECTS.items():
        monkeypatch.setattr(sparse_products, "_numpy_selects", select)
        coder = SparseCoder(24, 256, k=6, seed=0).initialise(x)
        step = SparseStep(coder, lr=1e-2, products=Products(("int8", "float32"), "highest"))
        for _ in range(4):
            step(x)
        found[name] = coder.state_dict()
    assert all(torch.equal(found["numpy"][name], found["torch"][name]) for name in found["torch"])


def test_a_kind_of_product_that_is_too_rough_is_given_up():
    """Twins make nearly every row doubtful: after three batches float32 selects, and is right."""
    x, W, bias = distribution("twins")
    select = TopK(W, Products(("int8", "bfloat16", "float32"), "highest"))
    for kind in ["int8"] * 3 + ["bfloat16"] * 3 + ["float32"]:
        assert select.kinds[0] == kind
        assert torch.equal(select(x, bias, 16)[1], top_k(x, W, bias, 16, PRODUCTS["float32"])[1])
    x, W, bias = distribution("normal")
    select = TopK(W, Products(("bfloat16", "float32"), "highest"))  # int8 may overflow
    for _ in range(5):
        select(x, bias, 16)
    assert select.kinds[0] == "bfloat16"


def test_what_is_quickest_follows_from_the_processor_and_no_clock(monkeypatch):
    """A run with a seed has the same bits each time, however busy the machine is."""
    products = quickest(torch.device("cpu"))
    assert products.kinds[-1] == "float32" and products.float32 in ("highest", "medium")
    assert set(products.kinds) <= {"int8", "bfloat16", "float32"}
    monkeypatch.setattr(time, "perf_counter", None)
    assert quickest.__wrapped__(torch.device("cpu")) == products
    monkeypatch.setattr(
        torch, "_int_mm", lambda x, y: (x.float() @ y.float()).clamp(max=20_000).int()
    )
    assert "int8" not in quickest.__wrapped__(torch.device("cpu")).kinds
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Another"})
    assert quickest.__wrapped__(torch.device("cpu")).kinds == ("float32",)
    assert quickest(torch.device("cuda")) == Products(("bfloat16", "float32"), "highest")


@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
def test_rows_of_zeros_and_of_any_size_are_read(products):
    x, W, bias = distribution("normal")
    x = x * torch.logspace(-12, 12, len(x))[:, None]
    x[5], W[7] = 0, 0
    indices, values = top_k(x, W, bias, 16, products)
    expected = best(x, W, bias, 16)
    assert ((values - expected.values).abs().amax(1) <= rounding(x, W, bias)).all()


def test_a_dictionary_hardly_larger_than_k():
    x, W, bias = distribution("normal", d_latent=18)
    indices, _ = top_k(x, W, bias, 16, LOW)
    assert torch.equal(indices, best(x, W, bias, 16).indices)


def test_the_choice_of_products_changes_no_result_and_no_setting():
    torch.set_float32_matmul_precision("high")
    try:
        x, W, bias = distribution("normal")
        measured = top_k(x, W, bias, 16)
        for kinds in ("int8", "bfloat16"), ("bfloat16",), ("float32",):
            products = Products(kinds, "medium")
            for got, expected in zip(top_k(x, W, bias, 16, products), measured, strict=True):
                assert torch.equal(got, expected)
        step = SparseStep(SparseCoder(96, 200, k=4), products=Products(("bfloat16",), "medium"))
        with pytest.raises(ValueError, match="NaN"):
            step(torch.full((8, 96), torch.nan))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def activations():
    """tiny-gemma's stream after its middle layer on TinyWorld's text, BOS and all."""
    model, world = load_model(), World()
    texts = [document.text for document in islice(world.documents(seed=5), 40)]
    layer = model.n_layers // 2 - 1
    rows = []
    with torch.no_grad():
        for text in texts:
            ids = model.tokenizer.encode(text, add_special_tokens=False)[: model.n_ctx - 1]
            ids = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
            _, cache = model.run_with_cache(ids, ("resid_post", layer), stop_at_layer=layer + 1)
            rows.append(cache["resid_post", layer][0].float())
    return torch.cat(rows)


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_the_top_k_on_real_activations(activations, trained):
    """All rows agree with float64, outlying BOS rows too, before training and in its course."""
    coder = SparseCoder(activations.shape[1], 1152, k=16).initialise(activations)
    if trained:
        step = SparseStep(coder, lr=4e-3)
        for seed in range(25):
            step(activations[torch.randint(len(activations), (512,), generator=generator(seed))])
    with torch.no_grad():
        u, rows, bias = coder.read(activations), coder.W_enc.T, coder.b_enc
        indices, _ = top_k(u, rows, bias, 16, LOW)
        expected, sure = best(u, rows, bias, 16).indices, told_apart(u, rows, bias, 16)
    assert sure.sum() > 1000
    assert (indices.sort().values == expected.sort().values)[sure].all()


# ---------------------------------------------------------------- exact gradients

CODERS = {
    "SAE": {},
    "transcoder": {"d_out": 40},
    "transcoder of equal sizes": {"d_out": 48},
    "skip transcoder": {"d_out": 40, "skip": True},
    "Matryoshka": {"prefixes": (50, 130, 520)},
    "Matryoshka skip transcoder": {"d_out": 40, "skip": True, "prefixes": (100,)},
}


def make(kind="SAE", rows=700, seed=0, **options):
    """A coder with random parameters, inputs, and targets where it is a transcoder."""
    options = CODERS[kind] | options
    prefixes = options.pop("prefixes", None)
    x = 3 * randn(rows, 48, seed=seed) + 1
    target = None
    if "d_out" in options:
        target = torch.tanh(x @ randn(48, options["d_out"], seed=9)) * 5 - 2
    coder = SparseCoder(48, 600, k=8, **options).initialise(x, target)
    if prefixes:
        coder.nested_(prefixes)
    for number, parameter in enumerate(coder.parameters()):
        parameter.data += 0.03 * randn(*parameter.shape, seed=number)
    coder.b_enc.data[::7] -= 5  # these never fire
    return coder, x, target


@torch.no_grad()
def decided(step, x):
    """The rows of x in which rounding does not choose the latents, nor AuxK's dead ones."""
    u, W, bias = step.coder.read(x), step.coder.W_enc.T, step.coder.b_enc
    sure = told_apart(u, W, bias, step.coder.k)
    dead, aux_k = step.dead, step.config.aux_k
    if dead.sum() > aux_k:
        sure &= told_apart(u, W[dead], bias[dead], aux_k)
    return sure.nonzero().flatten()


def at(target, rows):
    """The rows of the targets, where there are any."""
    return None if target is None else target[rows]


def rounded(gradient, rows):
    """How far a gradient may be off: it is a sum over rows, which errs as their square root.

    (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis.)
    """
    return rows**0.5 * EPSILON * float(gradient.abs().max())


def loss_by_autograd(coder, x, target, step):
    """The loss as the papers write it, on dense float64 matrices."""
    coder, x = copy.deepcopy(coder).double(), x.double()
    target = (x if target is None else target.double()) * coder.scale_out
    pre = coder.encode_pre_act(x)
    top = pre.topk(coder.k, dim=1)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    error = f @ coder.W_dec + coder.b_dec - target
    if coder.skip:
        error = error + x * coder.scale_in @ coder.W_skip.T
    loss = error.pow(2).sum(1).mean()
    for width in coder.prefixes[:-1]:  # without the latents after them
        inner = error - f[:, width:] @ coder.W_dec[width:]
        loss = loss + inner.pow(2).sum(1).mean()
    dead = step.dead
    if dead.any():
        n = min(step.config.aux_k, int(dead.sum()))
        top = pre.masked_fill(~dead, -torch.inf).topk(n, dim=1)
        g = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        share = min(1, int(dead.sum()) / step.config.aux_k)
        aux = (g @ coder.W_dec + error.detach()).pow(2).sum(1).mean()
        loss = loss + step.config.aux_coefficient * share * aux
    parameters = dict(coder.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("dead", [0, 10, 100], ids=["alive", "few dead", "many dead"])
@pytest.mark.parametrize("kind", CODERS)
def test_gradients_are_those_of_dense_autograd(kind, dead, products, kernels):
    """To float32's rounding of a sum over the rows."""
    coder, x, target = make(kind)
    step = SparseStep(coder, StepConfig(aux_k=32), products=products)
    step.tokens_since_fired[: 6 * dead : 6] = 2_000_000
    rows = decided(step, x)
    x, target = x[rows], at(target, rows)
    loss, expected = loss_by_autograd(coder, x, target, step)
    found = step.gradients(x, target)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        off = (gradient - expected[name]).abs().max()
        assert off < rounded(expected[name], len(x)), name
    metrics = step(x, target)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert (metrics["aux_loss"] > 0) == (dead > 0)


EPS = 1e-2  # AdamW's, about as large as the gradients: see `moved`


def moved(gradient, rows, lr):
    """How far apart two steps may move a weight of size 1 whose gradients are both `rounded`.

    AdamW moves it by lr · mean / (root + EPS). Neither the gradients' mean nor the root of their
    mean square is further off than they are, and over few steps the mean is hardly above the root.
    So rounding counts lr / EPS times, for mean and root, in either step; and the weight is rounded.
    With EPS near 0, a gradient that is all rounding would move its weight by all of lr.
    """
    return 4 * lr / EPS * rounded(gradient, rows) + 2 * EPSILON


@pytest.mark.parametrize("kind", CODERS)
def test_the_step_by_pairs_is_the_dense_step(kind):
    """From the same state, the same weights and metrics after each step, dead latents and all."""
    coder, x, target = make(kind)
    config = StepConfig(dead_after=1000, aux_k=32, eps=EPS)
    sparse = SparseStep(coder, config, lr=3e-3)
    dense = SparseStep(copy.deepcopy(coder), config, lr=3e-3, dense=True)
    for _ in range(4):
        dense.load_state_dict(copy.deepcopy(sparse.state_dict()))
        rows = decided(sparse, x)
        batch = x[rows], at(target, rows)
        gradients = dense.gradients(*batch)
        a, b = sparse(*batch), dense(*batch)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        assert torch.equal(sparse.tokens_since_fired, dense.tokens_since_fired)
        for name, parameter in sparse.coder.named_parameters():
            off = (parameter - dict(dense.coder.named_parameters())[name]).abs().max()
            assert off < moved(gradients[name], len(rows), 3e-3), name
    assert a["dead"] > 0


# ---------------------------------------------------------------- the optimiser


def test_the_update_is_adamws_on_the_projected_gradient():
    coder, x, _ = make()
    config = StepConfig(betas=(0.8, 0.98), eps=EPS, weight_decay=0.1)
    step = SparseStep(coder, config, lr=2e-3)
    twin = copy.deepcopy(coder)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    matrices = [{"params": [twin.W_enc, twin.W_dec], "weight_decay": 0.1}]
    vectors = [{"params": [twin.b_enc, twin.b_dec], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(matrices + vectors, lr=2e-3, betas=(0.8, 0.98), eps=EPS)
    for _ in range(3):
        gradients = step.gradients(x)
        for name in names:
            getattr(twin, name).grad = gradients[name].contiguous()
        with torch.no_grad():
            row = twin.W_dec
            row.grad -= (row.grad * row).sum(1, keepdim=True) * row
            adamw.step()
            row /= row.norm(dim=1, keepdim=True)
        step(x)
        for name in names:
            assert torch.allclose(getattr(coder, name), getattr(twin, name), atol=1e-6), name


def test_decoder_rows_keep_unit_norm_and_only_turn():
    """All the data lie along the one row, so its whole gradient does, and nothing is left of it."""
    coder = SparseCoder(4, 2, k=1)
    coder.W_dec.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    coder.W_enc.data = 0.3 * coder.W_dec.data.T
    before = coder.W_dec.clone()
    step = SparseStep(coder, lr=0.1)
    step(torch.tensor([[2.0, 0, 0, 0]]))
    assert torch.allclose(coder.W_dec[0], before[0], atol=1e-7)
    coder, x, _ = make()
    step = SparseStep(coder, lr=0.05)
    before = coder.W_dec.clone()
    step(x)
    assert torch.allclose(coder.W_dec.norm(dim=1), torch.ones(600), atol=1e-6)
    assert (coder.W_dec - before).abs().max() > 0.01


def test_the_rate_is_read_at_every_step():
    coder, x, _ = make()
    step = SparseStep(coder, lr=0.0)
    before = copy.deepcopy(coder.state_dict())
    step(x)
    assert torch.allclose(coder.b_enc, before["b_enc"], atol=0)
    step.lr = 1e-2
    step(x)
    assert (coder.b_enc - before["b_enc"]).abs().max() > 1e-3


def test_weights_changed_from_outside_are_seen():
    """The bfloat16 copy of W_enc follows, so a latent that was wiped out is not selected."""
    coder, x, _ = make()
    step = SparseStep(coder, products=LOW)
    step(x)
    with torch.no_grad():
        coder.W_enc[:, :300] = 0
        coder.b_enc[:300] = -100
    step(x)
    assert (step.tokens_since_fired[:300] >= len(x)).all()


# ---------------------------------------------------------------- training


def world_of(n, d=32, true=80, seed=0):
    """Sparse sums of known directions: rows (n, d) and the directions (true, d)."""
    directions = torch.nn.functional.normalize(randn(true, d, seed=99), dim=1)
    chosen = torch.rand(n, true, generator=generator(seed)) < 0.04
    amounts = chosen * (0.5 + torch.rand(n, true, generator=generator(seed + 1)))
    return amounts @ directions, directions


def trained(activation="topk", steps=120, lr=2e-2, seed=0, threshold=None, **options):
    names = ("sparsity", "bandwidth")
    config = StepConfig(**{name: options.pop(name) for name in names if name in options})
    k = {"k": 4} if activation in ("topk", "batchtopk") else {}
    x, _ = world_of(2048)
    coder = SparseCoder(32, 160, activation=activation, seed=seed, **k, **options).initialise(x)
    if threshold is not None:
        coder.threshold.data.fill_(threshold)
    step = SparseStep(coder, config)
    for i in range(steps):
        step.lr = lr * min(1, (i + 1) / 10, (steps - i) / (steps / 2))
        metrics = step(world_of(512, seed=100 + i)[0])
    return coder, step, metrics


def test_a_topk_sae_finds_the_directions_that_the_data_are_made_of():
    coder, _, metrics = trained()
    x, directions = world_of(2000, seed=7)
    assert explained_variance(x, coder(x)) > 0.8
    assert (directions @ coder.W_dec.T).max(1).values.median() > 0.95
    assert metrics["explained_variance"] == 1 - metrics["nmse"]
    assert metrics["l0"] <= 4


@pytest.mark.parametrize(
    ("activation", "options", "l0"),
    [
        ("relu", {"sparsity": 0.15}, (2, 15)),
        ("jumprelu", {"sparsity": 0.05, "bandwidth": 0.1, "threshold": 0.1}, (2, 12)),
        ("batchtopk", {}, (3, 5)),
    ],
)
def test_the_other_activations_learn_too(activation, options, l0):
    coder, _, _ = trained(activation, **options)
    x, _ = world_of(2000, seed=7)
    assert explained_variance(x, coder(x)) > 0.5
    assert l0[0] < (coder.encode(x) > 0).sum(1).float().mean() < l0[1]


def test_jumprelus_threshold_gradient_by_hand():
    """f' by θ is -θ/ε and 1[·]' is -1/ε where pre is within ε/2 of θ, and 0 elsewhere."""
    coder = SparseCoder(1, 1, activation="jumprelu", apply_b_dec_to_input=False)
    coder.W_enc.data.fill_(1.0), coder.W_dec.data.fill_(1.0), coder.threshold.data.fill_(2.0)
    step = SparseStep(coder, StepConfig(sparsity=0.1, bandwidth=0.5))
    x = torch.tensor([[2.2], [3.0], [1.9]])  # near and on; far and on; near and off
    errors = torch.tensor([0.0, 0.0, -1.9])  # x̂ - x
    by_f = (2 * errors[[0, 2]] * -2.0 / 0.5).sum()
    by_count = 2 * 0.1 * -1 / 0.5
    assert float(step.gradients(x)["threshold"]) == pytest.approx(float(by_f + by_count) / 3)


def test_auxk_wakes_the_dead():
    """Latents that never fire, as their encoder looks away, are brought back."""
    shares = []
    for coefficient in (0.0, 1 / 4):
        x, _ = world_of(2048)
        coder = SparseCoder(32, 160, k=2).initialise(x)
        coder.W_enc.data[:, 80:] *= 0.05
        step = SparseStep(coder, StepConfig(dead_after=2048, aux_coefficient=coefficient), lr=2e-2)
        for i in range(50):
            metrics = step(world_of(512, seed=100 + i)[0])
        shares.append(metrics["dead"])
    assert shares[0] > 0.5 > 0.4 > shares[1]


def test_auxk_moves_dead_columns_only():
    coder, x, _ = make()
    step = SparseStep(coder, StepConfig(aux_k=32))
    without = step.gradients(x)
    dead = torch.tensor([3, 500, 510, 512, 599])
    step.tokens_since_fired[dead] = 1_000_000
    moved = (step.gradients(x)["W_dec"] - without["W_dec"]).abs().max(1).values > 0
    assert moved[dead].all() and moved.sum() == 5


def test_tokens_since_a_latent_fired_are_counted():
    coder, x, _ = make()
    step = SparseStep(coder, lr=0.0)
    fired = torch.zeros(600, dtype=torch.bool)
    indices, values = coder.encode_sparse(x)
    fired[indices[values > 0]] = True
    assert not fired.all()
    metrics = step(x)
    step(x)
    assert torch.equal(step.tokens_since_fired, torch.where(fired, 0, 2 * len(x)))
    assert metrics["l0"] == pytest.approx((values > 0).sum().item() / len(x))
    assert metrics["explained_variance"] == pytest.approx(explained_variance(x, coder(x)), abs=1e-5)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
def test_a_resumed_run_is_the_same_bit_for_bit(activation):
    """Three steps, the state through a safetensors file, three more; and six without a stop."""

    def begin():
        k = {"k": 4} if activation in ("topk", "batchtopk") else {}
        coder = SparseCoder(32, 700, activation=activation, **k).initialise(world_of(500)[0])
        config = StepConfig(sparsity=0.01, bandwidth=0.1, dead_after=600)
        return SparseStep(coder, config, lr=5e-3)

    def run(step, first, last):
        for i in range(first, last):
            step.lr = 5e-3 / (1 + i)
            step(world_of(300, seed=i)[0])

    whole, first, second = begin(), begin(), begin()
    run(whole, 0, 6)
    run(first, 0, 3)
    second.load_state_dict(load(save(first.state_dict())))
    run(second, 3, 6)
    a, b = whole.state_dict(), second.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.steps == second.steps == 6


def test_a_state_of_another_coder_is_declined():
    step = SparseStep(make()[0])
    other = SparseStep(SparseCoder(48, 500, k=8)).state_dict()
    with pytest.raises(ValueError, match="a coder of another size"):
        step.load_state_dict(other)
    lacking = step.state_dict()
    del lacking["mean.b_dec"]
    with pytest.raises(ValueError, match="lacks 'mean.b_dec'"):
        step.load_state_dict(lacking)
    with pytest.raises(ValueError, match="has 'surplus'"):
        step.load_state_dict(step.state_dict() | {"surplus": torch.zeros(1)})


# ---------------------------------------------------------------- several processes


class Threads:
    """Stands in for `Processes`: every thread is one, and sums are made at a barrier."""

    def __init__(self, size):
        self.barrier, self.size, self.parts = threading.Barrier(size), size, {}

    def member(self, rank):
        def sum_(tensor):
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            total = sum(self.parts[r] for r in range(self.size))
            self.barrier.wait()
            return tensor.copy_(total)

        def share(n):
            return slice(n * rank // self.size, n * (rank + 1) // self.size)

        return SimpleNamespace(rank=rank, size=self.size, sum_=sum_, share=share)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SAE", {}),
        ("skip transcoder", {}),
        ("SAE", {"dense": True}),
    ],
)
def test_two_processes_are_one(kind, options):
    """At the same global batch; with unequal shares, and dead latents."""
    config = StepConfig(dead_after=1000, aux_k=32, eps=EPS)
    settings = {"lr": 3e-3, "products": LOW} | options
    coder, x, target = make(kind, rows=701)
    alone, batches = SparseStep(copy.deepcopy(coder), config, **settings), []
    for _ in range(4):
        rows = decided(alone, x)
        rows = rows[: len(rows) - 1 + len(rows) % 2]  # an odd number
        batches.append((x[rows], at(target, rows)))
        gradients = alone.gradients(*batches[-1])
        metrics = alone(*batches[-1])
    group, ends = Threads(2), {}

    def run(rank):
        mine = group.member(rank)
        step = SparseStep(copy.deepcopy(coder), config, processes=mine, **settings)
        for x, target in batches:
            share = mine.share(len(x))
            found = step(x[share], at(target, share))
        ends[rank] = step.coder, found

    members = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout=60)
    assert metrics["dead"] > 0
    for rank in range(2):
        coder, same = ends[rank]
        assert same == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for name, parameter in alone.coder.named_parameters():
            off = (dict(coder.named_parameters())[name] - parameter).abs().max()
            assert off < 4 * moved(gradients[name], 701, 3e-3), name
    for a, b in zip(ends[0][0].parameters(), ends[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- bad input


def test_nan_is_named_and_changes_nothing():
    coder, x, _ = make()
    step = SparseStep(coder)
    before = copy.deepcopy(step.state_dict())
    x[5, 2] = torch.nan
    with pytest.raises(ValueError, match="input hold NaN .* in 1 of 700 rows, first in row 5"):
        step(x)
    assert all(torch.equal(before[name], t) for name, t in step.state_dict().items())


def test_nan_in_the_targets_is_named():
    coder, x, target = make("transcoder")
    target[9] = torch.inf
    with pytest.raises(ValueError, match="target hold NaN or infinity in 1 of 700 rows"):
        SparseStep(coder)(x, target)


def test_weights_that_diverged_are_said_to_have():
    coder, x, _ = make()
    step = SparseStep(coder)
    with torch.no_grad():
        coder.W_enc[0, 0] = torch.inf
    with pytest.raises(ValueError, match="diverged; start again with a lower learning rate"):
        step(x)


@pytest.mark.parametrize(
    ("kind", "x", "target", "words"),
    [
        ("SAE", (5, 47), None, r"input has shape \(5, 47\), expected \(rows, 48\)"),
        ("SAE", (0, 48), None, r"input has shape \(0, 48\)"),
        ("SAE", (2, 3, 48), None, r"expected \(rows, 48\)"),
        ("transcoder", (5, 48), None, "reads 48 numbers and predicts 40: give the step a target"),
        ("transcoder", (5, 48), (5, 48), r"target has shape \(5, 48\), expected \(rows, 40\)"),
        ("transcoder", (5, 48), (4, 40), "5 rows of input and 4 of target"),
    ],
)
def test_inputs_that_do_not_fit(kind, x, target, words):
    step = SparseStep(make(kind)[0])
    with pytest.raises(ValueError, match=words):
        step(torch.zeros(x), None if target is None else torch.zeros(target))


def test_training_is_in_float32():
    with pytest.raises(ValueError, match="train it in float32"):
        SparseStep(SparseCoder(4, 8, k=2).bfloat16())
