"""`python -m mi_helpers harvest | train | report | features | run`: text to features, in stages.

    python -m mi_helpers run                                    # tiny-gemma on TinyWorld
    python -m mi_helpers run --config config/gemma_2_2b.toml --dry-run      # hours, memory, disk
    torchrun --nproc-per-node 2 -m mi_helpers run --folder runs/two

Each stage leaves files in --folder which the next one reads. A stage that was killed goes on from
where it was, when the same command is given again. Settings come from a TOML file (`key = value`,
the keys named as the options are, with "_" for "-") and from options, which win.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from mi_helpers.files import RunError
from mi_helpers.layouts import Key
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel, site_width
from mi_helpers.saes import estimate, processes
from mi_helpers.saes.activations import GIB, Activations
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import FILE, collect, write_latents
from mi_helpers.saes.harvest import check_model, harvest
from mi_helpers.saes.processes import Processes
from mi_helpers.saes.report import as_markdown, report
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import CODER, PRODUCTS, Recipe, check_recipe, train
from mi_helpers.tinyworld.__main__ import Parser

HARVEST = "harvest"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def setting(default, about: str, *only: str):
    """A field with its help; `only` lists the values that it may have."""
    return dataclasses.field(default=default, metadata={"help": about, "only": only})


@dataclass(frozen=True)
class Settings:
    """Everything that a run can be told; see `--help`."""

    folder: str = setting("runs/demo", "where the run's files are")
    model: str = setting("", "a name, a folder, or of the hub; default: MI_MODEL, else tiny-gemma")
    dtype: str = setting("", "of the model's weights; default: as stored", "", *DTYPES)
    device: str = setting("", "cpu, cuda or mps; default: cuda where it is, else cpu")
    text: str = setting("tinyworld", "tinyworld[:FAMILY,…], a file, a folder, or hf:NAME")
    column: str = setting("text", "the field of a .jsonl, .parquet or dataset that holds the text")
    seed: int = setting(0, "of TinyWorld's text, of the order of the rows, of the coder")
    site: str = setting(
        "resid_post", "what the coder reads; ln2_normalized is Gemma Scope's mlp_in"
    )
    layer: int = setting(-1, "of the site; default: the middle one")
    target: str = setting("", "what a transcoder predicts, such as mlp_out; default: what it reads")
    tokens: int = setting(200_000, "of text to harvest")
    context: int = setting(128, "tokens that the model reads at once, BOS included")
    shard_tokens: int = setting(8_192, "tokens per file of activations")
    batch_tokens: int = setting(4_096, "tokens per run of the model")
    outlier: float = setting(10.0, "leave out positions of a norm above this many medians")
    latents: int = setting(0, "in the dictionary; default: 8 times the width of the site")
    k: int = setting(32, "latents that fire per token")
    activation: str = setting("topk", "", "topk", "batchtopk", "relu", "jumprelu")
    skip: bool = setting(False, "an affine path around the latents")
    products: str = setting("measured", "", "measured", *PRODUCTS)
    sparsity: float = setting(0.0, "penalty's coefficient, of relu and jumprelu")
    dead_after: int = setting(1_000_000, "tokens without firing that make a latent dead")
    batch: int = setting(4_096, "rows per training step, over all processes")
    steps: int = setting(5_000, "of training")
    rate: float = setting(0.0, "peak learning rate; default: by the rule, from the latents")
    warm_up: float = setting(0.05, "share of the steps in which the rate rises")
    decay: float = setting(0.8, "share of the steps in which it falls")
    held_out: int = setting(8_192, "rows not trained on, at most a tenth")
    log_every: int = setting(50, "steps between rows of the log")
    save_every: int = setting(250, "steps between checkpoints")
    memory: int = setting(2 * GIB, "bytes of activations in memory, per process")
    loss_tokens: int = setting(8_192, "of text on which the report measures the model's loss")

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def model_name(self) -> str:
        return self.model or os.environ.get("MI_MODEL") or "tiny-gemma"

    def sites(self, n_layers: int) -> tuple[Key, Key | None]:
        """What is read and what is predicted (None: the same)."""
        layer = n_layers // 2 if self.layer < 0 else self.layer
        alone = ("embed", "resid_final")
        first = (self.site, None if self.site in alone else layer)
        if not self.target or self.target == self.site:
            return first, None
        return first, (self.target, None if self.target in alone else layer)

    def recipe(self, d_in: int) -> Recipe:
        """What is trained, on sites of this width."""
        own = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(Recipe)
            if hasattr(self, f.name)
        }
        return Recipe(**own | {"latents": self.latents or 8 * d_in})


def read_settings(given: dict, config: Path | None) -> Settings:
    """Settings of a TOML file, then those `given`.

    Raises:
        RunError: no such file, not TOML, an unknown key, a value of the wrong kind.
    """
    found: dict = {}
    if config is not None:
        try:
            found = tomllib.loads(config.read_text("utf-8"))
        except OSError:
            raise RunError(f"There is no configuration at {config}.") from None
        except tomllib.TOMLDecodeError as error:
            raise RunError(f"{config} is not TOML: {error}.") from None
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for key, value in found.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}."
            raise RunError(f"{config} has an unknown key {key!r}: {advice}")
        kind = type(fields[key].default)
        if kind is float and type(value) is int:
            found[key] = value = float(value)
        if type(value) is not kind:
            raise RunError(f"{key} is {value!r} in {config}: it has to be of type {kind.__name__}.")
    settings = Settings(**found | given)
    for name, field in fields.items():
        only = field.metadata["only"]
        if only and getattr(settings, name) not in only:
            listed = ", ".join(value for value in only if value)
            raise RunError(f"{name} is {getattr(settings, name)!r}: choose one of {listed}.")
    return settings


# ------------------------------------------------------------------------------------- stages


class Pipeline:
    """The stages of one run; the model is loaded by the first stage that needs it."""

    def __init__(self, settings: Settings, group: Processes):
        self.settings, self.group = settings, group
        self._model: LanguageModel | None = None

    @property
    def model(self) -> LanguageModel:
        if self._model is None:
            dtype = DTYPES.get(self.settings.dtype)
            self._model = load_model(self.settings.model_name, dtype, self.group.device)
        return self._model

    @property
    def held(self) -> Activations:
        return Activations.open(self.settings.path / HARVEST)

    def harvest(self) -> None:
        """Activations to disk."""
        s = self.settings
        source = open_source(s.text, s.seed, s.column)
        site, target = s.sites(self.model.n_layers)
        self.recipe_fits(site_width(self.model, site))
        held = harvest(
            self.model,
            source,
            s.path / HARVEST,
            site,
            target,
            tokens=s.tokens,
            context=s.context,
            shard_tokens=s.shard_tokens,
            batch_tokens=s.batch_tokens,
            outlier=s.outlier,
            processes=self.group,
        )
        left = held.manifest["left_out"]
        ended = "" if held.manifest["tokens"] == s.tokens else "; the text ended there"
        self.say(
            f"{held!r}: {held.manifest['tokens']:,} tokens{ended}; left out: {left['bos']:,} BOS, "
            f"{left['outliers']:,} outliers."
        )

    def recipe_fits(self, d_in: int) -> None:
        """Say now what the training would say after the harvest."""
        recipe = self.settings.recipe(d_in)
        check_recipe(recipe, self.group)
        if recipe.activation in ("topk", "batchtopk") and not 1 <= recipe.k <= recipe.latents:
            raise RunError(
                f"k is {recipe.k}, and the dictionary has {recipe.latents} latents: choose 1 to "
                f"{recipe.latents}."
            )
        if self.settings.tokens < recipe.batch:
            raise RunError(
                f"{self.settings.tokens:,} tokens are fewer than one batch of {recipe.batch:,}: "
                "harvest more, or choose a smaller --batch."
            )

    def train(self) -> None:
        """The coder, from the harvest."""
        held = self.held
        recipe = self.settings.recipe(held.d_in)
        coder = train(held, self.settings.path, recipe, processes=self.group)
        self.say(f"{coder} is in {self.settings.path / CODER}.")

    def report(self) -> None:
        """Numbers and curves."""
        if self.group.first:
            folder, tokens = self.settings.path, self.settings.loss_tokens
            numbers = report(folder / HARVEST, folder, self.model, tokens)
            self.say(as_markdown(numbers).split("\n\n")[1])
            self.say(f"The report is {folder / 'report.md'}.")
        self.group.wait()

    def features(self) -> None:
        """What every latent is: numbers in features.safetensors, contexts in latents.jsonl."""
        if self.group.first:
            folder, held = self.settings.path, self.held
            check_model(held, self.model)
            if not (folder / CODER).is_dir():
                raise RunError(f"There is no coder in {folder}: run the training first.")
            coder = SparseCoder.load(folder / CODER).to(self.group.device)
            found = collect(held, coder, progress=True)
            found.save(folder / FILE)
            write_latents(folder / "latents.jsonl", held, coder, found, self.model, progress=True)
            self.say(
                f"{found.n_latents:,} latents over {found.rows:,} tokens, {found.dead:.2%} of them "
                f"never fire: {folder / 'latents.jsonl'}."
            )
        self.group.wait()

    def run(self) -> None:
        """All stages."""
        self.harvest()
        self._model = None  # training needs the memory, not the model
        self.train()
        self.report()
        self.features()

    def dry_run(self, stages: list[str]) -> None:
        """Time, memory and disk of the stages, measured here and now."""
        s = self.settings
        config = estimate.configuration(s.model_name)
        dtype = DTYPES[s.dtype or str(config.dtype or "float32").removeprefix("torch.")]
        source, target = s.sites(config.num_hidden_layers)
        sites = [source] if target is None else [source, target]
        cut = estimate.two_blocks(config, dtype)
        widths = [site_width(cut, (n, None if layer is None else 1)) for n, layer in sites]
        recipe, d_in, d_out = s.recipe(widths[0]), widths[0], widths[1] if target else None
        self.recipe_fits(d_in)
        made = []
        if "harvest" in stages:
            made.append(
                estimate.harvest_stage(config, dtype, sites, s.tokens, s.context, s.batch_tokens)
            )
        if "train" in stages:
            made.append(estimate.train_stage(recipe, d_in, d_out, s.tokens, self.group.size))
        if "features" in stages:
            made.append(estimate.features_stage(recipe, d_in, d_out, s.tokens))
        names = f"{s.model_name}, {source[0]} {source[1]}" + (f" → {target[0]}" if target else "")
        self.say(f"{names}, measured on this machine in {dtype}".replace("torch.", "") + ":")
        self.say("\n".join(estimate.sentences(made, s.path)))

    def say(self, text: str) -> None:
        if self.group.first:
            print(text, flush=True)


STAGES = {
    "harvest": ["harvest"],
    "train": ["train"],
    "report": [],
    "features": ["features"],
    "run": ["harvest", "train", "features"],
}


def parser(command: str) -> argparse.ArgumentParser:
    """Options of a command: one per field of `Settings`."""
    made = Parser(
        prog=f"python -m mi_helpers {command}",
        description=getattr(Pipeline, command).__doc__,
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", type=Path, help="a TOML file with these settings")
    made.add_argument("--dry-run", action="store_true", help="time, memory and disk, and no more")
    for field in dataclasses.fields(Settings):
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        about, only = field.metadata["help"], [v for v in field.metadata["only"] if v]
        about = about or f"one of {', '.join(only)}"
        shown = "" if field.default in ("", -1, 0, 0.0, False) else f" ({field.default})"
        if kind is bool:
            made.add_argument(option, action="store_true", default=None, help=about)
        else:
            made.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=about + shown)
    return made


def main(command: str, argv: list[str]) -> int:
    """Run a stage, or estimate it; 2 for what cannot be done, in one sentence."""
    given = vars(parser(command).parse_args(argv))
    config, dry = given.pop("config"), given.pop("dry_run")
    try:
        settings = read_settings({k: v for k, v in given.items() if v is not None}, config)
        pipeline = Pipeline(settings, processes.start(settings.device or None))
        if dry:
            pipeline.dry_run(STAGES[command])
        else:
            getattr(pipeline, command)()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        processes.finish()
    return 0


def main_harvest(argv: list[str]) -> int:
    return main("harvest", argv)


def main_train(argv: list[str]) -> int:
    return main("train", argv)


def main_report(argv: list[str]) -> int:
    return main("report", argv)


def main_features(argv: list[str]) -> int:
    return main("features", argv)


def main_run(argv: list[str]) -> int:
    return main("run", argv)
