"""Patching sweeps and harvests against TransformerLens and nnsight: equal, and how much faster.

    python -m benchmarks.patching              tiny-gemma, three ways and this course's
    python -m benchmarks.patching --gemma      also Gemma 2 2B's shape (8 GB, some minutes)
    python -m benchmarks.patching --quick      short and rough

It runs in the environment of `benchmarks/requirements.txt`, on two threads. Every sweep is timed in
turn with the others, the activations of both prompts included, and the medians are compared; then
its numbers are compared with the peers'. The tables go to `results` and README.md here.
"""

import argparse
import copy
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mi_helpers import patching, prefix
from mi_helpers.files import DATA, put_between
from mi_helpers.loading import empty_gemma2_2b, load_model, materialize
from mi_helpers.models import LanguageModel
from mi_helpers.patching import LogitDiff, activation_patch, normalised_logit_diff
from mi_helpers.paths import path_patch_map
from mi_helpers.sweeps import HEAD_SITES, STREAM_SITES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "README.md"
THREADS = 2
PROMPT = (
    "{0} is an old city, and people live in {0}. People go to {0} to see the city. "
    "People who live in {0} live in the country of"
)
CITIES, COUNTRIES = ("Paris", "Rome"), (" France", " Italy")
BRIDGED = STREAM_SITES + HEAD_SITES
COLUMNS = ["what", "this course", "against", "theirs", "times faster", "wanted", "difference"]


@dataclass
class Task:
    """A model, two prompts of as many tokens, (1, pos), and a metric."""

    model: LanguageModel
    clean: Tensor
    corrupted: Tensor
    metric: LogitDiff

    def last(self, logits: Tensor) -> Tensor:
        """The metric from the logits of all positions."""
        return self.metric(logits[:, -1])


def cities(model: LanguageModel, times: int = 1) -> Task:
    """The prompt about two cities, 32 tokens, or about `times` as many."""
    texts = (" ".join([PROMPT] * times).format(city) for city in CITIES)
    clean, corrupted = (model.tokens(text) for text in texts)
    return Task(model, clean, corrupted, normalised_logit_diff(model, clean, corrupted, *COUNTRIES))


# ------------------------------------------------------------------------- one patch per forward


def forward_per_patch(task: Task, site: str, over: str, chosen: list | None = None) -> Tensor:
    """This course's own hooks, one whole forward for each patch (or each of the chosen ones)."""
    model = task.model
    _, cache = model.run_with_cache(task.clean, site, stop_at_layer=model.n_layers)
    values = []
    for layer, head, pos in chosen or places(model, task.clean.shape[1], over):
        where = (slice(None), pos) if head is None else (slice(None), pos, head)
        put = partial(put_in, where=where, value=cache[site, layer])
        with model.hooks({(site, layer): put}):
            values.append(task.last(model.forward(task.corrupted)))
    return torch.stack(values)


def put_in(x: Tensor, where: tuple, value: Tensor) -> Tensor:
    x[where] = value[where]
    return x


def places(model: LanguageModel, length: int, over: str) -> list[tuple]:
    """(layer, head, position) of every patch, in the order of `activation_patch`'s axes."""
    heads = range(model.n_heads) if "heads" in over else [None]
    positions = range(length) if "positions" in over else [slice(None)]
    return [(i, h, p) for i in range(model.n_layers) for h in heads for p in positions]


# ------------------------------------------------------------------------------ TransformerLens


