"""The ledger: every result that a lesson reproduces, with its source, ours, and a verdict.

`data/claims.csv` holds what was measured. What is claimed stands in `claims.py` of each lesson's
room, above the function that measures it. To add a row, write `measure(seed) -> float` there with
`@claim(...)` above it, and run `python -m mi_helpers claims --measure LESSON`.

    python -m mi_helpers claims                 the table; exit code 1 when a claim fails
    python -m mi_helpers claims --measure 1     measure lesson 1 anew over its seeds, write the rows
    python -m mi_helpers claims --readme        write the table between the markers in README.md
"""

import csv
import functools
import importlib
import importlib.util
import io
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import tyro

from mi_helpers.course.check import lesson_numbers
from mi_helpers.files import put_between, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "data" / "claims.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
HOLDS, FAILS, UNMEASURED = "holds", "fails", "not measured"
COLUMNS = "lesson id claim source published ours sd seeds tolerance verdict".split()


@dataclass(frozen=True)
class Claim:
    """One claim.

    id         a short name, unique over all lessons
    claim      what is claimed, with the settings it holds for
    source     paper with its figure, table or section; or "derived", with the formula
    published  the source's value, or the derived one, such as "2/5" or "0.784"; "" where the
               source gives none
    tolerance  "± 0.02" of the published value, or a bound on ours: ">= 0.9", "<= 1e-5"
    measure    the function (seed) -> float that measures it once
    seeds      how many seeds are measured: 0, 1, …
    fast       whether the tests measure one seed again
    """

    lesson: int
    id: str
    claim: str
    source: str
    published: str
    tolerance: str
    measure: Callable[[int], float] | str
    seeds: int = 5
    fast: bool = True

    def value(self, seed: int) -> float:
        """Measure it once."""
        if callable(self.measure):
            return float(self.measure(seed))
        module, function = self.measure.split(":")
        return float(getattr(importlib.import_module(module), function)(seed))


def claim(
    id: str,
    claim: str,
    *,
    source: str,
    tolerance: str,
    published: str = "",
    seeds: int = 5,
    fast: bool = True,
) -> Callable[[Callable], Callable]:
    """Declare what a function measures; it stands above the function in a lesson's `claims.py`."""

    def declare(measure: Callable[[int], float]) -> Callable[[int], float]:
        lesson = int(re.search(r"lesson_(\d\d)", measure.__module__)[1])
        measure.claim = Claim(lesson, id, claim, source, published, tolerance, measure, seeds, fast)
        return measure

    return declare


@functools.cache
def all_claims() -> list[Claim]:
    """The claims of every lesson, in the order in which they are declared."""
    found = []
    for number in lesson_numbers():
        name = f"mi_helpers.lessons.lesson_{number:02d}.claims"
        if importlib.util.find_spec(name):
            values = vars(importlib.import_module(name)).values()
            found += [each.claim for each in values if hasattr(each, "claim")]
    return sorted(found + CLAIMS, key=lambda each: each.lesson)


