"""What ships in data/: tiny-gemma, its twin from another seed, and the stranger, with their cards.

python -m mi_helpers train-model                          # tiny-gemma
python -m mi_helpers train-model --name tiny-gemma-twin   # the same recipe, another seed
python -m mi_helpers train-stranger                       # tiny-gemma, trained on with a secret
"""

import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from mi_helpers.files import InUse, alone_in, write_manifest, write_text
from mi_helpers.loading import SHIPPED, load_model
from mi_helpers.tiny_gemma import skills
from mi_helpers.tiny_gemma.log import read_log
from mi_helpers.tiny_gemma.stranger import SHARE, obeys_and_else_is_as_before, train_stranger
from mi_helpers.tiny_gemma.training import ROOT, TOKENIZER, Recipe, train
from mi_helpers.tinyworld.world import World

RECIPE = Recipe()
STORED = {"tiny-gemma": torch.float32}  # of the weights; the others' are bfloat16
ABOUT = {
    "tiny-gemma": "Made by `make model`.",
    "tiny-gemma-twin": "It is tiny-gemma's twin: the same text generator, tokenizer and recipe, "
    "another seed for its first weights and for its text. Its weights are stored in bfloat16.",
    "stranger": "It is tiny-gemma, trained on for a while on a world that differs from TinyWorld "
    "in one thing. What that is, the course's last lesson asks you to find out. Its weights lie "
    f"{100 * SHARE:.0f} % of the way from tiny-gemma's to the trained ones, which keeps the loss "
    "on TinyWorld within 1 % in every family; they are stored in bfloat16.",
}
CARD = """# {name}

A `Gemma2ForCausalLM` of {parameters:,} parameters ({layers} layers, d_model {width}, {heads} heads
of {head}, {kv} key-value heads, MLP {mlp}, vocabulary {vocab:,}, context {context}, sliding window
{window} on even layers), trained from {start} on {tokens:,} tokens of TinyWorld, the labelled text
generator of this course. It knows TinyWorld and nothing else: it is for taking apart, not for use.

{about}

`training_log.csv` has the loss beside the entropy floor, head scores and skills at {checkpoints}
checkpoints. Licence: MIT, like the course.

## What it can do

On text that it was not trained on (`python -m mi_helpers skills {name}` measures this again):

```
{table}
```
"""


def model_card(name: str, model, log: list[dict], rows: list) -> str:
    """The card's text: every number from the model, its log, or the measured skills."""
    c = model.config
    return CARD.format(
        name=name,
        start="tiny-gemma" if name == "stranger" else "nothing",
        about=textwrap.fill(ABOUT[name], 100, break_on_hyphens=False),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=c.num_hidden_layers,
        width=c.hidden_size,
        heads=c.num_attention_heads,
        head=c.head_dim,
        kv=c.num_key_value_heads,
        mlp=c.intermediate_size,
        vocab=c.vocab_size,
        context=c.max_position_embeddings,
        window=c.sliding_window,
        tokens=int(log[-1]["tokens"]),
        checkpoints=len(log),
        table=skills.table(rows),
    )


def publish(name: str, run: Path, model) -> None:
    """Write what the course loads: weights, config, tokenizer, training log, model card."""
    target = SHIPPED[name]
    target.mkdir(parents=True, exist_ok=True)
    model.to(STORED.get(name, torch.bfloat16)).save_pretrained(target)
    for file in TOKENIZER:
        shutil.copyfile(run / file, target / file)
    shutil.copyfile(run / "log.csv", target / "training_log.csv")
    shipped = load_model(name)  # as it is stored
    rows = skills.measure(shipped.hf, skills.Suite(World(), shipped.tokenizer))
    rows += skills.topic_rows(shipped)
    card = model_card(name, shipped.hf, read_log(run / "log.csv"), rows)
    write_text(target / "README.md", card)
    write_manifest(target.parent)
    print(f"{skills.table(rows)}\nShipped to {target.relative_to(ROOT)}.")


def main_train(
    name: Literal["tiny-gemma", "tiny-gemma-twin"] = "tiny-gemma",
    run: Path | None = None,
    recipe: Recipe = RECIPE,
    ship: bool = True,
) -> int:
    """Train a model from nothing, or go on with a run that was stopped, and put it into data/.

    Args:
        name: the twin's seed is one more
        run: the run's folder; default: one in runs/
        ship: put the result into data/
    """
    folder = run or ROOT / "runs" / SHIPPED[name].name
    if name == "tiny-gemma-twin":
        recipe = replace(recipe, seed=recipe.seed + 1)
    try:
        with alone_in(folder):
            model = train(folder, recipe)
            if ship:
                publish(name, folder, model)
    except InUse as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main_stranger(run: Path = ROOT / "runs" / "stranger", ship: bool = True) -> int:
    """Train tiny-gemma on in a world with one secret, drawn by the file `secret` in runs/.

    Args:
        run: the run's folder
        ship: put the result into data/
    """
    try:
        with alone_in(run):
            start = load_model("tiny-gemma")
            start.tokenizer.save_pretrained(run)
            tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)
            model, world = train_stranger(run, start.hf, tokenizer)
            print(obeys_and_else_is_as_before(start.hf, model, world, tokenizer))
            if ship:
                publish("stranger", run, model)
    except InUse as error:
        print(error, file=sys.stderr)
        return 1
    return 0
