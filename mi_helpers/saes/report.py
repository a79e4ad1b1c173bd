"""How good a trained coder is: on held-out text, and in the place of what it predicts.

losses = spliced_losses(model, held, coder, texts)        # clean, spliced, zero, mean
losses.recovered("zero")                                  # share of the loss that comes back
report("runs/demo/harvest", "runs/demo", model)           # report.json, report.md, curves.png
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers import plots
from mi_helpers.arguments import one_of
from mi_helpers.files import (
    literal,
    read_sealed,
    write_atomically,
    write_json,
    write_text,
)
from mi_helpers.layouts import NORMALIZED, Key, ModelError
from mi_helpers.models import LanguageModel, site_reader
from mi_helpers.saes.activations import Activations, site_name
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.harvest import batches
from mi_helpers.saes.plan import check_model
from mi_helpers.saes.processes import ALONE
from mi_helpers.saes.progress import duration
from mi_helpers.saes.run_files import (
    LOG,
    RECIPE,
    SECONDS,
    check_recipe,
    identity,
    read_log,
    trained_coder,
)
from mi_helpers.saes.training import (
    TrainConfig,
    dead_window,
    quality,
    split,
)

LOGITS = 2**27  # numbers of logits that are computed at once
Replacement = Callable[[Tensor, Tensor], Tensor]  # (source, target) -> what is passed on

# ------------------------------------------------------------------------ splicing a coder in


@contextmanager
def spliced(
    model: LanguageModel,
    source: Key,
    target: Key | None,
    replace: Replacement,
    lead: int = 1,
    limit: float = float("inf"),
) -> Iterator[LanguageModel]:
    """Inside, the model goes on with `replace(source, target)` at the target site.

    Source and target are (batch, pos, width), heads side by side.

    Args:
        target: None means the source.
        lead: positions at the beginning that stay as they are: BOS, on which no coder is trained.
        limit: positions whose source has a norm above it stay as they are, as a harvest leaves
            them out.

    Raises:
        ModelError: the target is a site that the model does not pass on.
    """
    if target is None and source[0] == NORMALIZED:
        raise ModelError(f"{NORMALIZED!r} is not passed on by the model: splice a transcoder in.")
    into, of = site_reader(model, source)
    held: list[Tensor] = []

    def put(now: Tensor) -> Tensor:
        flat = now.flatten(2)
        read = held[-1] if target else of(now)
        new = replace(read, flat).to(flat.dtype)
        stay = read.float().norm(dim=-1, keepdim=True) > limit  # (batch, pos, 1)
        stay[:, :lead] = True
        return torch.where(stay, flat, new).reshape(now.shape)

    if target is None:
        hooks = {into: put}
    else:
        hooks = {into: lambda now: held.append(of(now)), site_reader(model, target)[0]: put}
    with model.hooks(
        {name if layer is None else (name, layer): f for (name, layer), f in hooks.items()}
    ):
        yield model


@dataclass(frozen=True)
class Losses:
    """Summed -log p of n texts in nats, (n,) each, by what the site was replaced with.

    Args:
        clean: nothing.
        spliced: the coder's prediction, but at BOS and at outliers, on which no coder is trained.
        zero: zeros, at every position, BOS and outliers included.
        mean: the mean over the harvest, at every position.
        tokens: how many tokens of each text were predicted, those predicted from BOS left out.
    """

    clean: Tensor
    spliced: Tensor
    zero: Tensor
    mean: Tensor
    tokens: Tensor

    def per_token(self) -> dict[str, float]:
        """Mean loss per token, in nats, by what the site was replaced with.

        Raises:
            ModelError: no token was predicted.
        """
        total = float(self.tokens.sum())
        if not total:
            raise ModelError("The texts have no token after their first: give longer texts.")
        names = ("clean", "spliced", "zero", "mean")
        return {name: float(getattr(self, name).sum()) / total for name in names}

    def recovered(self, against: str = "zero") -> float | None:
        """(L_against - L_spliced) / (L_against - L_clean), or None where that divides by no harm.

        1 where the coder loses nothing, 0 where it is no better than zeros (or the mean). A model
        whose BOS stays as it is, while all else is zero, is worse than one that knows nothing, so
        such a baseline would flatter every coder.

        Args:
            against: "zero" or "mean".

        Raises:
            ModelError: against anything else.

        Source: SAELens' `ce_loss_score`, with the special tokens among its `ignore_tokens`.
        """
        one_of("against", against, ("zero", "mean"))
        loss = self.per_token()
        harm = loss[against] - loss["clean"]
        return (loss[against] - loss["spliced"]) / harm if harm > 0 else None


@torch.no_grad()
def spliced_losses(
    model: LanguageModel,
    held: Activations,
    coder: SparseCoder,
    texts: list[list[int]],
    most: int = 4_096,
) -> Losses:
    """The model's losses on texts: as it is, and with the coder, zeros or the mean at the site.

    Args:
        texts: token ids without BOS.
        most: tokens that are run at once; fewer where the vocabulary is large.
    """
    mean = held.slice(0, min(held.rows, 8_192))[1 if held.target else 0].mean(0)
    by_coder = {"clean": None, "spliced": lambda source, target: predict(coder, source)}
    blind = {"zero": zeros, "mean": lambda source, target: mean.to(target).expand_as(target)}
    losses = losses_replaced(model, held, texts, by_coder, most)
    losses |= losses_replaced(model, held, texts, blind, most, everywhere=True)
    return Losses(**losses, tokens=torch.tensor([predicted(ids) for ids in texts]))


def predicted(text: list[int]) -> int:
    """How many tokens of a text are predicted, the first one left out: it has BOS alone before it,
    or nothing."""
    return max(0, len(text) - 1)


@torch.no_grad()
def losses_replaced(
    model: LanguageModel,
    held: Activations,
    texts: list[list[int]],
    ways: Mapping[str, Replacement | None],
    most: int = 4_096,
    everywhere: bool = False,
) -> dict[str, Tensor]:
    """{way: summed -log p of each text in nats, (texts,)}, by what the site is replaced with.

    A text's first token is not counted: `predicted` says how many are.

    Args:
        held: the harvest whose sites are read and replaced, and which says what an outlier is.
        texts: token ids without BOS.
        ways: {name: replacement}; None leaves the model as it is.
        most: tokens that are run at once; fewer where the vocabulary is large.
        everywhere: replace BOS and outliers, too, which a coder leaves as they are.
    """
    bos = bos_of(model)
    limit = held.manifest["outlier"] * held.manifest["median_norm"]
    stay = (0, float("inf")) if everywhere else (len(bos), limit)
    sums = {name: torch.zeros(len(texts), dtype=torch.float64) for name in ways}
    lengths = [len(ids) + len(bos) for ids in texts]
    for batch in batches(lengths, max(1, min(most, LOGITS // model.d_vocab))):
        longest = max(lengths[i] for i in batch)
        if longest < 2:
            continue
        ids = model.pad([bos + texts[i] for i in batch])
        place = torch.arange(1, longest)  # of the token that is predicted
        inside = place < torch.tensor([lengths[i] for i in batch])[:, None]
        inside &= place > len(bos)
        for name, replace in ways.items():
            if replace is None:
                loss = model.loss(ids)
            else:
                with spliced(model, held.source, held.target, replace, *stay):
                    loss = model.loss(ids)
            sums[name][batch] = (loss.cpu().double() * inside).sum(1)
    return sums


def bos_of(model: LanguageModel) -> list[int]:
    """The id that a text begins with, or nothing."""
    bos = model.tokenizer.bos_token_id if model.tokenizer else None
    return [] if bos is None else [bos]


def zeros(source: Tensor, target: Tensor) -> Tensor:
    """The replacement that knows nothing."""
    return torch.zeros_like(target)


def predict(coder: SparseCoder, x: Tensor) -> Tensor:
    """The coder's prediction from x (batch, pos, d_in), (batch, pos, d_out), by its sparse form."""
    rows = x.flatten(0, 1).to(coder.device, torch.float32)
    found = coder.decode_sparse(*coder.encode_sparse(rows), rows)
    return found.unflatten(0, x.shape[:2]).to(x.device)