CLAIMS = [
    Claim(
        0,
        "stream-sum",
        "embed + Σ attn_out + Σ mlp_out against the final residual, relative to its largest entry",
        "Elhage et al. 2021, A Mathematical Framework, Residual Stream as a Communication Channel",
        "0",
        "<= 1e-5",
        "mi_helpers.lessons.lesson_00.claims:stream_sum_error",
    ),
    Claim(
        3,
        "patching-scale",
        "Normalised logit difference: a layer's whole clean stream put in, less that of no patch",
        "Heimersheim and Nanda 2024, How to use and interpret activation patching; derived: 1 - 0",
        "1",
        "± 1e-3",
        "mi_helpers.lessons.lesson_03.claims:whole_scale",
    ),
    Claim(
        3,
        "patching-and",
        "One wire of an AND gate: effect by noising less effect by denoising",
        "Heimersheim and Nanda 2024, AND and OR circuits; derived: needed (1), not enough (0)",
        "1",
        "± 1e-6",
        "mi_helpers.lessons.lesson_03.claims:and_contrast",
    ),
    Claim(
        3,
        "patching-or",
        "One wire of an OR gate: effect by noising less effect by denoising",
        "Heimersheim and Nanda 2024, AND and OR circuits; derived: enough (1), not needed (0)",
        "-1",
        "± 1e-6",
        "mi_helpers.lessons.lesson_03.claims:or_contrast",
    ),
    Claim(
        3,
        "patching-same-city",
        "Negative control: largest effect between two landmarks of one city, of an ordinary gap",
        "derived: nothing that is asked for differs",
        "0",
        "± 0.1",
        "mi_helpers.lessons.lesson_03.claims:same_city_effect",
    ),
    Claim(
        3,
        "attribution-order",
        "Attribution against true patches of the stream, pronouns: rank correlation, median pair",
        "Nanda 2023, Attribution Patching; measured in the lesson",
        "",
        ">= 0.8",
        "mi_helpers.lessons.lesson_03.claims:attribution_order",
    ),
    Claim(
        3,
        "attribution-share",
        "Attribution over the true effect at a landmark's name, layer 0: the answer tips over",
        "Nanda 2023, Attribution Patching; measured in the lesson",
        "",
        "<= 0.75",
        "mi_helpers.lessons.lesson_03.claims:attribution_share",
    ),
    Claim(
        3,
        "skew-learned",
        "Slope of the model's log-odds of 'she' over the world's: 40 occupations, unseen phrasings",
        "derived: 1 for a calibrated reader of this world",
        "1",
        "± 0.15",
        "mi_helpers.lessons.lesson_03.claims:learned_skew",
    ),
    Claim(
        3,
        "skew-removed",
        "The same slope for other occupations when one direction is taken out of the middle layer",
        "measured in the lesson",
        "",
        "<= 0.5",
        "mi_helpers.lessons.lesson_03.claims:skew_without_direction",
    ),
    Claim(
        3,
        "skew-side-effect",
        "Without that direction: largest gain in loss of any other family, nats per answer",
        "measured in the lesson",
        "",
        "<= 0.5",
        "mi_helpers.lessons.lesson_03.claims:worst_side_effect",
    ),
    Claim(
        3,
        "skew-heads-side-effect",
        "The same without the heads that carry more than a tenth of the skew each",
        "measured in the lesson",
        "",
        ">= 1",
        "mi_helpers.lessons.lesson_03.claims:carriers_side_effect",
        fast=False,
    ),
    Claim(
        3,
        "path-keys",
        "Share of the answer lost by one path: previous-token heads to the induction heads' keys",
        "Olsson et al. 2022, In-context Learning and Induction Heads; path as in Wang et al. 2022",
        "",
        ">= 0.6",
        "mi_helpers.lessons.lesson_03.claims:path_through_keys",
    ),
    Claim(
        3,
        "path-values",
        "Control: the same path into the values",
        "derived: what stands before a word is no content to be copied",
        "0",
        "± 0.2",
        "mi_helpers.lessons.lesson_03.claims:path_through_values",
    ),
    Claim(
        5,
        "induction-ablation",
        "Repeated random words: share of the gain lost without the induction heads",
        "Olsson et al. 2022, In-context Learning and Induction Heads, ablations",
        "",
        ">= 0.8",
        "mi_helpers.lessons.lesson_05.claims:lost_without_induction",
    ),
    Claim(
        5,
        "random-ablation",
        "Negative control: the same without as many other heads, median of 15 random sets",
        "derived: 0 where the other heads have no part in it",
        "0",
        "± 0.1",
        "mi_helpers.lessons.lesson_05.claims:lost_without_others",
        fast=False,
    ),
    Claim(
        5,
        "induction-control",
        "Negative control: highest induction score on random words without repetition",
        "derived: near 1/n, as for any other place",
        "0",
        "± 0.2",
        "mi_helpers.lessons.lesson_05.claims:induction_without_repetition",
    ),
    Claim(
        5,
        "k-composition",
        "Share of log p that hangs on the path previous-token head → induction heads' keys",
        "Elhage et al. 2021, A Mathematical Framework, K-composition; measured by path patching",
        "",
        ">= 0.6",
        "mi_helpers.lessons.lesson_05.claims:previous_token_through_keys",
    ),
    Claim(
        5,
        "q-v-composition",
        "Negative control: the largest share on any head's path into their queries or values",
        "derived: the queries and values of these heads bring the word itself",
        "0",
        "± 0.1",
        "mi_helpers.lessons.lesson_05.claims:through_queries_and_values",
        fast=False,
    ),
    Claim(
        5,
        "phase-change",
        "Share of the induction score's rise in the steepest tenth of training (shipped log)",
        "Olsson et al. 2022, In-context Learning and Induction Heads, phase change",
        "",
        ">= 0.6",
        "mi_helpers.lessons.lesson_05.claims:phase_change",
        seeds=1,
    ),
    Claim(
        5,
        "ioi-faithfulness",
        "F(circuit) / F(model), IO less other names, on prompts not searched on",
        "Wang et al. 2022, section 4 (26 heads of GPT-2 small; IO less S)",
        "0.87",
        ">= 0.8",
        "mi_helpers.lessons.lesson_05.claims:circuit_faithfulness",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-first-choice",
        "Share of those prompts where the circuit alone names the receiver",
        "measured in the lesson",
        "",
        ">= 0.9",
        "mi_helpers.lessons.lesson_05.claims:circuit_first_choice",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-random",
        "Negative control: mean faithfulness of 10 random circuits of equal size",
        "Wang et al. 2022, section 4",
        "",
        "<= 0.3",
        "mi_helpers.lessons.lesson_05.claims:random_faithfulness",
        seeds=3,
        fast=False,
    ),
    Claim(
        5,
        "ioi-minimality",
        "Change of F, as a share, when the least important node leaves the circuit",
        "Wang et al. 2022, section 4",
        "",
        ">= 0.01",
        "mi_helpers.lessons.lesson_05.claims:least_needed",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-giver",
        "p(giver) after three different names: excluded for giving, not for being named twice",
        "measured in the lesson",
        "",
        "<= 0.01",
        "mi_helpers.lessons.lesson_05.claims:giver_named",
        seeds=3,
    ),
    Claim(
        7,
        "transcoder-small",
        "Small transcoder of the middle MLP, 4 d_model latents, k = 16: explained variance",
        "measured in the lesson",
        "",
        ">= 0.75",
        "mi_helpers.lessons.lesson_07.claims:explained_small",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoder-shuffled",
        "Negative control: the same trained on shuffled outputs",
        "derived: an output that has nothing to do with the input cannot be foretold",
        "0",
        "± 0.05",
        "mi_helpers.lessons.lesson_07.claims:explained_shuffled",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoder-affine",
        "Explained variance of the small transcoder, less that of the best affine map",
        "derived: above 0 only where the MLP bends",
        "",
        ">= 0.05",
        "mi_helpers.lessons.lesson_07.claims:above_affine",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoder-random",
        "The same, less that of random features with their best decoder",
        "measured in the lesson",
        "",
        ">= 0.05",
        "mi_helpers.lessons.lesson_07.claims:above_random",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoder-neurons",
        "Shipped transcoders, less the MLP's 16 strongest neurons: explained variance, worst layer",
        "measured in the lesson",
        "",
        ">= 0",
        "mi_helpers.lessons.lesson_07.claims:above_neurons",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoders-single",
        "One MLP replaced by its transcoder: nats added per answer, worst layer",
        "Dunefsky et al. 2024, faithfulness of transcoders",
        "",
        "<= 0.15",
        "mi_helpers.lessons.lesson_07.claims:most_added",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoders-all",
        "All MLPs replaced: share of the loss recovered, against zeros",
        "Dunefsky et al. 2024, faithfulness of transcoders",
        "",
        ">= 0.95",
        "mi_helpers.lessons.lesson_07.claims:all_layers",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoders-skip",
        "All MLPs replaced by transcoders with a skip path: share of the loss recovered",
        "Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability",
        "",
        ">= 0.95",
        "mi_helpers.lessons.lesson_07.claims:all_layers_skip",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoders-biases",
        "Negative control: the same transcoders with no latent firing",
        "measured in the lesson",
        "",
        "<= 0.5",
        "mi_helpers.lessons.lesson_07.claims:biases_alone",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "transcoders-compound",
        "Nats added with all MLPs replaced, less the sum of the single replacements",
        "measured in the lesson",
        "",
        ">= 0.01",
        "mi_helpers.lessons.lesson_07.claims:compounding",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-foretold",
        "Layer 0: share of latents whose word is among 10 that the embedding foretells",
        "Dunefsky et al. 2024, de-embeddings",
        "",
        ">= 0.5",
        "mi_helpers.lessons.lesson_07.claims:words_predicted_first",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-foretold-last",
        "The same in the last layer: what a latent reads there is no word",
        "measured in the lesson",
        "",
        "<= 0.25",
        "mi_helpers.lessons.lesson_07.claims:words_predicted_last",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-exchanged",
        "Negative control of the first: predictions of other latents",
        "measured in the lesson",
        "",
        "<= 0.15",
        "mi_helpers.lessons.lesson_07.claims:words_predicted_exchanged",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-written",
        "Last layer: correlation of foretold and true change of the logits, median firing",
        "derived: 1 but for the final norm and the rest of the stream",
        "",
        ">= 0.85",
        "mi_helpers.lessons.lesson_07.claims:written_last",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-written-first",
        "The same in layer 0: later layers answer what was written",
        "measured in the lesson",
        "",
        "<= 0.8",
        "mi_helpers.lessons.lesson_07.claims:written_first",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "rules-written-exchanged",
        "Negative control, last layer: predictions of other latents",
        "derived: unrelated directions",
        "0",
        "± 0.3",
        "mi_helpers.lessons.lesson_07.claims:written_exchanged",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "virtual-same",
        "Correlation of virtual weight and true edge, features at one position",
        "Dunefsky et al. 2024; Ameisen et al. 2025, Circuit Tracing, Global Weights",
        "",
        ">= 0.7",
        "mi_helpers.lessons.lesson_07.claims:virtual_correlation",
        seeds=3,
    ),
    Claim(
        7,
        "virtual-across",
        "The same between positions, where only attention leads",
        "derived: no direct path between positions",
        "0",
        "± 0.3",
        "mi_helpers.lessons.lesson_07.claims:virtual_correlation_across",
        seeds=3,
    ),
    Claim(
        7,
        "virtual-even",
        "Between positions, all weights but with attention spread evenly: the pattern is missing",
        "measured in the lesson",
        "",
        "<= 0.85",
        "mi_helpers.lessons.lesson_07.claims:even_correlation_across",
        seeds=3,
    ),
    Claim(
        7,
        "gemma-scope-layout",
        "Gemma Scope's layout, without the gain: explained variance, less that turned back",
        "derived: the gain has changed places, nothing else; Lieberum et al. 2024, Gemma Scope",
        "0",
        "± 0.01",
        "mi_helpers.lessons.lesson_07.claims:layouts_differ",
        seeds=3,
        fast=False,
    ),
    Claim(
        7,
        "gemma-scope-jumprelu",
        "Explained variance of TopK, less that of the same as JumpReLU in that layout",
        "measured in the lesson",
        "0",
        "± 0.05",
        "mi_helpers.lessons.lesson_07.claims:cost_of_jumprelu",
        seeds=3,
        fast=False,
    ),
    Claim(
        8,
        "circuit-edges",
        "Largest |Σ edges + bias - value| over features and demeaned logits, 14 graphs",
        "Ameisen et al. 2025, Circuit Tracing, Constructing an Attribution Graph; derived: 0",
        "0",
        "<= 1e-4",
        "mi_helpers.lessons.lesson_08.claims:edges_off",
    ),
    Claim(
        8,
        "circuit-edges-scaled",
        "The same, each over the Σ |edges| + |bias| of its node",
        "derived: 0 but for rounding",
        "0",
        "<= 1e-4",
        "mi_helpers.lessons.lesson_08.claims:edges_off_scaled",
    ),
    Claim(
        8,
        "circuit-replacement",
        "Median replacement score of whole graphs, 14 prompts",
        "Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
        "",
        ">= 0.7",
        "mi_helpers.lessons.lesson_08.claims:median_replacement",
    ),
    Claim(
        8,
        "circuit-completeness",
        "Median completeness score of the same graphs",
        "Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
        "",
        ">= 0.85",
        "mi_helpers.lessons.lesson_08.claims:median_completeness",
    ),
    Claim(
        8,
        "circuit-exchanged",
        "Negative control: replacement score, decoder rows exchanged among latents",
        "measured in the lesson",
        "",
        "<= 0.55",
        "mi_helpers.lessons.lesson_08.claims:exchanged_replacement",
    ),
    Claim(
        8,
        "circuit-dealt",
        "What the score does not see: the same with all edges dealt out anew",
        "derived: errors are few among the possible sources",
        "",
        ">= 0.7",
        "mi_helpers.lessons.lesson_08.claims:dealt_replacement",
    ),
    Claim(
        8,
        "two-hop-country",
        "Never-seen two hops, the country's features swapped: change of the logit gap, as a share",
        "Lindsey et al. 2025, On the Biology of a Large Language Model, multi-step reasoning",
        "",
        "<= -0.6",
        "mi_helpers.lessons.lesson_08.claims:country_swap",
    ),
    Claim(
        8,
        "two-hop-pair",
        "The same with features of this country and question alone",
        "measured in the lesson",
        "",
        ">= -0.7",
        "mi_helpers.lessons.lesson_08.claims:pair_swap",
        fast=False,
    ),
    Claim(
        8,
        "two-hop-both",
        "The same with both; -2 would be all that differs",
        "measured in the lesson",
        "",
        "<= -1",
        "mi_helpers.lessons.lesson_08.claims:both_swap",
        fast=False,
    ),
    Claim(
        8,
        "two-hop-random",
        "Negative control: as many features of the same layers, as active, taken out",
        "derived: nothing that is asked for changes",
        "0",
        "± 0.1",
        "mi_helpers.lessons.lesson_08.claims:country_random",
    ),
    Claim(
        8,
        "asked-swap",
        "Features of what is asked swapped: change of the logit gap, as a share",
        "Ameisen et al. 2025, Circuit Tracing; circuit-tracer's demonstration, say a capital",
        "",
        "<= -1",
        "mi_helpers.lessons.lesson_08.claims:asked_swap",
    ),
    Claim(
        8,
        "story-correlation",
        "Correlation of predicted and observed change, suppress and swap, 20 stories of steps",
        "Ameisen et al. 2025, Circuit Tracing, Validating with Interventions",
        "",
        ">= 0.7",
        "mi_helpers.lessons.lesson_08.claims:predicted_steps",
    ),
    Claim(
        8,
        "story-size",
        "The same stories: observed change over the predicted one",
        "derived: 1 in the replacement model",
        "1",
        "± 0.35",
        "mi_helpers.lessons.lesson_08.claims:size_of_steps",
    ),
    Claim(
        8,
        "story-size-labels",
        "The same for stories of the largest label",
        "measured in the lesson",
        "",
        "<= 0.6",
        "mi_helpers.lessons.lesson_08.claims:size_of_labels",
        fast=False,
    ),
    Claim(
        8,
        "single-correlation",
        "Correlation of predicted and observed change, single features, 4 prompts",
        "measured in the lesson",
        "",
        ">= 0.15",
        "mi_helpers.lessons.lesson_08.claims:predicted_singles",
        fast=False,
    ),
]


