"""tiny-gemma: a small Gemma 2 trained from nothing on TinyWorld. `make model` runs `main_train`.

A run is a folder: `model.safetensors` and `optimizer.safetensors` of the last checkpoint,
`state.json`, and `log.csv`. Started again, it goes on from there: the text of block b of the run
depends on the seed and on b alone.
"""

import argparse
import csv
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from mi_helpers.files import (
    InUse,
    RunError,
    alone_in,
    read_json,
    sweep,
    write_atomically,
    write_json,
    write_manifest,
)
from mi_helpers.loading import load_model
from mi_helpers.tiny_gemma import skills
from mi_helpers.tinyworld.tokenizer import train_tokenizer
from mi_helpers.tinyworld.world import World, batches

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "tiny_gemma"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
STATE = "state.json"
BLOCK = 100  # steps between possible checkpoints; also the unit of the text stream
WARM_UP = 200
TAIL = 800  # steps at the lowest learning rate, where probabilities settle


def config(vocab_size: int = 3_840) -> Gemma2Config:
    """Gemma 2 in small: n_heads · head_dim = 128 ≠ d_model on purpose, and √d_model = 12."""
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=144,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=128,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, a cosine down to a hundredth of the peak, and that for `TAIL` steps.

    The tail is for probabilities that no single text shows: the largest error of the 40
    occupations' pronouns went from 0.051 to 0.036 in it, in phrasings that were trained on. In
    unseen phrasings it did nothing for it (0.117 and 0.134).
    """
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - TAIL - WARM_UP)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def checkpoint_steps(steps: int) -> set[int]:
    """Multiples of BLOCK for the log: dense where circuits form, sparse where they only sharpen."""
    early = range(0, 1_200, BLOCK)
    late = [1_200 + (steps - 1_200) * i / 12 for i in range(13)]
    return (
        {step for step in early if step < steps}
        | {round(step / BLOCK) * BLOCK for step in late if 0 <= step <= steps}
        | {0, steps}
    )


def adamw(model, peak: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay, and a group's `peak` is its highest learning rate."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05, "peak": peak},
        {"params": gains, "weight_decay": 0.0, "peak": peak},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def save_run(folder: Path, model, optimizer, state: dict) -> None:
    """One checkpoint. `state.json` is written last and names the step of the other two files."""
    names = {p: name for name, p in model.named_parameters()}
    moments = {
        f"{names[p]}/{key}": value.contiguous() if value.ndim else value.reshape(1)
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    step = state["step"]
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    for name, tensors in (("model", weights), ("moments", moments)):
        path = folder / f"{name}-{step}.safetensors"
        write_atomically(path, lambda to, tensors=tensors: save_file(tensors, to))
    write_json(folder / STATE, state)
    sweep(folder, STATE)
    for old in folder.glob("m*-*.safetensors"):
        if re.fullmatch(r"(model|moments)-\d+", old.stem) and not old.stem.endswith(f"-{step}"):
            old.unlink()


def load_run(folder: Path, model, optimizer) -> dict:
    """Put the last checkpoint into `model` and `optimizer`; its state ({} for a new run)."""
    sweep(folder, STATE)
    if not (folder / STATE).exists():
        return {}
    state = read_json(folder / STATE)
    if type(state.get("step")) is not int:
        raise RunError(f"{folder / STATE} has the step {state.get('step')!r}, no number.")
    parameters = dict(model.named_parameters())
    for name, value in load_file(folder / f"model-{state['step']}.safetensors").items():
        parameters[name].data.copy_(value)
    for name, value in load_file(folder / f"moments-{state['step']}.safetensors").items():
        parameter, key = name.rsplit("/", 1)
        optimizer.state[parameters[parameter]][key] = value.reshape(()) if key == "step" else value
    return state


def log_row(path: Path, row: dict) -> None:
    """Append a row to a CSV, with a header when it is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def keep_log_until(path: Path, step: int) -> None:
    """Drop rows that a killed run wrote after its last checkpoint."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        path.unlink()
        for row in rows:
            if int(row["step"]) <= step:
                log_row(path, row)


def progress_bar(step: int, steps: int, loss: float, rate: float, tokens: int) -> str:
    done = round(30 * step / steps)
    left = (steps - step) / max(rate, 1e-9)
    return (
        f"[{'#' * done}{'.' * (30 - done)}] {step}/{steps} loss {loss:.3f} "
        f"{rate * tokens:,.0f} tokens/s {left / 60:.0f} min left"
    )


def tokenizer_to(folder: Path, world: World) -> None:
    """The shipped tokenizer, so that a token keeps its id from model to model; else a new one."""
    if (SHIPPED / "tokenizer.json").exists():
        for name in TOKENIZER:
            shutil.copyfile(SHIPPED / name, folder / name)
    else:
        train_tokenizer(world).save_pretrained(folder)


def train(
    folder: Path,
    steps: int,
    peak: float = 3e-3,
    rows: int = 32,
    seed: int = 0,
    compiled: bool = True,
    world: World | None = None,
    tokenizer=None,
    model_config: Gemma2Config | None = None,
    save_every: int = 1_000,
) -> Gemma2ForCausalLM:
    """Train tiny-gemma for `steps` batches of `rows` × 128 tokens; resumes what is in `folder`.

    AdamW, gradient norm clipped at 1. bf16 autocast on a GPU only: on CPUs without AMX float32 is
    faster, and there compiled bf16 gradients came out as NaN (torch 2.13). Returns the model, on
    the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = world or World()
    if tokenizer is None:
        if not (folder / "tokenizer.json").exists():
            tokenizer_to(folder, world)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(model_config or config(len(tokenizer))).to(device)
    model.config.save_pretrained(folder)
    optimizer = adamw(model, peak)
    state = load_run(folder, model, optimizer)
    start = state.get("step", 0)
    keep_log_until(folder / "log.csv", start)

    def loss_of(ids):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits  # (rows, length, d_vocab)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of
    checks = checkpoint_steps(steps)
    suite = skills.Suite(world, tokenizer, small=True)
    loss_sum = state.get("loss", 0.0)
    seconds, begin, first = state.get("seconds", 0.0), time.time(), start
    for step in range(start, steps + 1):
        if step % BLOCK == 0:
            if step in checks and not (step == start and start > 0):
                model.eval()
                row = {
                    "step": step,
                    "tokens": step * rows * 128,
                    "seconds": round(seconds + time.time() - begin),
                    "train_loss": round(loss_sum, 4),
                    **suite.brief(model),
                }
                log_row(folder / "log.csv", row)
                print(f"\n{json.dumps(row)}", flush=True)
                model.train()
            if step > start and (step % save_every == 0 or step == steps):
                elapsed = seconds + time.time() - begin
                state = {"step": step, "loss": loss_sum, "seconds": elapsed}
                save_run(folder, model, optimizer, state)
            stream = batches(world, tokenizer, seed=seed * 1_000_003 + step // BLOCK, rows=rows)
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, group["peak"])
        ids = torch.from_numpy(next(stream).astype("int64")).to(device)
        loss = step_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"The loss became {value} at step {step}; the run in {folder} goes on from its "
                "last checkpoint: try --no-compile, then a lower --peak."
            )
        loss_sum = value if loss_sum == 0.0 else 0.98 * loss_sum + 0.02 * value
        if step % 20 == 0 and step > first:
            rate = (step - first) / (time.time() - begin)
            bar = progress_bar(step, steps, loss_sum, rate, rows * 128)
            print(f"\r{bar}   ", end="" if sys.stdout.isatty() else "\n", flush=True)
    print(flush=True)
    return model.cpu().eval()


