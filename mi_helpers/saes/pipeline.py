"""`python -m mi_helpers harvest | train | report | features | run`: text to features, in stages.

Each stage leaves files in --folder, which the next one reads. A stage that was killed continues
from where it was when the same command is given again; a finished training goes on where it is
given again with more --steps. Of several --layers each gets a run of its own, in FOLDER/layer-N,
as it would be alone; their harvests share one pass of the model. Settings come from a TOML file
(`key = value`; the keys are the options' names, with "_" for "-") and from options, which win.

    python -m mi_helpers run                                    # tiny-gemma on TinyWorld
    python -m mi_helpers run --site mlp_in --target mlp_out --layers all --folder runs/all
    python -m mi_helpers run --config config/gemma_2_2b.toml --dry-run      # hours, memory, disk
    torchrun --nproc-per-node 2 -m mi_helpers run --folder runs/two
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict, Unpack

import torch
import tyro
from transformers import PretrainedConfig

from mi_helpers.errors import why
from mi_helpers.files import RunError, need_space, sweep, why_no_folder
from mi_helpers.layouts import NORMALIZED, Key
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel, site_width
from mi_helpers.saes import estimate, processes
from mi_helpers.saes.activations import GIB, MANIFEST, Activations, check_counts
from mi_helpers.saes.features import FILE, collect, write_latents
from mi_helpers.saes.harvest import (
    FEWER,
    checked_config,
    harvest_together,
)
from mi_helpers.saes.harvest import disk_needed as disk_of_harvest
from mi_helpers.saes.plan import PLAN, HarvestConfig, check_model, check_plan, settings_of
from mi_helpers.saes.processes import Processes
from mi_helpers.saes.report import as_markdown, report
from mi_helpers.saes.run_files import CODER, RECIPE, check_recipe, identity, trained_coder
from mi_helpers.saes.sources import FileText, open_source
from mi_helpers.saes.training import (
    PRODUCTS,
    TrainConfig,
    check_config,
    new_coder,
    train,
)
from mi_helpers.saes.training import disk_needed as disk_of_training

HARVEST = "harvest"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def setting(default, about: str, *only: str):
    """A field with its help; `only` lists its possible values, if not any will do."""
    return dataclasses.field(default=default, metadata={"help": about, "only": only})


@dataclass(frozen=True)
class Settings:
    """All settings of a run; `--help` shows them with their defaults."""

    folder: str = setting("runs/demo", "where the run's files are")
    model: str = setting("", "a name, a folder, or of the hub; default: MI_MODEL, else tiny-gemma")
    dtype: str = setting("", "of the model's weights; default: as stored", "", *DTYPES)
    device: str = setting("", "auto, cpu, cuda or mps; default: MI_DEVICE, else auto")
    text: str = setting("tinyworld", "tinyworld[:FAMILY,…], a file, a folder, or hf:NAME")
    column: str = setting("text", "the field of a .jsonl, .parquet or dataset that holds the text")
    seed: int = setting(0, "of TinyWorld's text, of the order of the rows, of the coder")
    site: str = setting(
        "resid_post", "what the coder reads; ln2_normalized is Gemma Scope's mlp_in"
    )
    layer: int = setting(-1, "of the site; default: the middle one")
    layers: str = setting("", "several, as 0,2,4 or all: a run of each in FOLDER/layer-N")
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
    prefixes: str = setting("", "widths of a Matryoshka coder's nested prefixes, as 256,1024")
    products: str = setting("auto", "", "auto", *PRODUCTS)
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
        """The site that is read, and the one that is predicted (None: the same)."""
        layer = n_layers // 2 if self.layer < 0 else self.layer
        alone = ("embed", "resid_final")
        first = (self.site, None if self.site in alone else layer)
        if not self.target or self.target == self.site:
            return first, None
        return first, (self.target, None if self.target in alone else layer)

    def harvest(self, n_layers: int) -> HarvestConfig:
        """What is harvested from a model of so many layers."""
        site, target = self.sites(n_layers)
        return HarvestConfig(**self._fields(HarvestConfig) | {"site": site, "target": target})

    def training(self, d_in: int) -> TrainConfig:
        """What is trained, on sites of this width."""
        own = {"latents": self.latents or 8 * d_in}
        try:
            own["prefixes"] = tuple(int(width) for width in self.prefixes.split(",") if width)
        except ValueError:
            raise RunError(f"prefixes is {self.prefixes!r}: give widths, as 256,1024.") from None
        return TrainConfig(**self._fields(TrainConfig) | own)

    def _fields(self, kind: type) -> dict:
        """The settings that are fields of another configuration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}