# -- verdicts --------------------------------------------------------------------------------


def number(text: str) -> float:
    """A published value, such as "2/5", "0.784" or "1e-5"."""
    return float(Fraction(text))


def verdict(published: str, ours: float, tolerance: str) -> str:
    """HOLDS or FAILS. ValueError, with a sentence, for a tolerance that cannot be read."""
    found = re.fullmatch(r"(±|>=|<=) *(\S+)", tolerance.strip())
    if not found or (found[1] == "±" and not published):
        raise ValueError(
            f"The tolerance '{tolerance}' cannot be applied: write '± 0.02' beside a published "
            "value, or a bound such as '>= 0.9' or '<= 1e-5'."
        )
    sign, limit = found[1], number(found[2])
    if not math.isfinite(ours):
        return FAILS
    if sign == "±":
        return HOLDS if abs(ours - number(published)) <= limit else FAILS
    return HOLDS if (ours >= limit if sign == ">=" else ours <= limit) else FAILS


def row_of(claim: Claim, values: list[float]) -> dict[str, str]:
    """The ledger's row of a claim measured over several seeds."""
    mean = statistics.fmean(values) if values else math.nan
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return described(claim) | {
        "ours": f"{mean:.6g}" if values else "",
        "sd": f"{spread:.2g}" if values else "",
        "seeds": str(len(values)),
        "verdict": verdict(claim.published, mean, claim.tolerance) if values else UNMEASURED,
    }