def held_out_texts(held: Activations, n_train: int, tokens: int) -> list[list[int]]:
    """Token ids of whole pieces after row `n_train`, until there are `tokens` tokens."""
    texts: list[list[int]] = []
    total = 0
    for index, first in enumerate(held.first[:-1]):
        if first + held.sizes[index] <= n_train:
            continue
        shard = held.shard(index)
        seen = set(shard.piece[: max(0, n_train - first)].tolist())
        for piece in range(len(shard.document)):
            ids = shard.text(piece).tolist()
            if piece in seen or not ids:
                continue
            if total >= tokens:
                return texts
            texts.append(ids)
            total += len(ids)
    return texts


# ------------------------------------------------------------------------------------ the report


def report(
    harvest: Path | str,
    folder: Path | str,
    model: LanguageModel | None = None,
    tokens: int = 8_192,
) -> dict:
    """Write report.json, report.md and curves.png into a run's folder; the numbers.

    Args:
        harvest, folder: of the harvest, and of the run that was trained on it.
        model: None leaves out the loss recovered.
        tokens: of held-out text on which that loss is measured.

    Raises:
        RunError: the run is not finished, a file of it is not what was written, it was trained on
            another harvest, or the harvest is not of this model.
    """
    held, folder = Activations.open(harvest), Path(folder)
    kept = read_sealed(folder / RECIPE)
    config = TrainConfig(**{k: v for k, v in kept.items() if k in TrainConfig.__annotations__})
    coder, log = trained_coder(folder), read_log(folder / LOG)
    check_recipe(folder, {"harvest": identity(held)})
    n = split(held, config, ALONE)
    numbers = run_numbers(held, config, coder, log[-1]["dead"])
    if model is not None:
        check_model(held, model)
        losses = spliced_losses(model, held, coder, held_out_texts(held, n, tokens))
        numbers["loss"] = losses.per_token() | {"tokens": int(losses.tokens.sum())}
        numbers["loss_recovered"] = {name: losses.recovered(name) for name in ("zero", "mean")}
    write_json(folder / "report.json", numbers)
    seconds = read_sealed(folder / SECONDS)["seconds"] if (folder / SECONDS).exists() else None
    write_text(folder / "report.md", as_markdown(numbers, seconds))
    image = plots.render(curves(log))
    write_atomically(folder / "curves.png", lambda path: path.write_bytes(image))
    return numbers


