"""A transcoder for each of a model's MLPs: rows to train on, the shipped set, published ones.

    coders = load_transcoders()                       # one for each MLP of tiny-gemma
    coders = coders_for(model, [3])                   # {3: transcoder}, of any model
    x, y = read_mlps(model, 20_000, seed=1)[3]        # MLP inputs, MLP outputs
    coder = fit(x, TrainConfig(1_152, 16), y)         # without y it would be an SAE of x

`python -m mi_helpers make-transcoders` (`main`) makes what ships in data/transcoders: for each
layer one TopK transcoder without and one with a skip path, in SAELens' layout.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mi_helpers.files import DATA
from mi_helpers.layouts import norm_gain
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.files import load_coder, save_coder
from mi_helpers.saes.harvest import batches
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, fit

READ = "tinyworld"  # text to train on
SHIPPED = DATA / "transcoders"
KINDS = {"plain": False, "skip": True}  # name of the folder: whether there is a skip path
WIDTH, K = 8, 16  # latents in units of d_model, and how many of them fire per token
SOURCE, TARGET = "mlp_in", "mlp_out"
SCOPE = "google/gemma-scope-2b-pt-transcoders"  # published, of Gemma 2 2B
SCOPE_L0 = (76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, 8, 8, 8, 10, 12, 13, 12, 11, 13, 15)
SCOPE_L0 += (25, 37, 41)  # the lowest L0 of each layer's files: note the drop after layer 10

Pairs = dict[int, tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------------- rows to train on


def text_ids(
    model: LanguageModel, tokens: int, seed: int, text: str = READ, context: int = 128
) -> list[list[int]]:
    """Token ids of texts, `<bos>` first, until they have `tokens` tokens, `<bos>` not counted."""
    ids, total = [], 0
    for each in open_source(text, seed).texts():
        row = model.tokenizer.encode(
            each, add_special_tokens=False
        )  # maybe longer than the context
        ids.append([model.tokenizer.bos_token_id, *row][: min(context, model.n_ctx)])
        total += len(ids[-1]) - 1
        if total >= tokens:
            break
    return ids


def read_mlps(
    model: LanguageModel,
    tokens: int,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    text: str = READ,
    source: str = SOURCE,
    target: str = TARGET,
) -> Pairs:
    """{layer: (x, y)}: what each MLP reads and what it adds to the stream, a row for each token.

    Both are (rows, d_model) in bfloat16, in the same order for all layers, without `<bos>`. All
    layers are read in one run of the model, into memory; `harvest` reads one layer, onto the disk.

    Args:
        source: "mlp_in", or "ln2_normalized" for what Gemma Scope's transcoders read.
    """
    return read_ids(model, text_ids(model, tokens, seed, text), layers, seed, source, target)


@torch.no_grad()
def read_ids(
    model: LanguageModel,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    seed: int = 0,
    source: str = SOURCE,
    target: str = TARGET,
) -> Pairs:
    """`read_mlps` of texts given as token ids, `<bos>` first, with rows in an order of the seed."""
    layers = range(model.n_layers) if layers is None else layers
    sites = [(name, layer) for layer in layers for name in (source, target)]
    found: list[list[Tensor]] = [[] for _ in sites]
    for batch in batches([len(row) for row in ids], 4_096):
        longest = max(len(ids[i]) for i in batch)
        padded = model.pad([ids[i] for i in batch])
        inside = torch.arange(longest) < torch.tensor([len(ids[i]) for i in batch])[:, None]
        inside[:, 0] = False
        for held, values in zip(found, read_sites(model, padded, sites), strict=True):
            held.append(values.cpu()[inside].bfloat16())
    rows = [torch.cat(held) for held in found]
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
    rows = [each[order] for each in rows]  # texts came by length
    return dict(zip(layers, zip(rows[::2], rows[1::2], strict=True), strict=True))


# ------------------------------------------------------------------------- what a transcoder reads


def reads_of(coder: nn.Module) -> str:
    """What a transcoder reads: "mlp_in", the MLP's own input, or "normalised", the stream after
    the norm's division but before its gain (Gemma Scope's transcoders).

    Its metadata says so: "reads", or a TransformerLens hook name ending in "hook_normalized".
    """
    about = getattr(coder, "metadata", None) or {}
    if "reads" in about:
        return about["reads"]
    return "normalised" if str(about.get("hook_name", "")).endswith("hook_normalized") else "mlp_in"


@torch.no_grad()
def of_mlp_in(model: LanguageModel, coder: SparseCoder, layer: int) -> SparseCoder:
    """A published transcoder as one of `mlp_in`, with W_enc / gain: the inverse of `as_published`.
    One that reads `mlp_in` already stays as it is."""
    if reads_of(coder) == SOURCE:
        return coder
    new, gain = copy.deepcopy(coder), norm_gain(model.part("ln2", layer)).float()
    new.W_enc /= gain[:, None]
    new.metadata = {**coder.metadata, "reads": SOURCE}
    return new


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
    return [load_coder(path) for path in layers]


def coders_for(
    model: LanguageModel, layers: Sequence[int], rows: Pairs | None = None
) -> dict[int, SparseCoder]:
    """{layer: transcoder without skip path}: tiny-gemma's are shipped, Gemma 2 2B's are Gemma
    Scope's, and for any other model small ones are trained on rows, as `read_mlps` gives them."""
    if model.name == "tiny-gemma":
        shipped = load_transcoders()
        return {layer: shipped[layer] for layer in layers}
    if "gemma-2-2b" in model.name:
        return gemma_scope(model, layers)
    rows = read_mlps(model, 20_000, layers=layers) if rows is None else rows
    config = TrainConfig(4 * model.d_model, K, steps=200, batch=2_048)
    return {i: fit(rows[i][0], config, rows[i][1]) for i in layers}


def gemma_scope(model: LanguageModel, layers: Sequence[int]) -> dict[int, SparseCoder]:
    """{layer: Gemma Scope's transcoder of Gemma 2 2B}, the sparsest of 16,384 latents, reading
    `mlp_in`. Each is 302 MB to download, once, and as much memory."""
    path = "layer_{}/width_16k/average_l0_{}"
    return {i: of_mlp_in(model, load_coder(SCOPE, path.format(i, SCOPE_L0[i])), i) for i in layers}


def save_transcoder(coder: SparseCoder, folder: Path, layer: int, model: LanguageModel, **more):
    """Write one transcoder, in half precision, with what it reads and predicts."""
    return save_coder(
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
    tokens: int = 150_000,
    steps: int = 2_400,
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
            config = TrainConfig(
                WIDTH * model.d_model, K, skip=KINDS[kind], steps=steps, batch=batch
            )
            coder = fit(x, config, y)
            save_transcoder(coder, folder, layer, model, training_tokens=steps * batch)
            say(f"{kind}, layer {layer}: {time.monotonic() - start:.0f} s")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(folder: Path = SHIPPED) -> int:
    """Make the transcoders that ship in data/.

    Args:
        folder: where to put them
    """
    made = make_transcoders(load_model("tiny-gemma"), folder)
    print(f"{len(made)} files, {sum(path.stat().st_size for path in made) / 2**20:.1f} MiB")
    print("Now write the checksums of data/: python -m mi_helpers manifest --write")
    return 0
