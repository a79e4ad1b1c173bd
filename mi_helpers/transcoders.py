"""The science of lesson 07: transcoders, which stand for a model's MLPs latent by latent.

    coders = load_transcoders()                       # one for each MLP of tiny-gemma
    held = read_mlps(model, 20_000, seed=1)           # {layer: (MLP inputs, MLP outputs)}
    x, y = held[3]
    coder = sae_lab.fit(x, 1_152, 16, target=y)       # with target=None it would be an SAE of x

`python -m mi_helpers make-transcoders` (`main`) makes what ships in data/transcoders: for each
layer one TopK transcoder without and one with a skip path, in SAELens' layout.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers import coder_files
from mi_helpers.activations import Activations
from mi_helpers.circuits import attribution_graph, reads_of
from mi_helpers.coders import SparseCoder, explained_variance
from mi_helpers.features import Features, words
from mi_helpers.harvest import batches
from mi_helpers.lesions import Batch, family_losses, make_batch
from mi_helpers.models import DATA, LanguageModel, load_model, norm_gain
from mi_helpers.report import predict, spliced
from mi_helpers.sae_lab import READ, fit
from mi_helpers.sites import read_sites
from mi_helpers.sources import open_source

SHIPPED = DATA / "transcoders"
KINDS = {"plain": False, "skip": True}  # name of the folder: whether there is a skip path
WIDTH, K = 8, 16  # latents in units of d_model, and how many of them fire per token
SOURCE, TARGET = "mlp_in", "mlp_out"

Pairs = dict[int, tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------------- rows to train on


def text_ids(
    model: LanguageModel, tokens: int, seed: int, text: str = READ, context: int = 128
) -> list[list[int]]:
    """Token ids, `<bos>` first, of texts until there are `tokens` tokens after the `<bos>`es."""
    ids, total = [], 0
    for each in open_source(text, seed).texts():
        ids.append(model.tokens(each)[0, : min(context, model.n_ctx)].tolist())
        total += len(ids[-1]) - 1
        if total >= tokens:
            break
    return ids


@torch.no_grad()
def read_mlps(
    model: LanguageModel,
    tokens: int,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    text: str = READ,
    source: str = SOURCE,
    target: str = TARGET,
) -> Pairs:
    """{layer: (x, y)}: what each MLP reads and what it adds to the stream, by token.

    Both are (rows, d_model) in bfloat16, rows in one order for all layers, `<bos>` left out. All
    layers are read in one run of the model, in memory; `harvest` does it for one layer, on disk.

    Args:
        source: "mlp_in", or "ln2_normalized" for what Gemma Scope's transcoders read.
    """
    layers = range(model.n_layers) if layers is None else layers
    sites = [(name, layer) for layer in layers for name in (source, target)]
    found: list[list[Tensor]] = [[] for _ in sites]
    ids = text_ids(model, tokens, seed, text)
    for batch in batches([len(row) for row in ids], 4_096):
        longest = max(len(ids[i]) for i in batch)
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in batch])
        inside = torch.arange(longest) < torch.tensor([len(ids[i]) for i in batch])[:, None]
        inside[:, 0] = False
        for held, values in zip(found, read_sites(model, padded, sites), strict=True):
            held.append(values.cpu()[inside].bfloat16())
    rows = [torch.cat(held) for held in found]
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
    rows = [each[order] for each in rows]  # texts came by length
    return dict(zip(layers, zip(rows[::2], rows[1::2], strict=True), strict=True))


# ------------------------------------------------------------------------------- faithfulness


Replacement = Callable[[Tensor, Tensor], Tensor]  # (MLP input, MLP output) -> what is passed on


def zeros(x: Tensor, y: Tensor) -> Tensor:
    """The replacement that knows nothing: the MLP writes nothing."""
    return torch.zeros_like(y)


def by_coder(coder: SparseCoder) -> Replacement:
    """A transcoder's prediction instead of the MLP's output."""
    return lambda x, y: predict(coder, x)


def by_sae(coder: SparseCoder) -> Replacement:
    """An SAE's reconstruction of the MLP's output."""
    return lambda x, y: predict(coder, y)


def knock_out(coder: SparseCoder) -> Replacement:
    """What is left of a transcoder when no latent fires: its bias, and its skip path."""

    def left(x: Tensor, y: Tensor) -> Tensor:
        return coder.decode(x.new_zeros(*x.shape[:-1], coder.d_latent), x)

    return left


@contextmanager
def replaced(
    model: LanguageModel, by: Mapping[int, Replacement], source: str = SOURCE
) -> Iterator[LanguageModel]:
    """While it lasts, the MLPs of these layers are replaced, at all positions but the first."""
    with ExitStack() as stack:
        for layer, replacement in by.items():
            stack.enter_context(spliced(model, (source, layer), (TARGET, layer), replacement))
        yield model


def losses(
    model: LanguageModel, batch: Batch, by: Mapping[int, Replacement], source: str = SOURCE
) -> dict[str, float]:
    """{family: loss on its answers in nats} with MLPs replaced; {} leaves the model as it is."""
    with replaced(model, by, source):
        return family_losses(model, batch)


def mean_loss(by_family: Mapping[str, float]) -> float:
    """The mean over the families, each counting the same."""
    return sum(by_family.values()) / len(by_family)


def recovered(clean: float, spliced_in: float, zero: float, least: float = 0.05) -> float:
    """(L_zero - L_spliced) / (L_zero - L_clean): 1 where nothing is lost, 0 where it is no better
    than zeros; NaN where zeros do less harm than `least` nats, so that there is little to win."""
    return (zero - spliced_in) / (zero - clean) if zero - clean > least else float("nan")


@dataclass(frozen=True)
class Faithful:
    """{family: loss in nats} of the model as it is, with replacements, and with zeros there."""

    clean: dict[str, float]
    spliced: dict[str, float]
    zero: dict[str, float]

    @property
    def recovered(self) -> float:
        """The share of the loss that comes back, of the mean over families."""
        return recovered(*(mean_loss(each) for each in (self.clean, self.spliced, self.zero)))

    def by_family(self) -> dict[str, float]:
        """{family: share that comes back}; NaN where zeros hardly harm."""
        return {
            name: recovered(self.clean[name], self.spliced[name], self.zero[name])
            for name in self.clean
        }

    @property
    def added(self) -> float:
        """The loss that the replacement adds, in nats, mean over families."""
        return mean_loss(self.spliced) - mean_loss(self.clean)


def faithful(
    model: LanguageModel,
    batch: Batch,
    by: Mapping[int, Replacement],
    source: str = SOURCE,
    clean: dict[str, float] | None = None,
) -> Faithful:
    """How well the model works with these MLPs replaced, beside zeros at the same places."""
    clean = losses(model, batch, {}) if clean is None else clean
    return Faithful(
        clean, losses(model, batch, by, source), losses(model, batch, dict.fromkeys(by, zeros))
    )


def every(coders: Sequence[SparseCoder]) -> dict[int, Replacement]:
    """All MLPs replaced by their transcoders, for `faithful`."""
    return {layer: by_coder(coder) for layer, coder in enumerate(coders)}


@torch.no_grad()
def explained(coder: SparseCoder, x: Tensor, y: Tensor) -> float:
    """Explained variance of the target y (rows, d_out) from x (rows, d_in)."""
    return explained_variance(y.float(), coder(x.float()))


@torch.no_grad()
def linear_explained(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Explained variance of the best affine map, fitted by least squares on x → y: the baseline
    that a skip path is."""
    rows = torch.cat([x.float(), torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(rows, y.float()).solution
    test = torch.cat([test_x.float(), torch.ones(len(test_x), 1)], 1)
    return explained_variance(test_y.float(), test @ best)


# ---------------------------------------------------------------------------- a latent as a rule


@torch.no_grad()
def token_reading(model: LanguageModel, coder: SparseCoder, layer: int) -> Tensor:
    """What each latent would read if the stream held a token's embedding alone, (d_vocab, latents).

    norm(W_E) @ W_enc + b_enc, with the norm in front of the layer's MLP: the direct path from the
    embedding to the encoder. A norm takes no notice of the embedding's scale.
    """
    x = model.part("ln2", layer)(model.W_E).float()
    return x @ coder.W_enc + coder.b_enc


@torch.no_grad()
def reading_of(model: LanguageModel, coder: SparseCoder, layer: int, latent: int) -> Tensor:
    """`token_reading` of one latent, (d_vocab,)."""
    latent = int(coder.check_latents([latent]))
    x = model.part("ln2", layer)(model.W_E).float()
    return x @ coder.W_enc[:, latent] + coder.b_enc[latent]


def top_tokens(model: LanguageModel, values: Tensor, n: int = 8) -> list[tuple[str, float]]:
    """[(token, value)] of the n highest of values (d_vocab,)."""
    top = values.topk(n)
    name = model.tokenizer.decode
    return [(name([int(i)]), float(v)) for v, i in zip(*top, strict=True)]


def own_token(held: Activations, features: Features, latent: int) -> tuple[int, float]:
    """(the token at which a latent's highest firings are most often, the share of them there)."""
    rows = features.top_row[features.check(latent)]
    tokens = [_token_at(held, int(row)) for row in rows if row >= 0]
    if not tokens:
        return -1, 0.0
    token, count = Counter(tokens).most_common(1)[0]
    return token, count / len(tokens)


def _token_at(held: Activations, row: int) -> int:
    """The token id at a row of a harvest."""
    index, local = held.locate(row)
    shard = words(held, index)
    return int(shard.text(int(shard.piece[local]))[int(shard.at[local])])


def reads_its_token(
    model: LanguageModel,
    coder: SparseCoder,
    layer: int,
    held: Activations,
    features: Features,
    among: int = 10,
    least: int = 10,
) -> float:
    """Of the latents with `least` firings in different texts, the share whose own token (at which
    they fire most) is among the `among` tokens that the embedding alone predicts: chance is
    among / d_vocab."""
    predicted = token_reading(model, coder, layer).topk(among, dim=0).indices  # (among, latents)
    usable = [int(i) for i in np.flatnonzero((features.top_row >= 0).sum(1) >= least)]
    hits = [own_token(held, features, i)[0] in predicted[:, i].tolist() for i in usable]
    return float(np.mean(hits)) if hits else float("nan")


# ---------------------------------------------------------------------------- virtual weights


@torch.no_grad()
def virtual_weights(
    model: LanguageModel, below: SparseCoder, above: SparseCoder, layer_above: int
) -> Tensor:
    """W_dec of one layer's latents, times the gain of the reader's norm, times W_enc of another's:
    (latents below, latents above), whatever the text is.

    What a latent's firing by 1 adds to another's pre-activation at the same position along the
    stream, but for the norm's denominator. Dunefsky and others 2024, section 3.2.
    """
    reads = reads_of(above)
    gain = norm_gain(model.part("ln2", layer_above)).float() if reads == SOURCE else 1.0
    return (below.W_dec * gain) @ above.W_enc


@dataclass(frozen=True)
class ActivePairs:
    """Pairs of features that fire on a text, the earlier layer first; all arrays (pairs,).

    virtual  the virtual weight times the earlier feature's activation
    edge     what it adds to the later one's pre-activation, through attention as well, with
             attention patterns and norms as they are on this text
    gap      positions from the earlier to the later one
    """

    virtual: np.ndarray
    edge: np.ndarray
    gap: np.ndarray

    def correlation(self, same_position: bool = True) -> float:
        """Of virtual weights and edges, over pairs at one position or over the others."""
        chosen = (self.gap == 0) == same_position
        return float(np.corrcoef(self.virtual[chosen], self.edge[chosen])[0, 1])

    def across(self) -> float:
        """The share of Σ |edge| between different positions, which only attention can carry."""
        return float(np.abs(self.edge[self.gap > 0]).sum() / np.abs(self.edge).sum())


def active_pairs(
    model: LanguageModel, coders: Sequence[SparseCoder], prompts: Sequence[str]
) -> ActivePairs:
    """Virtual weights beside the true edges (`circuits.attribution_graph`) of all pairs of features
    that fire on these prompts."""
    virtual, edge, gap = [], [], []
    table = {
        (i, j): virtual_weights(model, coders[i], coders[j], j).numpy()
        for j in range(len(coders))
        for i in range(j)
    }
    for prompt in prompts:
        graph = attribution_graph(model, coders, prompt)
        which = np.flatnonzero(graph.mask("feature").numpy())
        nodes = [graph.nodes[i] for i in which]
        edges = graph.adjacency.numpy()[np.ix_(which, which)]
        value = graph.values.numpy()[which]
        layer, place, latent = np.array([(n.layer, n.position, n.index) for n in nodes]).T
        for (below, above), weights in table.items():
            source, goal = np.flatnonzero(layer == below), np.flatnonzero(layer == above)
            distance = place[goal][:, None] - place[source]
            may = distance >= 0
            found = weights[latent[source]][:, latent[goal]].T * value[source]
            virtual.append(found[may])
            edge.append(edges[np.ix_(goal, source)][may])
            gap.append(distance[may])
    return ActivePairs(*(np.concatenate(each) for each in (virtual, edge, gap)))


@torch.no_grad()
def together(
    below: SparseCoder,
    above: SparseCoder,
    x_below: Tensor,
    x_above: Tensor,
    weights: Tensor,
    n=1_000,
) -> float:
    """Of the n pairs of latents with the largest |virtual weight|, the share that ever fires at one
    token of rows x (the same tokens in both): the others are interference that no text shows."""
    fired = [
        torch.zeros(len(x), coder.d_latent).scatter_(1, *_on(coder, x))
        for coder, x in ((below, x_below), (above, x_above))
    ]
    both = fired[0].T @ fired[1]  # (latents below, latents above): tokens at which both fire
    top = weights.abs().flatten().topk(n).indices
    return float((both.flatten()[top] > 0).float().mean())


def _on(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, 1 where they fire, else 0), (rows, k) both."""
    index, value = coder.encode_sparse(x.float())
    return index, (value > 0).float()


# ------------------------------------------------------------------------ Gemma Scope's convention


@torch.no_grad()
def as_published(
    model: LanguageModel, coder: SparseCoder, layer: int, x: Tensor, folder: Path
) -> Path:
    """Write a transcoder of `mlp_in` as Gemma Scope publishes one; the folder of params.npz.

    Two things change. Its input is the normalised stream *without* the norm's gain, so the gain
    moves into the encoder: W_enc' = gain · W_enc. And it is JumpReLU, so the k largest of each row
    become all above one threshold, which the rows x (rows, d_model) exceed k times on average.

    Raises:
        ValueError: a skip path, which Gemma Scope's transcoders have not.
    """
    if coder.skip:
        raise ValueError("Gemma Scope's transcoders have no skip path: give one without.")
    gain = norm_gain(model.part("ln2", layer)).float()
    pre = coder.encode_pre_act(x.float())
    cut = pre.flatten().topk(coder.k * len(x)).values[-1].clamp(min=0)
    place = folder / f"layer_{layer}" / f"width_{coder.d_latent}" / f"average_l0_{coder.k}"
    place.mkdir(parents=True, exist_ok=True)
    np.savez(
        place / "params.npz",
        W_enc=(gain[:, None] * coder.W_enc).numpy(),
        b_enc=coder.b_enc.numpy(),
        W_dec=coder.W_dec.numpy(),
        b_dec=coder.b_dec.numpy(),
        threshold=np.full(coder.d_latent, float(cut), np.float32),
    )
    return place


# ---------------------------------------------------------------------------- the shipped set


def load_transcoders(skip: bool = False, folder: Path = SHIPPED) -> list[SparseCoder]:
    """The shipped transcoders, one for each layer, in order.

    Each reads `mlp_in` (after the norm, its gain included) and predicts `mlp_out` (after the
    post-norm), as `coder.metadata` says: "reads", "target", "layer".

    Raises:
        ValueError: they are not there.
    """
    place = folder / ("skip" if skip else "plain")
    layers = sorted(place.glob("layer_*"), key=lambda path: int(path.name.split("_")[1]))
    if not layers:
        raise ValueError(
            f"There are no transcoders in {folder.name}/{place.name}: "
            "python -m mi_helpers make-transcoders makes them."
        )
    return [coder_files.load(path) for path in layers]


def save_transcoder(coder: SparseCoder, folder: Path, layer: int, model: LanguageModel, **more):
    """Write one transcoder, in half precision, with what it reads and predicts."""
    return coder_files.save(
        coder.folded().half(),
        folder / ("skip" if coder.skip else "plain") / f"layer_{layer}",
        model_name=model.name,
        layer=layer,
        reads=SOURCE,
        target=TARGET,
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
        dataset=READ,
        prepend_bos=True,
        **more,
    )


def make_transcoders(
    model: LanguageModel,
    folder: Path = SHIPPED,
    *,
    tokens: int = 100_000,
    steps: int = 600,
    batch: int = 1_024,
    kinds: Sequence[str] = tuple(KINDS),
    rows: Pairs | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Make data/transcoders: `plain/layer_N` and `skip/layer_N`, cfg.json and weights in each.

    The same model and the same machine give the same files.

    Args:
        rows: to train on, as `read_mlps` gives them; by default they are read anew.
    """
    start = time.monotonic()
    rows = read_mlps(model, tokens) if rows is None else rows
    say(f"read {len(next(iter(rows.values()))[0]):,} rows in {time.monotonic() - start:.0f} s")
    for kind in kinds:
        for layer, (x, y) in rows.items():
            coder = fit(
                x, WIDTH * model.d_model, K, target=y, skip=KINDS[kind], steps=steps, batch=batch
            )
            save_transcoder(coder, folder, layer, model, training_tokens=steps * batch)
            say(f"{kind}, layer {layer}: {time.monotonic() - start:.0f} s")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(argv: list[str]) -> int:
    """`python -m mi_helpers make-transcoders [--folder data/transcoders]`."""
    parser = argparse.ArgumentParser(
        prog="python -m mi_helpers make-transcoders", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to put them")
    options = parser.parse_args(argv)
    made = make_transcoders(load_model("tiny-gemma"), options.folder)
    print(f"{len(made)} files, {sum(path.stat().st_size for path in made) / 2**20:.1f} MiB")
    print("Now write the checksums of data/: python -m mi_helpers manifest --write")
    return 0


# --------------------------------------------------------------------------- rows of the ledger


@functools.cache
def shipped(seed: int, skip: bool = False) -> tuple[list[Faithful], Faithful]:
    """(`faithful` with each MLP of tiny-gemma replaced, with all of them), on text of the seed."""
    model, coders = load_model("tiny-gemma"), load_transcoders(skip)
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    by, clean = every(coders), losses(model, batch, {})
    single = [faithful(model, batch, {layer: by[layer]}, clean=clean) for layer in by]
    return single, faithful(model, batch, by, clean=clean)


def worst_layer(seed: int) -> float:
    """Loss recovered with one MLP replaced, in the layer where it is lowest."""
    return min(each.recovered for each in shipped(seed)[0])


def all_layers(seed: int) -> float:
    """Loss recovered with all MLPs replaced at once."""
    return shipped(seed)[1].recovered


def all_layers_skip(seed: int) -> float:
    """Loss recovered with all MLPs replaced by transcoders with a skip path."""
    return shipped(seed, True)[1].recovered


def biases_alone(seed: int) -> float:
    """The control of `all_layers`: the same transcoders with no latent firing."""
    model, coders = load_model("tiny-gemma"), load_transcoders()
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    by = {layer: knock_out(coder) for layer, coder in enumerate(coders)}
    return faithful(model, batch, by, clean=shipped(seed)[1].clean).recovered


@functools.cache
def small_fit(seed: int, shuffled: bool = False) -> float:
    """Explained variance, on fresh text, of a small transcoder of a middle layer; `shuffled`: each
    input is given another token's output to learn from."""
    model = load_model("tiny-gemma")
    layer = model.n_layers // 2
    x, y = read_mlps(model, 16_000, 500 + seed, [layer])[layer]
    test_x, test_y = read_mlps(model, 3_000, 600 + seed, [layer])[layer]
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))] if shuffled else y
    coder = fit(x, 4 * model.d_model, K, target=y, steps=150, batch=512, seed=seed)
    return explained(coder, test_x, test_y)


def explained_shuffled(seed: int) -> float:
    """The control of `small_fit`: shuffled targets."""
    return small_fit(seed, True)


@functools.cache
def shipped_pairs(seed: int) -> ActivePairs:
    """`active_pairs` of three prompts of the seed."""
    model = load_model("tiny-gemma")
    texts = [model.tokenizer.decode(ids[1:13]) for ids in text_ids(model, 400, 700 + seed)[:3]]
    return active_pairs(model, load_transcoders(), texts)


def virtual_correlation(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at one position."""
    return shipped_pairs(seed).correlation()


def virtual_correlation_across(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at different positions."""
    return shipped_pairs(seed).correlation(same_position=False)