def run_numbers(held: Activations, config: TrainConfig, coder: SparseCoder, dead: float) -> dict:
    """What a run was trained on and how, its share of dead latents, `quality` on held-out rows."""
    about, n = held.manifest, split(held, config, ALONE)
    return {
        "model": about["model"]["name"],
        "source": site_name(held.source),
        "target": site_name(held.target or held.source),
        "tokens": about["tokens"],
        "left_out": about["left_out"],
        "rows_trained_on": n,
        "rows_held_out": held.rows - n,
        "steps": config.steps,
        "batch": config.batch,
        "latents": coder.d_latent,
        "activation": coder.activation,
        "dead": dead,
        "dead_window": dead_window(config, n),
        **quality(coder, *held.slice(n, held.rows)),
    }


def as_markdown(numbers: dict, seconds: float | None = None) -> str:
    """The report as Markdown: a table, and what each number means."""
    left = numbers["left_out"]
    rows = [
        ("model", literal(numbers["model"])),
        ("reads → predicts", f"{numbers['source']} → {numbers['target']}"),
        ("tokens", f"{numbers['tokens']:,}"),
        ("left out", f"{left['bos']:,} BOS, {left['outliers']:,} outliers in norm"),
        ("training", f"{numbers['steps']:,} steps of {numbers['batch']:,} rows"),
        ("latents", f"{numbers['latents']:,} ({numbers['activation']})"),
        ("explained variance", f"{numbers['explained_variance']:.3f}"),
        ("normalised MSE", f"{numbers['nmse']:.3f}"),
        ("relative error", f"{numbers['relative_error']:.3f}"),
        ("L0", f"{numbers['l0']:.1f}"),
        ("dead latents", f"{numbers['dead']:.2%} (silent for {numbers['dead_window']:,} tokens)"),
    ]
    if seconds is not None:
        rows.insert(5, ("time to train", duration(seconds)))
    if "loss" in numbers:
        loss, back = numbers["loss"], numbers["loss_recovered"]
        rows += [
            ("loss of the model", f"{loss['clean']:.3f} nats per token"),
            ("loss with the coder spliced in", f"{loss['spliced']:.3f}"),
            ("loss with zeros, with the mean", f"{loss['zero']:.3f}, {loss['mean']:.3f}"),
            ("loss recovered, against zeros", share(back["zero"])),
            ("loss recovered, against the mean", share(back["mean"])),
        ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# A sparse coder of {literal(numbers['model'])}\n\n| | |\n|---|---|\n{table}\n\n"
        f"Measured on {numbers['rows_held_out']:,} rows at the end of the text, which were not "
        "trained on. Explained variance is 1 − E‖t − t̂‖² / E‖t − E t‖², normalised MSE the same "
        "without the 1 −, and the relative error has E‖t‖² below the line. Loss recovered is the "
        "share of the loss between a replacement that knows nothing and the model itself; zeros "
        "and the mean are put in at every position, BOS included, as SAELens does.\n\n"
        "![Explained variance and dead latents over the steps](curves.png)\n"
    )


def share(value: float | None) -> str:
    """A share in per cent, or why there is none."""
    return "no harm to recover from" if value is None else f"{value:.1%}"


@plots.style()
def curves(log: list[dict[str, float]]):
    """Training curves, one panel each: explained variance, L0, dead latents, learning rate."""
    panels = {
        "explained_variance": "explained variance, held out",
        "l0": "L0: latents that fire per row",
        "dead": "share of dead latents",
        "rate": "learning rate",
    }
    picture, axes = plots.figure(10, 6, rows=2, columns=2)
    steps = [row["step"] for row in log]
    for one, (name, title) in zip(axes.flat, panels.items(), strict=True):
        look = {"marker": ""} if len(steps) > 40 else {}
        one.plot(steps, [row[name] for row in log], **look)
        one.set(title=title, xlabel="step")
        one.set_ylim(bottom=0)
    return picture
