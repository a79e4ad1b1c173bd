"""tiny-gemma: a small Gemma 2 trained from nothing on TinyWorld. `make model` ships it.

A run is a folder: `model-STEP.safetensors` and `moments-STEP.safetensors` of the last checkpoint,
`state.json`, and `log.csv`. Started again, it goes on from there: the text of block b of the run
depends on the seed and on b alone.
"""

import contextlib
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from mi_helpers.files import RunError, read_json, sweep, write_atomically, write_json
from mi_helpers.tiny_gemma.log import Log
from mi_helpers.tiny_gemma.skills import Suite
from mi_helpers.tiny_gemma.step import make_loss
from mi_helpers.tinyworld import statements
from mi_helpers.tinyworld.tokenizer import train_tokenizer
from mi_helpers.tinyworld.world import World, batches

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
STATE = "state.json"
BLOCK = 100  # steps whose text is one stream; a run goes on from a multiple of it
PARTS = 2  # of a batch, each with a text of its own; the gradient is their mean
FOCUS = 6  # then 45 % of the text is verdicts
TOLD = 0.5  # and before this share of them stands what is so


def config(vocab_size: int = 3_953) -> Gemma2Config:
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


@dataclass(frozen=True)
class Recipe:
    """What a run is, apart from its text and its shape.

    Args:
        steps: batches of rows × length tokens; a multiple of 100
        peak: highest learning rate, after `warm_up` steps; a hundredth of it in the tail
        betas: AdamW's
        weight_decay: of matrices only (the embedding is one; norms' gains do not decay)
        rows: of a batch, which is the mean of PARTS parts
        length: tokens of a row
        seed: of the first weights and of the text
        judging: before the first of these steps there are receivers (`ioi`) in place of verdicts,
            then, until the second, FOCUS times as many verdicts as afterwards, of which TOLD come
            after what is so (`statements.told`); multiples of 100. To judge, a model compares what
            is said with what it knows. Before it can do the one and knows the other, verdicts are a
            coin's, and it learns to look at nothing before them. Nor does it learn to judge at
            learning rates of 2e-3
        warm_up: steps in which the learning rate rises
        tail: steps at the lowest learning rate, where probabilities settle
        bf16: the large products in bfloat16, sums and weights in float32: twice as fast where a
            processor has such products (avx512_bf16, AMX), slower elsewhere; always on CUDA
        workers: processes that share a step on a CPU, 1 or 2; 0: as many as are of use
        compiled: by torch.compile, which needs a C++ compiler; the same step without it otherwise
        save_every: steps between checkpoints, a multiple of 100

    Raises:
        ValueError: steps or save_every is no multiple of 100, or workers is not 0, 1 or 2.
    """

    steps: int = 16_000
    peak: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    rows: int = 32
    length: int = 128
    seed: int = 0
    judging: tuple[int, int] = (9_000, 13_000)
    warm_up: int = 200
    tail: int = 800
    bf16: bool = False
    workers: int = 0
    compiled: bool = True
    save_every: int = 500

    def __post_init__(self):
        for name in ("steps", "save_every"):
            value = getattr(self, name)
            if value < BLOCK or value % BLOCK:
                raise ValueError(f"{name} is {value}; it has to be a multiple of {BLOCK}.")
        if not 0 <= self.workers <= PARTS:
            raise ValueError(f"workers is {self.workers}; a batch has {PARTS} parts.")