class Lens:
    """TransformerLens' bridge around a copy of the model, and its own patching functions."""

    name = "TransformerLens"

    def __init__(self, model: LanguageModel, path: str):
        from transformer_lens import patching as theirs
        from transformer_lens.model_bridge import TransformerBridge

        self.patching = theirs
        self.bridge = TransformerBridge.boot_transformers(
            path, hf_model=copy.deepcopy(model.hf), dtype=model.dtype
        )

    def cache(self, ids: Tensor, hook: str, stop: int | None = None):
        keep = lambda name: name.endswith(hook)  # noqa: E731
        return self.bridge.run_with_cache(ids, names_filter=keep, stop_at_layer=stop)[1]

    def sweep(self, task: Task, site: str, over: str) -> Tensor:
        sweep, hook = {
            ("resid_pre", "positions"): (self.patching.get_act_patch_resid_pre, "hook_resid_pre"),
            ("z", "heads"): (self.patching.get_act_patch_attn_head_out_all_pos, "hook_z"),
            ("z", "heads x positions"): (
                self.patching.get_act_patch_attn_head_out_by_pos,
                "hook_z",
            ),
        }[site, over]
        found = sweep(self.bridge, task.corrupted, self.cache(task.clean, hook), task.last)
        return (found.transpose(1, 2) if found.ndim == 3 else found).flatten()

    def gap(self, model: LanguageModel, ids: Tensor) -> float:
        """The largest difference of the logits and of every layer's activations at `BRIDGED`."""
        logits, cache = model.run_with_cache(ids, BRIDGED)
        theirs, hooks = self.bridge.run_with_cache(ids)
        gaps = [(logits - theirs).abs().max()]
        for (site, layer), x in cache.items():
            hook = f"attn.hook_{site}" if site in HEAD_SITES else f"hook_{site}"
            gaps.append((x - hooks[f"blocks.{layer}.{hook}"].reshape(x.shape)).abs().max())
        return float(max(gaps))

    def harvest(self, ids: Tensor, layer: int) -> Tensor:
        hook = f"blocks.{layer}.hook_resid_post"
        return self.cache(ids, hook, stop=layer + 1)[hook]

    def direct_paths(self, task: Task, heads: list[tuple[int, int]]) -> Tensor:
        """(receivers, layers, heads): each earlier head's direct path to a head's query."""
        model = task.model
        clean, corrupted = (self.cache(x, "hook_z") for x in (task.clean, task.corrupted))
        found = self.patching.get_act_patch_direct_path_all_sources(
            self.bridge, task.corrupted, clean, corrupted, task.last, "q", verbose=False
        )
        found = torch.stack([found[:, :, i, h] for i, h in heads])
        for row, (layer, _) in zip(found, heads, strict=True):
            row[layer:] = task.last(model.forward(task.corrupted))  # no path
        return found


# -------------------------------------------------------------------------------------- nnsight


class Sight:
    """nnsight around a copy of a Gemma 2: one trace for each patch."""

    name = "nnsight"

    def __init__(self, model: LanguageModel):
        from nnsight import NNsight

        self.traced = NNsight(copy.deepcopy(model.hf))

    def sweep(self, task: Task, site: str, over: str) -> Tensor:
        traced, model, found, clean = self.traced, task.model, [], []
        with traced.trace(task.clean):
            for layer in range(model.n_layers):
                block = traced.model.layers[layer]
                source = block.input if site == "resid_pre" else block.self_attn.o_proj.input
                clean.append(source.save())
        for layer, head, pos in places(model, task.clean.shape[1], over):
            value, d = clean[layer], model.d_head
            with traced.trace(task.corrupted):
                block = traced.model.layers[layer]
                if head is None:
                    block.input[:, pos] = value[:, pos]
                else:
                    at = slice(head * d, head * d + d)
                    block.self_attn.o_proj.input[:, pos, at] = value[:, pos, at]
                last = traced.output.logits[:, -1].save()
            found.append(task.metric(last))
        return torch.stack(found)

    def harvest(self, ids: Tensor, layer: int) -> Tensor:
        with self.traced.trace(ids) as tracer:
            stream = self.traced.model.layers[layer].output.save()
            tracer.stop()
        return stream


# --------------------------------------------------------------------------------------- timing