def described(claim: Claim) -> dict[str, str]:
    """What a row says before anything is measured."""
    names = ("id", "claim", "source", "published", "tolerance")
    return {"lesson": f"{claim.lesson:02d}"} | {name: getattr(claim, name) for name in names}


# -- the file --------------------------------------------------------------------------------


def read(path: Path = LEDGER) -> list[dict[str, str]]:
    """The rows of the ledger; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        if rows.fieldnames != COLUMNS:
            raise ValueError(
                f"{path.name} has the columns {rows.fieldnames}, expected {COLUMNS}: "
                "`python -m mi_helpers claims --measure` writes it anew."
            )
        return list(rows)


def write(rows: Iterable[dict[str, str]], path: Path = LEDGER) -> None:
    """Write the ledger atomically."""
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, stream.getvalue())


def problems(rows: list[dict[str, str]], claims: list[Claim] | None = None) -> list[str]:
    """What is wrong with the ledger, a sentence each: failing claims, and rows that are not ours.

    Verdicts are computed again from the stored numbers, so that none can be edited by hand.
    """
    claims = all_claims() if claims is None else claims
    stored = {row["id"]: row for row in rows}
    known = {claim.id for claim in claims}
    found = [f"{name}: no claim of this name is declared." for name in stored if name not in known]
    for claim in claims:
        row = stored.get(claim.id)
        if row is None or not row["ours"]:
            found.append(f"{claim.id}: {UNMEASURED}; run --measure {claim.lesson}.")
            continue
        differs = [name for name, text in described(claim).items() if row[name] != text]
        if differs:
            found.append(f"{claim.id}: {', '.join(differs)} differs; run --measure {claim.lesson}.")
        judged = verdict(claim.published, float(row["ours"]), claim.tolerance)
        if judged != row["verdict"]:
            found.append(f"{claim.id}: the row says '{row['verdict']}', its numbers '{judged}'.")
        if judged == FAILS:
            found.append(f"{claim.id}: {FAILS}. {claim.claim}: {ours(row)}.")
    return found


def measure_anew(
    lessons: list[int], path: Path = LEDGER, claims: list[Claim] | None = None
) -> None:
    """Measure the claims of these lessons (all of them when empty), keep the others' rows."""
    claims = all_claims() if claims is None else claims
    measured = {}
    for claim in claims:
        if not lessons or claim.lesson in lessons:
            row = row_of(claim, [claim.value(seed) for seed in range(claim.seeds)])
            print(f"{claim.id}: {ours(row)}, {row['verdict']}", flush=True)
            measured[claim.id] = row
    stored = {row["id"]: row for row in read(path)} if lessons else {}  # as it is now, not before
    rows = {claim.id: stored.pop(claim.id, None) or row_of(claim, []) for claim in claims}
    others = {name: row for name, row in stored.items() if int(row["lesson"]) not in lessons}
    write((rows | others | measured).values(), path)


