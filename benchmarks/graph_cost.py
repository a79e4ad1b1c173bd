"""`python -m benchmarks.graph_cost`: what an attribution graph costs, in seconds and memory.

    shipped   16 tokens on tiny-gemma, with the course's own transcoders
    tiny      the same with random transcoders of 2,304 latents, 32 of them at a token
    gemma     16 tokens on a model of Gemma 2 2B's shape with random weights, random transcoders of
              16,384 latents, 64 of them at a token, on two layers; 5.2 GB of weights in bfloat16

Each case runs in a process of its own, so that its peak memory is its own. Times depend on the
machine; tests time nothing. On tiny-gemma the closed form is timed beside autograd through Hugging
Face's own modules, in turn, in one process: medians of `TIMES`, and the least processor time, which
other programs hardly lengthen. Under 0.3 s are wanted.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from functools import partial

import torch

from mi_helpers.circuits.edges import METHODS, attribution_graph
from mi_helpers.circuits.graphs import FEATURE, Graph, graph_scores, prune
from mi_helpers.circuits.replacement import Transcoders
from mi_helpers.loading import empty_gemma2_2b, load_model, materialize
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.transcoders import coders_for

PROMPT = "the capital of the country of the Colosseum is the city of the old people"  # 16 tokens
CASES = ("shipped", "tiny", "gemma")
TIMES = 5


def random_coders(d_model: int, latents: int, k: int, layers: list[int]) -> dict[int, SparseCoder]:
    """A random TopK transcoder for each of these layers."""
    return {i: SparseCoder(d_model, latents, d_model, k=k, seed=2 * i) for i in layers}


def tiny_case(options: argparse.Namespace, shipped: bool = False) -> tuple[float, Graph]:
    """Seconds and graph of tiny-gemma; prints those of autograd."""
    model = load_model("tiny-gemma")
    layers = list(range(model.n_layers))
    coders = (
        coders_for(model, layers) if shipped else random_coders(model.d_model, 2304, 32, layers)
    )
    found = {method: [] for method in METHODS}
    for _ in range(TIMES + 1):  # the first of each pays for warming up
        for method, times in found.items():
            start = time.process_time()
            seconds, graph = timed(model, coders, PROMPT, options.max_features, method)
            times.append((seconds, time.process_time() - start))
    for method, times in found.items():
        seconds, processor = zip(*times[1:], strict=True)
        middle = statistics.median(seconds)
        print(f"  {method:12} {middle:6.3f} s, processor {min(processor):6.3f} s", flush=True)
    return statistics.median(seconds for seconds, _ in found["closed form"][1:]), graph


def gemma_case(options: argparse.Namespace) -> tuple[float, Graph]:
    """Seconds and graph of a model of Gemma 2 2B's shape; its MLPs elsewhere are all error."""
    dtype = torch.float32 if options.float32 else torch.bfloat16
    model = materialize(empty_gemma2_2b(), dtype)
    coders = random_coders(model.d_model, 16_384, 64, options.layers)
    ids = torch.randint(3, model.d_vocab, (15,), generator=torch.Generator().manual_seed(0))
    return timed(model, coders, [2, *ids.tolist()], options.max_features)


def timed(model, coders, prompt, max_features, method="closed form") -> tuple[float, Graph]:
    start = time.perf_counter()
    some = Transcoders(coders, allow_missing=True)
    graph = attribution_graph(model, some, prompt, max_features=max_features, method=method)
    return time.perf_counter() - start, graph


def peak_gib() -> float:
    """The most memory this process has held, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def report(case: str, options: argparse.Namespace) -> None:
    """Run one case and print its numbers."""
    cases = {"tiny": tiny_case, "shipped": partial(tiny_case, shipped=True), "gemma": gemma_case}
    seconds, graph = cases[case](options)
    start = time.perf_counter()
    small = prune(graph, 0.95, 0.98)
    pruning = time.perf_counter() - start
    replacement, completeness = graph_scores(graph)
    print(
        f"{case}: {seconds:.3f} s with {torch.get_num_threads()} threads, "
        f"peak {peak_gib():.2f} GiB; {len(graph)} nodes, {int(graph.mask(FEATURE).sum())} "
        f"features, {int((graph.adjacency != 0).sum())} edges; edge error "
        f"{graph.edge_error.absolute:.1e} (of the terms: {graph.edge_error.scaled:.1e}); pruned to "
        f"{len(small)} nodes in {pruning:.2f} s; replacement {replacement:.2f}, completeness "
        f"{completeness:.2f}",
        flush=True,
    )


def main() -> None:
    """Every case named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 18], help="of transcoders")
    parser.add_argument("--max-features", type=int, help="as attribution_graph takes it")
    parser.add_argument("--float32", action="store_true", help="gemma in float32: 10.5 GB")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}: choose of {CASES}")
    for case in options.cases or CASES:
        process = multiprocessing.get_context("spawn").Process(target=report, args=(case, options))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{case} ended with exit code {process.exitcode}")


if __name__ == "__main__":
    main()