def learning_rate(step: int, c: Recipe) -> float:
    """Linear warm-up, a cosine down to a hundredth of the peak, and that for the tail's steps.

    The tail is for probabilities that no single text shows: the largest error of the 40
    occupations' pronouns went from 0.051 to 0.036 in it, in phrasings that were trained on. In
    unseen phrasings it did nothing for it (0.117 and 0.134).
    """
    if step < c.warm_up:
        return c.peak * (step + 1) / c.warm_up
    progress = (step - c.warm_up) / max(1, c.steps - c.tail - c.warm_up)
    return c.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Parts:
    """One process's share of the steps: the text of its parts of a batch, and their gradients."""

    def __init__(self, model, c: Recipe, world: World, tokenizer, parts: list[int]):
        # oneDNN's products, not MKL's, which are half as fast on AMD. They are float32's on CPUs
        # without AMX; with AMX, this allows factors in bfloat16.
        torch.set_float32_matmul_precision("medium")
        loss = make_loss(model, c.length, c.bf16 or model.device.type == "cuda")
        self.loss = torch.compile(loss) if c.compiled else loss
        self.model, self.c, self.world, self.tokenizer = model, c, world, tokenizer
        self.parts, self.block, self.streams = parts, None, []

    def world_at(self, step: int) -> World:
        """The world with the mixture of families that is read at a step, see `Recipe.judging`."""
        first, after = self.c.judging
        if step >= after:
            return self.world
        weights = dict(zip(self.world.mixture.items, self.world.mixture.probs, strict=True))
        truth = weights.pop("truth")
        if step < first:
            return World({**weights, "ioi": weights["ioi"] + truth})
        told = {"truth": FOCUS * (1 - TOLD) * truth, "told": FOCUS * TOLD * truth}
        world = World({**weights, **told})
        world.families = {**world.families, "told": statements.told}
        return world

    def text(self, step: int) -> list[Tensor]:
        """The parts' token ids at `step`; steps are asked for in order within a block."""
        if self.block != step // BLOCK:
            self.block = step // BLOCK
            seeds = [(self.c.seed * 1_000_003 + self.block) * PARTS + part for part in self.parts]
            world = self.world_at(step)
            self.streams = [
                batches(world, self.tokenizer, seed, self.c.length, self.c.rows // PARTS)
                for seed in seeds
            ]
        device = self.model.device
        return [torch.from_numpy(next(s).astype("int64")).to(device) for s in self.streams]

    def __call__(self, step: int) -> float:
        """Add the parts' gradients, of the mean over all PARTS, to the weights'; their loss."""
        total = 0.0
        for ids in self.text(step):
            loss = self.loss(ids) / PARTS
            loss.backward()
            total += loss.item()
        return total


def helper(pipe, model, gradient: Tensor, threads: int, *share) -> None:
    """A second process: for each step that it is sent, gradients into shared memory, and the loss.

    It ends when the first process does: then the pipe is closed.
    """
    torch.set_num_threads(threads)
    work = Parts(model, *share)
    with contextlib.suppress(EOFError, KeyboardInterrupt, ConnectionError):
        while True:
            loss = work(pipe.recv())
            torch.cat([p.grad.flatten() for p in model.parameters()], out=gradient)
            model.zero_grad(set_to_none=True)
            pipe.send(loss)


@contextlib.contextmanager
def gradients(model, c: Recipe, world: World, tokenizer):
    """step → loss, which leaves a batch's gradients in the weights.

    On a CPU each of `workers` processes takes its parts of the batch: two threads that meet once
    per step lose less time than two that meet in every product. The weights are in shared memory.
    Equal text, whatever the number of workers; gradients are equal to rounding.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    workers = c.workers or min(PARTS, threads)
    if model.device.type == "cuda" or workers == 1:
        try:
            yield Parts(model, c, world, tokenizer, list(range(PARTS)))
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    each = max(1, threads // workers)
    model.share_memory()
    spawn, others = torch.multiprocessing.get_context("spawn"), []
    for rank in range(1, workers):
        ours, theirs = spawn.Pipe()
        gradient = torch.empty(sum(p.numel() for p in model.parameters())).share_memory_()
        share = (c, world, tokenizer, list(range(rank, PARTS, workers)))
        process = spawn.Process(
            target=helper, args=(theirs, model, gradient, each, *share), daemon=True
        )
        process.start()
        theirs.close()
        others.append((process, ours, gradient))
    work = Parts(model, c, world, tokenizer, list(range(0, PARTS, workers)))
    sizes = [p.numel() for p in model.parameters()]

    def step_loss(step: int) -> float:
        torch.set_num_threads(each)
        for _, pipe, _ in others:
            pipe.send(step)
        loss = work(step)
        for _, pipe, gradient in others:
            try:
                loss += pipe.recv()
            except EOFError:
                raise RuntimeError(
                    f"A worker process ended at step {step}, perhaps for want of memory: the same "
                    "command goes on from the last checkpoint, and with --workers 1 needs less."
                ) from None
            for p, other in zip(model.parameters(), gradient.split(sizes), strict=True):
                p.grad += other.view_as(p)
        torch.set_num_threads(threads)
        return loss

    try:
        yield step_loss
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for process, pipe, _ in others:
            pipe.close()
            process.join()


def adamw(model, c: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": c.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=c.peak, betas=c.betas, fused=True)


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


def progress_bar(step: int, steps: int, loss: float, rate: float, tokens: int) -> str:
    done = round(30 * step / steps)
    left = (steps - step) / max(rate, 1e-9)
    return (
        f"[{'#' * done}{'.' * (30 - done)}] {step}/{steps} loss {loss:.3f} "
        f"{rate * tokens:,.0f} tokens/s {left / 60:.0f} min left"
    )


def train(
    folder: Path,
    c: Recipe = Recipe(),
    world: World | None = None,
    tokenizer=None,
    model_config: Gemma2Config | None = None,
    model: Gemma2ForCausalLM | None = None,
) -> Gemma2ForCausalLM:
    """Train tiny-gemma by AdamW, gradient norm clipped at 1; resumes what is in `folder`.

    `model` is trained on; without it a new one is made. Returns the model, on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = world or World()
    if tokenizer is None:
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(world).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(c.seed)
    model = (model or Gemma2ForCausalLM(model_config or config(len(tokenizer)))).to(device)
    model.config.save_pretrained(folder)
    model.requires_grad_(True)  # a loaded one is frozen
    optimizer = adamw(model, c)
    state = load_run(folder, model, optimizer)
    start = state.get("step", 0)
    log = Log(folder, Suite(world, tokenizer, small=True), c.steps, c.rows * c.length, state)
    average = state.get("loss", 0.0)
    before, begin = state.get("seconds", 0.0), time.time()
    with gradients(model, c, world, tokenizer) as step_loss:
        for step in range(start, c.steps + 1):
            seconds = before + time.time() - begin
            log.at(step, model, seconds=round(seconds), train_loss=round(average, 4))
            if step > start and (step % c.save_every == 0 or step == c.steps):
                state = {"step": step, "loss": average, "seconds": seconds, "rise": log.rise}
                save_run(folder, model, optimizer, state)
                log.prune(step)
            if step == c.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c)
            loss = step_loss(step)
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"The loss became {loss} at step {step}; the run in {folder} goes on from its "
                    "last checkpoint: try --no-compile, then a lower --peak."
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = loss if average == 0.0 else 0.98 * average + 0.02 * loss
            if step % 20 == 0 and step > start:
                rate = (step - start) / (time.time() - begin)
                bar = progress_bar(step, c.steps, average, rate, c.rows * c.length)
                print(f"\r{bar}   ", end="" if sys.stdout.isatty() else "\n", flush=True)
    print(flush=True)
    return model.cpu().eval()