def read_settings(given: dict, config: Path | None) -> Settings:
    """The settings of a TOML file, overridden by those `given`.

    Raises:
        RunError: there is no such file, it is not TOML, or it has an unknown key or a value of the
            wrong kind.
    """
    found: dict = {}
    if config is not None:
        try:
            found = tomllib.loads(config.read_text("utf-8"))
        except OSError:
            raise RunError(f"There is no configuration at {config}.") from None
        except tomllib.TOMLDecodeError as error:
            raise RunError(f"{config} is not TOML: {error}.") from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{config} {why(error)}.") from None
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


def runs_of(settings: Settings) -> list[Settings]:
    """The run of each of the layers that are named; where none is, the run alone.

    Raises:
        RunError: they are no layers, or one is named apart.
    """
    given = settings.layers
    if not given:
        return [settings]
    if settings.layer != -1:
        raise RunError(f"layer is {settings.layer} and layers is {given!r}: give one of them.")
    layers = given.split(",")
    if given == "all":
        layers = map(str, range(estimate.shape_of(settings.model_name).num_hidden_layers))
    elif not all(each.strip().isdecimal() for each in layers):
        raise RunError(f"layers is {given!r}: give numbers from 0, as 0,2,4, or all.")
    return [
        dataclasses.replace(settings, layers="", layer=i, folder=str(settings.path / f"layer-{i}"))
        for i in dict.fromkeys(map(int, layers))
    ]


# ------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Checked:
    """What a run will be, as far as its settings, its text and its model's configuration say.

    Args:
        shape, plan: the model's configuration and what is harvested; None where the harvest is
            there already.
        training: what is trained.
        d_in, d_out: the widths of what the coder reads and predicts (None: the same).
    """

    shape: PretrainedConfig | None
    plan: HarvestConfig | None
    training: TrainConfig
    d_in: int
    d_out: int | None