CARD = """# tiny-gemma

A `Gemma2ForCausalLM` of {parameters:,} parameters ({layers} layers, d_model {width}, {heads} heads
of {head}, {kv} key-value heads, MLP {mlp}, vocabulary {vocab:,}, context {context}, sliding window
{window} on even layers), trained from nothing on {tokens:,} tokens of TinyWorld, the labelled text
generator of this course. It knows TinyWorld and nothing else: it is for taking apart, not for use.

Made by `make model`. `training_log.csv` has the loss beside the entropy floor, head scores and
skills at {checkpoints} checkpoints. Licence: MIT, like the course.

## What it can do

On text that it was not trained on (`python -m mi_helpers skills` measures this again):

```
{table}
```
"""


def model_card(model, folder: Path, rows: list) -> str:
    """The card's text: every number from the model, its log, or the measured skills."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    c = model.config
    return CARD.format(
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


def ship(folder: Path, model, target: Path = SHIPPED) -> None:
    """Write what the course loads: weights, config, tokenizer, training log, model card."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = skills.measure(model, skills.Suite(World(), tokenizer))
    target.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(target)
    for name in TOKENIZER:
        shutil.copyfile(folder / name, target / name)
    shutil.copyfile(folder / "log.csv", target / "training_log.csv")
    rows += skills.topic_rows(load_model(target))
    (target / "README.md").write_text(model_card(model, folder, rows), encoding="utf-8")
    write_manifest(target.parent)
    print(skills.table(rows))


def main_train(argv: list[str]) -> int:
    """`python -m mi_helpers train-model`: train, resumable, and ship the result."""
    parser = argparse.ArgumentParser(prog="python -m mi_helpers train-model")
    parser.add_argument("--steps", type=int, default=12_800, help="batches of 4,096 tokens")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "tiny_gemma")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    parser.add_argument("--no-ship", action="store_true", help="leave data/ as it is")
    options = parser.parse_args(argv)
    if options.steps < BLOCK or options.steps % BLOCK:
        parser.error(f"--steps is {options.steps}; it has to be a multiple of {BLOCK}.")
    run, compiled = options.run, not options.no_compile
    try:
        with alone_in(run):
            model = train(run, options.steps, options.peak, seed=options.seed, compiled=compiled)
            if not options.no_ship:
                ship(run, model)
                print(f"Shipped to {SHIPPED.relative_to(ROOT)}.")
    except InUse as error:
        print(error, file=sys.stderr)
        return 1
    return 0
