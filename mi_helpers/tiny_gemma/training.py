"""tiny-gemma: a small Gemma 2 trained from nothing on TinyWorld. `make model` runs `main_train`.

A run is a folder: `model.safetensors` and `optimizer.safetensors` of the last checkpoint,
`state.json`, and `log.csv`. Started again, it goes on from there: the text of block b of the run
depends on the seed and on b alone. A step computes what Hugging Face's model does, to float32's
rounding (tests/test_tiny_gemma.py), in a half to a third of the time.
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
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
BLOCK = 100  # steps whose text is one stream; a run goes on from a multiple of it
PARTS = 2  # of a batch, each with a text of its own; the gradient is their mean
CHUNK = 512  # rows of logits that exist at a time
RISEN = 0.3  # induction has risen when the highest score of any head is above this
DENSE, SPARSE, AROUND = 50, 400, 500  # steps between rows of the log; the dense ones' distance


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


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, apart from its text and its shape.

    steps         batches of rows × length tokens
    peak          highest learning rate, after `warm_up` steps; a hundredth of it in the `tail`
    betas         AdamW's
    weight_decay  of matrices only (the embedding is one; norms' gains do not decay)
    rows, length  of a batch, which is the mean of PARTS parts
    bf16          the large products in bfloat16, sums and weights in float32: a third faster where
                  a processor has such products (avx512_bf16, AMX), slower elsewhere. Always on CUDA
    workers       processes that share a step on a CPU, PARTS at most; 0: as many as are of use
    compiled      torch.compile, which needs a C++ compiler; the same step without it otherwise
    save_every    steps between checkpoints, a multiple of BLOCK
    """

    steps: int = 16_000
    peak: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    rows: int = 32
    length: int = 128
    seed: int = 0
    warm_up: int = 200
    tail: int = 800
    bf16: bool = False
    workers: int = 0
    compiled: bool = True
    save_every: int = 500


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up, a cosine down to a hundredth of the peak, and that for the tail's steps.

    The tail is for probabilities that no single text shows: the largest error of the 40
    occupations' pronouns went from 0.051 to 0.036 in it, in phrasings that were trained on. In
    unseen phrasings it did nothing for it (0.117 and 0.134).
    """
    if step < c.warm_up:
        return c.peak * (step + 1) / c.warm_up
    progress = (step - c.warm_up) / max(1, c.steps - c.tail - c.warm_up)
    return c.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def is_logged(step: int, steps: int, rise: int | None) -> bool:
    """Whether the log has a row: every SPARSE steps, and every DENSE ones around the rise.

    `rise` is the first multiple of DENSE at which the highest induction score is above RISEN.
    """
    near = rise is not None and abs(step - rise) <= AROUND
    return step in (0, steps) or step % (DENSE if near else SPARSE) == 0


# -- the step: what Gemma2ForCausalLM and the cross entropy compute, in fewer and larger parts ----


def tanh(x: Tensor) -> Tensor:
    """tanh through exp, which the compiler has at a quarter of the price; 2e-7 off at most."""
    return 2 * torch.sigmoid(2 * x) - 1


class Bf16Product(torch.autograd.Function):
    """x Wᵀ with factors in bfloat16, forward and backward; sums, and what goes on, in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).float()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return (gradient @ weight).float(), (gradient.t() @ x).float()


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy of x Wᵀ, soft-capped, and its gradients, a few hundred rows at a time.

    With u = x · W / cap and logits l = cap tanh u, the loss of a row with target y is
    log Σ exp l - l_y, and its derivative by x · W is (softmax l - [y]) (1 - tanh² u). So the
    gradients are there as soon as the logits are, and no matrix of all logits ever exists. Since
    |l| ≤ cap, exp cannot overflow; the targets' own terms are a product of rows, apart.
    """

    @staticmethod
    def forward(ctx, x, weight, target, cap, bf16):
        n, kind = len(x), torch.bfloat16 if bf16 else x.dtype
        w = weight.to(kind)
        at_target = weight[target]
        t = tanh((x * at_target).sum(-1, keepdim=True) / cap)
        loss = -cap * t.sum()
        own = (1 - t * t) / n
        x_gradients, w_gradient = [], torch.zeros_like(weight).index_add(0, target, -own * x)
        for part in x.to(kind).chunk(-(-n // CHUNK)):
            t = tanh((part @ w.t()).float() / cap)
            p = torch.exp(cap * t)
            total = p.sum(-1, keepdim=True)
            loss = loss + total.log().sum()
            slope = (p * (1 - t * t) * (1 / (n * total))).to(kind)
            x_gradients.append((slope @ w).float())
            w_gradient = w_gradient + (slope.t() @ part).float()
        ctx.save_for_backward(torch.cat(x_gradients) - own * at_target, w_gradient)
        return loss / n

    @staticmethod
    def backward(ctx, gradient):
        x_gradient, w_gradient = ctx.saved_tensors
        return gradient * x_gradient, gradient * w_gradient, None, None, None


def make_loss(model: Gemma2ForCausalLM, length: int, bf16: bool = False):
    """loss(ids (rows, length)) of a Gemma 2 with soft caps and without biases: the mean over
    tokens 1 … length - 1. `model` keeps its weights, and gets the gradients.

    One product for q, k and v, one for gate and up; tables and masks made once; the query heads
    that share a key-value head are one matrix. For the softmax see `NextTokenLoss`.
    """
    c, core = model.config, model.model
    device = model.device
    heads, groups, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    shared, half = heads // groups, width // 2
    cap, scale = c.attn_logit_softcapping, c.query_pre_attn_scalar**-0.5
    product = Bf16Product.apply if bf16 else F.linear
    position = torch.arange(length, device=device)
    with torch.no_grad():
        cos, sin = core.rotary_emb(torch.zeros(1, device=device), position[None])
    cos, sin = cos[0, :, None], sin[0, :, None]  # (length, 1, width)
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    distance = position[:, None] - position
    windows = [layer.self_attn.sliding_window or length for layer in core.layers]
    masks = [((distance >= 0) & (distance < w)).float().repeat(shared, 1) for w in windows]

    def norm(x, of):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + of.eps) * (1 + of.weight)

    def rotate(x):
        return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin

    def attention(x, of, mask):  # x (rows · length, d_model)
        weight = torch.cat([of.q_proj.weight, of.k_proj.weight, of.v_proj.weight])
        qkv = product(x, weight).view(-1, length, heads + 2 * groups, width)
        q, k, v = qkv.split([heads, groups, groups], 2)
        q = rotate(q).view(-1, length, groups, shared, width).permute(0, 2, 3, 1, 4)
        q = q.reshape(-1, shared * length, width)  # (rows · groups, …)
        k = rotate(k).transpose(1, 2).reshape(-1, length, width)
        v = v.transpose(1, 2).reshape(-1, length, width)
        scores = cap * tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / cap))
        pattern = torch.exp(scores) * mask
        pattern = pattern / pattern.sum(-1, keepdim=True)
        z = torch.bmm(pattern, v).view(-1, groups, shared, length, width)
        return product(z.permute(0, 3, 1, 2, 4).reshape(-1, heads * width), of.o_proj.weight)

    def mlp(x, of):
        gate, up = product(x, torch.cat([of.gate_proj.weight, of.up_proj.weight])).chunk(2, -1)
        u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3))
        return product(gate * torch.sigmoid(2 * u) * up, of.down_proj.weight)  # GELU, tanh's

    def loss(ids):
        embedding = core.embed_tokens
        x = F.embedding(ids.flatten(), embedding.weight, embedding.padding_idx)
        x = x * embedding.scalar_embed_scale
        for layer, mask in zip(core.layers, masks, strict=True):
            y = attention(norm(x, layer.input_layernorm), layer.self_attn, mask)
            x = x + norm(y, layer.post_attention_layernorm)
            y = mlp(norm(x, layer.pre_feedforward_layernorm), layer.mlp)
            x = x + norm(y, layer.post_feedforward_layernorm)
        x = norm(x, core.norm).view(-1, length, c.hidden_size)[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        return NextTokenLoss.apply(x, model.lm_head.weight, target, c.final_logit_softcapping, bf16)

    return loss


class Parts:
    """One process's share of the steps: the text of its parts of a batch, and their gradients."""

    def __init__(self, model, c: TrainConfig, world: World, tokenizer, parts: list[int]):
        # oneDNN's products, not MKL's, which are half as fast on AMD. They are float32's on CPUs
        # without AMX; with AMX, this allows factors in bfloat16.
        torch.set_float32_matmul_precision("medium")
        loss = make_loss(model, c.length, c.bf16 or model.device.type == "cuda")
        self.loss = torch.compile(loss) if c.compiled else loss
        self.model, self.c, self.world, self.tokenizer = model, c, world, tokenizer
        self.parts, self.block, self.streams = parts, None, []

    def text(self, step: int) -> list[Tensor]:
        """The parts' token ids at `step`; steps are asked for in order within a block."""
        if self.block != step // BLOCK:
            self.block = step // BLOCK
            seeds = [(self.c.seed * 1_000_003 + self.block) * PARTS + part for part in self.parts]
            self.streams = [
                batches(self.world, self.tokenizer, seed, self.c.length, self.c.rows // PARTS)
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
def gradients(model, c: TrainConfig, world: World, tokenizer):
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


# -- the run ---------------------------------------------------------------------------------------


def adamw(model, c: TrainConfig) -> torch.optim.AdamW:
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


def log_row(path: Path, row: dict) -> None:
    """Append a row to a CSV, with a header when it is new."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_log(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_log(path: Path, rows: list[dict]) -> None:
    """All rows at once, in the order of their steps."""

    def write(to: Path) -> None:
        to.touch()
        for row in sorted(rows, key=lambda row: int(row["step"])):
            log_row(to, row)

    write_atomically(path, write)


def keep_log_until(path: Path, step: int) -> None:
    """Drop rows that a killed run wrote after its last checkpoint."""
    if path.exists():
        write_log(path, [row for row in read_log(path) if int(row["step"]) <= step])


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


class Log:
    """A run's `log.csv`: dense where induction rises, which is known only afterwards.

    Until it has risen, every DENSE steps cost a measurement of the heads and a copy of the weights
    (`copy-STEP.safetensors`), from which the rows before the rise are written when it comes.
    """

    def __init__(self, folder: Path, suite: skills.Suite, c: TrainConfig, state: dict):
        self.folder, self.suite, self.c = folder, suite, c
        self.path, self.rise, self.start = folder / "log.csv", state.get("rise"), state.get("step")
        keep_log_until(self.path, -1 if self.start is None else self.start)

    def write(self, model, about: dict) -> None:
        """The row of the model as it is; `about` has its step."""
        row = {**about, **self.suite.brief(model)}
        log_row(self.path, row)
        print(f"\n{json.dumps(row)}", flush=True)

    def at(self, step: int, model, about: dict) -> None:
        """What the log needs at a step, a multiple of DENSE, before it is taken."""
        if step == self.start:  # was done before the run was interrupted
            return
        about = {"step": step, "tokens": step * self.c.rows * self.c.length, **about}
        model.eval()
        if self.rise is None:
            if self.suite.head_scores(model)[0] > RISEN:
                self.rise = step
                self.fill(model)
            else:
                tensors = {name: p.detach() for name, p in model.named_parameters()}
                said = {"about": json.dumps(about)}
                path = self.folder / f"copy-{step}.safetensors"
                write_atomically(path, lambda to: save_file(tensors, to, said))
        if is_logged(step, self.c.steps, self.rise):
            self.write(model, about)
        model.train()

    def copies(self) -> dict[int, Path]:
        """Step → copy of the weights."""
        found = {int(p.stem.split("-")[1]): p for p in self.folder.glob("copy-*.safetensors")}
        return dict(sorted(found.items()))

    def fill(self, model) -> None:
        """The rows before the rise that the log does not have, and all rows in order."""
        past = copy.deepcopy(model)
        parameters = dict(past.named_parameters())
        there = {int(row["step"]) for row in read_log(self.path)} if self.path.exists() else set()
        for step, path in self.copies().items():
            if self.rise - AROUND <= step < self.rise and step not in there:
                for name, value in load_file(path).items():
                    parameters[name].data.copy_(value)
                with safe_open(path, "pt") as file:
                    self.write(past, json.loads(file.metadata()["about"]))
        if self.path.exists():
            write_log(self.path, read_log(self.path))

    def prune(self, step: int) -> None:
        """With a checkpoint at `step`: drop the copies that no rise after it can need."""
        for at, path in self.copies().items():
            if self.rise is not None or at < step - AROUND:
                path.unlink()


def train(
    folder: Path,
    c: TrainConfig = TrainConfig(),
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
            tokenizer_to(folder, world)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(c.seed)
    model = (model or Gemma2ForCausalLM(model_config or config(len(tokenizer)))).to(device)
    model.config.save_pretrained(folder)
    optimizer = adamw(model, c)
    state = load_run(folder, model, optimizer)
    start = state.get("step", 0)
    log = Log(folder, skills.Suite(world, tokenizer, small=True), c, state)
    average = state.get("loss", 0.0)
    before, begin = state.get("seconds", 0.0), time.time()
    with gradients(model, c, world, tokenizer) as step_loss:
        for step in range(start, c.steps + 1):
            seconds = before + time.time() - begin
            if step % DENSE == 0 or step == c.steps:
                about = {"seconds": round(seconds), "train_loss": round(average, 4)}
                log.at(step, model, about)
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
    new = TrainConfig()
    parser.add_argument("--steps", type=int, default=new.steps, help="batches of 4,096 tokens")
    parser.add_argument("--peak", type=float, default=new.peak, help="highest learning rate")
    parser.add_argument("--betas", type=float, nargs=2, default=new.betas, help="of AdamW")
    parser.add_argument("--weight-decay", type=float, default=new.weight_decay, help="of matrices")
    parser.add_argument("--seed", type=int, default=new.seed)
    parser.add_argument("--workers", type=int, default=0, help="processes on a CPU: 1 or 2")
    parser.add_argument("--bf16", action="store_true", help="for CPUs with avx512_bf16 or AMX")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "tiny_gemma")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    parser.add_argument("--no-ship", action="store_true", help="leave data/ as it is")
    options = parser.parse_args(argv)
    if options.steps < BLOCK or options.steps % BLOCK:
        parser.error(f"--steps is {options.steps}; it has to be a multiple of {BLOCK}.")
    if not 0 <= options.workers <= PARTS:
        parser.error(f"--workers is {options.workers}; a batch has {PARTS} parts.")
    c = TrainConfig(
        options.steps,
        options.peak,
        tuple(options.betas),
        options.weight_decay,
        seed=options.seed,
        bf16=options.bf16,
        workers=options.workers,
        compiled=not options.no_compile,
    )
    try:
        with alone_in(options.run):
            model = train(options.run, c)
            if not options.no_ship:
                ship(options.run, model)
                print(f"Shipped to {SHIPPED.relative_to(ROOT)}.")
    except InUse as error:
        print(error, file=sys.stderr)
        return 1
    return 0