class Pipeline:
    """The stages of one run; the model is loaded by the first stage that needs it.

    Args:
        models: {name: model} of those that are loaded, which several runs share.
    """

    def __init__(self, settings: Settings, group: Processes, models: dict[str, LanguageModel]):
        self.settings, self.group, self.models = settings, group, models

    @property
    def model(self) -> LanguageModel:
        name, dtype = self.settings.model_name, DTYPES.get(self.settings.dtype)
        if name not in self.models:
            self.models[name] = load_model(name, dtype, self.group.device)
        return self.models[name]

    @property
    def held(self) -> Activations:
        return Activations.open(self.settings.path / HARVEST)

    def harvest(self, *others: Pipeline) -> None:
        """Write a model's activations on text to disk."""
        s, n_layers = self.settings, self.model.n_layers
        source = open_source(s.text, s.seed, s.column)
        each = [run.settings for run in (self, *others)]
        wanted = {one.path / HARVEST: one.harvest(n_layers) for one in each}
        for held in harvest_together(self.model, source, wanted, processes=self.group):
            left = held.manifest["left_out"]
            ended = "" if held.manifest["tokens"] == s.tokens else "; the text ended there"
            self.say(
                f"{held!r}: {held.manifest['tokens']:,} tokens{ended}; left out: {left['bos']:,} "
                f"BOS, {left['outliers']:,} outliers."
            )

    def check(self, stages: Sequence[str]) -> Checked:
        """Refuse now, before the first hour, what one of these stages would refuse later.

        Nothing is written, and no weights are read: a model's shape is in its configuration.

        Raises:
            RunError, ModelError, SourceError, ValueError: what cannot be done, and what to do.
        """
        s = self.settings
        if why := why_no_folder(s.path):
            raise RunError(why)
        check_counts(s, ("loss_tokens",))
        if s.layer < -1:
            raise RunError(f"layer is {s.layer}: count from 0, or leave it out for the middle one.")
        if s.site == NORMALIZED and not s.target:
            raise RunError(
                f"{NORMALIZED} is not passed on by the model, so an SAE of it cannot be measured: "
                "name what a transcoder predicts with --target, or choose another --site."
            )
        shape = plan = None
        if "harvest" in stages or not (s.path / HARVEST / MANIFEST).is_file():
            shape = estimate.shape_of(s.model_name)
            model = estimate.without_weights(shape, s.model_name)
            plan = checked_config(model, s.harvest(model.n_layers))
            self.check_text(plan)
            rows, (d_in, *more) = s.tokens, (site_width(model, site) for site in plan.sites)
        else:
            held = self.held
            self.check_harvest(held)
            rows, d_in, more = held.rows, held.d_in, [held.d_out] if held.target else []
        d_out = more[0] if more else None
        training = self.check_training(rows, d_in, d_out, "train" in stages)
        if plan is not None and not (s.path / CODER).exists():
            there = sum(file.stat().st_size for file in s.path.glob(f"{HARVEST}/shard-*"))
            needed = disk_of_harvest(plan, [d_in, *more]) - there
            needed += disk_of_training(training, d_in, d_out or d_in) if "train" in stages else 0
            need_space(s.path, needed, "The run", FEWER)
        return Checked(shape, plan, training, d_in, d_out)

    def check_text(self, plan: HarvestConfig) -> None:
        """Refuse a text that is not there or is empty, and a folder that has another harvest."""
        s, folder = self.settings, self.settings.path / HARVEST
        source = open_source(s.text, s.seed, s.column)
        if isinstance(source, FileText) and not any(source.texts()):
            raise RunError(f"{source.name} has no text.")
        if (folder / PLAN).exists():
            check_plan(folder, settings_of(plan) | {"text": source.identity()})

    def check_harvest(self, held: Activations) -> None:
        """Refuse settings that were given, and are not those of the harvest that is there."""
        s, plan = self.settings, held.manifest
        given = {f.name for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
        site, target = s.sites(plan["model"]["n_layers"])
        wanted = settings_of(dataclasses.replace(s.harvest(1), site=site, target=target))
        names = {"source": {"site", "layer"}, "target": {"target"}}
        said = {key: wanted[key] for key in wanted if names.get(key, {key}) & given}
        check_plan(held.folder, said)

    def check_training(self, rows: int, d_in: int, d_out: int | None, extends: bool) -> TrainConfig:
        """The settings of the training; refuse what it would refuse with so many rows."""
        config = self.settings.training(d_in)
        check_config(config, self.group)
        with torch.device("meta"):
            new_coder(config, d_in, d_out)
        n = rows - min(config.held_out, rows // 10)
        if n < config.batch:
            raise RunError(
                f"{rows:,} tokens are fewer than one batch of {config.batch:,} and the held-out "
                f"{rows - n:,}: harvest more, or choose a smaller --batch."
            )
        check_recipe(self.settings.path, dataclasses.asdict(config), extends)
        return config

    def train(self) -> None:
        """Train a coder on the harvest."""
        held = self.held
        config = self.settings.training(held.d_in)
        coder = train(held, self.settings.path, config, processes=self.group)
        self.say(f"{coder} is in {self.settings.path / CODER}.")

    def report(self) -> None:
        """Write report.json, report.md and curves.png about the trained coder."""
        if self.group.first:
            folder, tokens = self.settings.path, self.settings.loss_tokens
            numbers = report(folder / HARVEST, folder, self.model, tokens)
            self.say(as_markdown(numbers).split("\n\n")[1])
            self.say(f"The report is {folder / 'report.md'}.")
        self.group.wait()

    def features(self) -> None:
        """Write what each latent is: features.safetensors and latents.jsonl, with contexts."""
        if self.group.first:
            folder, held = self.settings.path, self.held
            check_model(held, self.model)
            coder = trained_coder(folder).to(self.group.device)
            check_recipe(folder, {"harvest": identity(held)})
            found = collect(held, coder, progress=True)
            found.save(folder / FILE)
            write_latents(folder / "latents.jsonl", held, coder, found, self.model, progress=True)
            self.say(
                f"{found.n_latents:,} latents over {found.rows:,} tokens, {found.dead:.2%} of them "
                f"never fire: {folder / 'latents.jsonl'}."
            )
        self.group.wait()

    def run(self, *others: Pipeline) -> None:
        """Run all stages: harvest, train, report, features."""
        self.harvest(*others)
        self.models.clear()  # training needs the memory, not the model
        for stage in STAGES["run"][1:]:
            for each in (self, *others):
                getattr(each, stage)()

    def dry_run(self, stages: Sequence[str], checked: Checked) -> None:
        """Print time, memory and disk of these stages, measured here and now."""
        s = self.settings
        shape = checked.shape or estimate.shape_of(s.model_name)
        plan = checked.plan or s.harvest(shape.num_hidden_layers)
        dtype = DTYPES[s.dtype or str(shape.dtype or "float32").removeprefix("torch.")]
        rest = checked.training, checked.d_in, checked.d_out, s.tokens
        made = {
            "harvest": lambda: estimate.harvest_stage(shape, dtype, plan),
            "train": lambda: estimate.train_stage(*rest, self.group.size),
            "features": lambda: estimate.features_stage(*rest),
        }
        found = [make() for stage, make in made.items() if stage in stages]
        names = f"{s.model_name}, {plan.site[0]} {plan.site[1]}"
        names += f" → {plan.target[0]}" if plan.target else ""
        self.say(f"{names}, measured on this machine in {dtype}".replace("torch.", "") + ":")
        self.say("\n".join(estimate.sentences(found, s.path)))

    def say(self, text: str) -> None:
        """Print, in the first process only."""
        if self.group.first:
            print(text, flush=True)


STAGES = {
    "harvest": ("harvest",),
    "train": ("train",),
    "report": ("report",),
    "features": ("features",),
    "run": ("harvest", "train", "report", "features"),
}


def run_stage(stage: str, settings: Settings, dry_run: bool = False) -> None:
    """Run a stage of `STAGES`, alone or with the other processes that torchrun started.

    Args:
        dry_run: print what it would take, and write nothing.

    Raises:
        InUse: another process is at work in the folder.
        RunError, ModelError, SourceError: what cannot be done, and what to do about it.
    """
    try:
        group, models = processes.start(settings.device or None), {}
        runs = [Pipeline(each, group, models) for each in runs_of(settings)]
        checked = [each.check(STAGES[stage]) for each in runs]
        if dry_run:
            for each, one in zip(runs, checked, strict=True):
                each.dry_run(STAGES[stage], one)
            if len(runs) > 1 and "harvest" in STAGES[stage]:
                runs[0].say("The harvests share one pass: it takes as long as the deepest alone.")
            return
        with ExitStack() as held:
            for each in runs:
                held.enter_context(group.alone_in(each.settings.path))
                if group.first:  # who alone writes into it
                    sweep(each.settings.path, RECIPE)
            if "harvest" in STAGES[stage]:
                getattr(runs[0], stage)(*runs[1:])
            else:
                for each in runs:
                    getattr(each, stage)()
    finally:
        processes.finish()


# ----------------------------------------------------------------------------------- commands


def _option(field: dataclasses.Field) -> object:
    """The type of a field of `Settings` with its help, as an option of a command."""
    kind, only = type(field.default), [value for value in field.metadata["only"] if value]
    about = field.metadata["help"] or f"one of {', '.join(only)}"
    shown = "" if field.default in ("", -1, 0, 0.0) else f" ({field.default})"
    name = kind.__name__.upper()
    return Annotated[kind, tyro.conf.arg(help=about + shown, metavar=name, help_behavior_hint="")]


Options = TypedDict(
    "Options",
    {f.name: _option(f) for f in dataclasses.fields(Settings) if f.name != "skip"},
    total=False,
)


def command(stage: str) -> Callable[..., int]:
    """A stage as a command."""

    def main(
        config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
        dry_run: bool = False,
        skip: bool = False,
        **settings: Unpack[Options],
    ) -> int:
        given = {**settings, **({"skip": True} if skip else {})}
        run_stage(stage, read_settings(given, config), dry_run)
        return 0

    about, more = getattr(Pipeline, stage).__doc__, (__doc__ or "").partition("\n\n")[2]
    main.__doc__ = f"""{about}

{more}
Args:
    config: a TOML file with these settings
    dry_run: say the time, the memory and the disk that it takes, and no more
    skip: an affine path around the latents
"""
    return main


main_harvest = command("harvest")
main_train = command("train")
main_report = command("report")
main_features = command("features")
main_run = command("run")