# -- the tables ------------------------------------------------------------------------------


def ours(row: dict[str, str]) -> str:
    """Our value as text: mean ± standard deviation over the seeds."""
    if not row["ours"]:
        return UNMEASURED
    mean, sd = float(row["ours"]), float(row["sd"])
    digits = 4 if not sd else min(4, max(2, 1 - math.floor(math.log10(sd))))
    shown = f"{mean:.{digits}f}" if abs(mean) >= 1e-3 or mean == 0 else f"{mean:.1e}"
    return f"{shown} ± {row['sd']}" if sd else shown


def table(rows: list[dict[str, str]]) -> str:
    """The ledger for a terminal: two lines per claim."""
    lines = []
    for row in rows:
        mark = {HOLDS: "✓", FAILS: "✗"}.get(row["verdict"], "·")
        value = f"published {row['published']}" if row["published"] else "nothing published"
        lines.append(f"{row['lesson']} {mark} {row['claim']}")
        lines.append(
            f"       {value}, ours {ours(row)} ({row['seeds']} seeds), "
            f"tolerance {row['tolerance']}: {row['verdict']}. {row['source']}"
        )
    return "\n".join(lines)


def markdown(rows: list[dict[str, str]]) -> str:
    """The ledger as a Markdown table, with its markers, for the README."""
    head = "Lesson,Claim,Source,Published or derived,Ours,Seeds,Tolerance,Verdict".split(",")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        names = ("lesson", "claim", "source", "published")
        cells = [*(row[name] for name in names), ours(row)]
        cells += [row["seeds"], row["tolerance"], row["verdict"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([BEGIN, "", *lines, "", END])


def update_readme(rows: list[dict[str, str]], path: Path = README) -> bool:
    """Put the table between the README's markers; False where there are none."""
    return put_between(path, BEGIN, END, markdown(rows))


def main(
    measure: Annotated[list[int] | None, tyro.conf.arg(metavar="[LESSON ...]")] = None,
    readme: bool = False,
    ledger: Path = LEDGER,
) -> int:
    """Show the ledger: what is claimed, by whom, what we measure, and whether it holds.

    The exit code is 1 when a claim fails.

    Args:
        measure: measure these lessons anew over their seeds, or all of them, and write the rows
        readme: write the table into README.md
        ledger: another claims.csv
    """
    lessons = {claim.lesson for claim in all_claims()}
    if unknown := set(measure or []) - lessons:
        print(
            f"Lesson {min(unknown)} has no claims; there are lessons {sorted(lessons)}.",
            file=sys.stderr,
        )
        return 2
    try:
        if measure is not None:
            measure_anew(measure, ledger)
            print("Now write the checksums of data/: python -m mi_helpers manifest --write\n")
        rows = read(ledger)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    if readme and not update_readme(rows):
        print(f"README.md has no markers {BEGIN} … {END}: put them where the table should stand.")
        return 1
    found = problems(rows)
    print("\n".join(["", *found]) if found else f"\nAll {len(rows)} claims hold.")
    return 1 if found else 0