def race(ways: dict[str, Callable], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds and result of each way, run in turn, after one run each to warm up."""
    results = {name: way() for name, way in ways.items()}
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}, results


def rows_of(what: str, ways: dict[str, Callable], repeats: int, wanted: dict) -> list[dict]:
    """One row for each rival of the way called "this course"."""
    times, results = race(ways, repeats)
    ours = times.pop("this course")
    rows = []
    for name, seconds in times.items():
        gap = (results["this course"].flatten() - results[name].flatten()).abs().max()
        gap = f"{float(gap):.1e}" if results[name].shape else ""
        limit = f">= {wanted[name]}" if name in wanted else ""
        cells = [what, duration(ours), name, duration(seconds), f"{seconds / ours:.1f}", limit, gap]
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
        print(line(cells), flush=True)
    return rows


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def line(cells: list[str]) -> str:
    widths = (54, 11, 23, 10, 12, 8, 10)
    return " ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True))


# ------------------------------------------------------------------------------------ the tables


def tiny_gemma(quick: bool) -> list[dict]:
    """The shipped model: sweeps against the peers and against one forward per patch; harvest."""
    model, repeats, rows = load_model(), 1 if quick else 5, []
    task, long = cities(model), cities(model, times=3)
    peers = [Lens(model, str(DATA / "tiny_gemma")), Sight(model)]
    what = f"logits, and activations at {len(BRIDGED)} sites"
    cells = [what, "", peers[0].name, "", "", "", f"{peers[0].gap(model, task.clean):.1e}"]
    rows.append(dict(zip(COLUMNS, cells, strict=True)))
    print(line(cells), flush=True)
    wanted = {
        ("resid_pre", "positions"): {"TransformerLens": 8, "nnsight": 5},
        ("z", "heads x positions"): {"TransformerLens": 10, "nnsight": 6},
        ("z", "heads"): {},
    }
    for (site, over), limits in wanted.items():
        ways = {"this course": partial(sweep, task, site, over)}
        ways |= {peer.name: partial(peer.sweep, task, site, over) for peer in peers}
        ways["one patch per forward"] = partial(forward_per_patch, task, site, over)
        what = f"{site}, layers x {over}, {task.clean.shape[1]} tokens"
        rows += rows_of(what, ways, repeats, limits)
    for given in (task, long):
        ways = {"this course": partial(sweep, given, "resid_pre", "positions")}
        ways["prefix computed anew"] = partial(sweep, given, "resid_pre", "positions", False)
        what = f"resid_pre, layers x positions, {given.clean.shape[1]} tokens"
        rows += rows_of(what, ways, repeats, {})

    layer = model.n_layers // 2 - 1
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.d_vocab, (32, model.n_ctx), generator=rng)
    ways = {"this course": partial(harvest, model, ids, layer)}
    ways |= {peer.name: partial(peer.harvest, ids, layer) for peer in peers}
    ways["whole forward"] = partial(harvest, model, ids, layer, whole=True)
    what = f"harvest, resid_post {layer}, {ids.shape[0]} x {ids.shape[1]} tokens"
    return rows + rows_of(what, ways, 2 * repeats + 1, {"whole forward": 2.5})


def sweep(task: Task, site: str, over: str, reuse_prefix: bool = True) -> Tensor:
    how = partial(prefix.run_edits, reuse_prefix=reuse_prefix)
    with mock.patch.object(patching, "run_edits", how):
        return activation_patch(
            task.model, task.clean, task.corrupted, site, task.metric, over=over
        )


def harvest(model: LanguageModel, ids: Tensor, layer: int, whole: bool = False) -> Tensor:
    stop = None if whole else layer + 1
    return model.run_with_cache(ids, ("resid_post", layer), stop)[1]["resid_post", layer]


def direct_paths(quick: bool) -> list[dict]:
    """Path patching on a random Llama of tiny-gemma's size: TransformerLens refuses Gemma 2's
    post-norms, and keys and values of grouped queries."""
    tiny = load_model()
    config = LlamaConfig(
        vocab_size=tiny.d_vocab,
        hidden_size=tiny.d_model,
        intermediate_size=tiny.d_mlp,
        num_hidden_layers=tiny.n_layers,
        num_attention_heads=tiny.n_heads,
        num_key_value_heads=tiny.n_kv_heads,
        head_dim=tiny.d_head,
        max_position_embeddings=tiny.n_ctx,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
        hf.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
        model = load_model(folder)
        task, peer = cities(model), Lens(model, folder)
    task.metric = LogitDiff(task.metric.answer, task.metric.wrong)  # random: nothing to normalise
    heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]

    def paths() -> Tensor:
        args = (model, task.clean, task.corrupted)
        return torch.stack(
            [path_patch_map(*args, [("q", *head)], task.metric, "denoise") for head in heads]
        )

    ways = {"this course": paths, "TransformerLens": lambda: peer.direct_paths(task, heads)}
    what = "random Llama, path of each head to each later query"
    return rows_of(what, ways, 1 if quick else 3, {})


def gemma_2_2b(quick: bool) -> list[dict]:
    """Gemma 2 2B's shape in bfloat16 with random weights, 16 tokens: the residual sweep.

    One patch per forward is timed on every 20th patch, spread over layers and positions alike.
    """
    model = materialize(empty_gemma2_2b(), torch.bfloat16)
    length, every = 16, 60 if quick else 20
    rng = torch.Generator().manual_seed(0)
    clean = torch.randint(4, model.d_vocab - 1, (1, length), generator=rng)
    corrupted = clean.clone()
    corrupted[:, 1] += 1
    task = Task(model, clean, corrupted, LogitDiff(torch.tensor([5]), torch.tensor([6])))
    times, found = race({"ours": partial(sweep, task, "resid_pre", "positions")}, 1)
    chosen = places(model, length, "positions")[3::every]
    start = time.perf_counter()
    theirs = forward_per_patch(task, "resid_pre", "positions", chosen)
    n = model.n_layers * length
    seconds = (time.perf_counter() - start) / len(chosen) * n
    values = found["ours"].flatten()[3::every]
    cells = [
        f"Gemma 2 2B's shape, bf16: resid_pre, layers x positions, {length} tokens",
        duration(times["ours"]),
        "one patch per forward",
        duration(seconds),
        f"{seconds / times['ours']:.1f}",
        ">= 3.5",
        f"{float((values - theirs).abs().max()):.1e}",
    ]
    print(line(cells))
    return [dict(zip(COLUMNS, cells, strict=True))]


# --------------------------------------------------------------------------------- what is written

TABLES = {"tiny_gemma": tiny_gemma, "direct_paths": direct_paths, "gemma_2_2b": gemma_2_2b}
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def save(name: str, rows: list[dict], folder: Path = RESULTS) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(folder: Path = RESULTS) -> str:
    """All tables that were measured, as one, between the markers."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                lines += ["| " + " | ".join(row.values()) + " |" for row in csv.DictReader(file)]
    return "\n".join([BEGIN, "", *lines, "", END])


def update_page(path: Path = PAGE, folder: Path = RESULTS) -> bool:
    """Put the tables between the markers; False where there are none."""
    return put_between(path, BEGIN, END, markdown(folder))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patching", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gemma", action="store_true", help="also Gemma 2 2B's shape")
    parser.add_argument("--quick", action="store_true", help="few repeats; nothing is written")
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args(argv)
    names = [options.only] if options.only else list(TABLES)
    if not options.gemma and options.only is None:
        names.remove("gemma_2_2b")
    torch.set_num_threads(options.threads)
    print(line(COLUMNS))
    with torch.no_grad():
        for name in names:
            rows = TABLES[name](options.quick)
            if not options.quick:
                save(name, rows)
    if not options.quick and not update_page():
        print(f"{PAGE.name} has no markers {BEGIN} … {END}: put them where the tables should be.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
