"""The ledger: every result that a lesson reproduces, with its source, ours, and a verdict.

`data/claims.csv` holds what was measured; `CLAIMS` below says what is claimed and which function
measures it. To add a row, write a function `measure(seed) -> float` in the lesson's module, add a
`Claim` here, and run `python -m mi_helpers claims --measure LESSON`.

    python -m mi_helpers claims                 the table; exit code 1 when a claim fails
    python -m mi_helpers claims --measure 1     measure lesson 1 anew over its seeds, write the rows
    python -m mi_helpers claims --readme        write the table between the markers in README.md
"""

import argparse
import csv
import importlib
import io
import math
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mi_helpers.durable import put_between, write_text

ROOT = Path(__file__).resolve().parents[1]
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
    measure    "module:function" of a function (seed) -> float, imported when it is needed
    seeds      how many seeds are measured: 0, 1, …
    fast       whether the tests measure one seed again
    """

    lesson: int
    id: str
    claim: str
    source: str
    published: str
    tolerance: str
    measure: str
    seeds: int = 5
    fast: bool = True

    def value(self, seed: int) -> float:
        """Measure it once."""
        module, function = self.measure.split(":")
        return float(getattr(importlib.import_module(module), function)(seed))

    def agrees(self, value: float, row: dict[str, str]) -> bool:
        """Whether one seed, measured again on any machine, agrees with the ledger's row.

        It has the row's verdict, and is within four standard deviations over the seeds of its
        value, or within a fiftieth of the value or of the tolerance, on which no verdict hangs.
        Every processor rounds its own way: rounding has its bound, and no value.
        """
        if verdict(self.published, value, self.tolerance) != row["verdict"]:
            return False
        ours, (_, limit) = float(row["ours"]), bound(self.tolerance)
        slack = max(4 * float(row["sd"]), 0.02 * abs(ours), 0.02 * abs(limit))
        return is_rounding(row) or abs(value - ours) <= slack


TOY = "Elhage et al. 2022, Toy Models of Superposition"
GEOMETRY = f"{TOY}, feature dimensionality; derived: tight frame, m/n"

CLAIMS = [
    Claim(
        0,
        "stream-sum",
        "embed + Σ attn_out + Σ mlp_out against the final residual, relative to its largest entry",
        "Elhage et al. 2021, A Mathematical Framework, Residual Stream as a Communication Channel",
        "0",
        "<= 1e-5",
        "mi_helpers.lesions:stream_sum_error",
    ),
    Claim(
        1,
        "pentagon",
        "Five features in two dimensions, S = 0.9: the feature dimensionality furthest from 2/5",
        GEOMETRY,
        "2/5",
        "± 0.02",
        "mi_helpers.superposition:grown_pentagon",
    ),
    Claim(
        1,
        "pentagon-sum",
        "The same five dimensionalities, summed",
        GEOMETRY,
        "2",
        "± 0.01",
        "mi_helpers.superposition:grown_pentagon_sum",
    ),
    Claim(
        1,
        "sticky-one",
        "m/‖W‖² with equal importance, dense: n = 40, m = 8, S = 0.01",
        f"{TOY}, dimensions per feature; ARENA 1.3.1",
        "1",
        "± 0.02",
        "mi_helpers.superposition:sticky_one",
    ),
    Claim(
        1,
        "sticky-half",
        "m/‖W‖² with equal importance, S = 0.55 to 0.70: the value furthest from 1/2",
        f"{TOY}, dimensions per feature; ARENA 1.3.1",
        "1/2",
        "± 0.03",
        "mi_helpers.superposition:sticky_half",
    ),
    Claim(
        1,
        "tetrahedron",
        "Four features in three dimensions, S = 0.45: the dimensionality furthest from 3/4",
        GEOMETRY,
        "3/4",
        "± 0.05",
        "mi_helpers.superposition:grown_tetrahedron",
    ),
    Claim(
        1,
        "triangle",
        "Three features in two dimensions, S = 0.4: the dimensionality furthest from 2/3",
        GEOMETRY,
        "2/3",
        "± 0.05",
        "mi_helpers.superposition:grown_triangle",
    ),
    Claim(
        1,
        "antipodal-pair",
        "Six features in two dimensions, S = 0.55, those represented: furthest from 1/2",
        GEOMETRY,
        "1/2",
        "± 0.02",
        "mi_helpers.superposition:grown_pair",
    ),
    Claim(
        1,
        "square-antiprism",
        "Eight features in three dimensions, S = 0.9: the dimensionality furthest from 3/8",
        GEOMETRY,
        "3/8",
        "± 0.02",
        "mi_helpers.superposition:grown_antiprism",
    ),
    Claim(
        1,
        "interference",
        "Squared interference of 400 random directions in 50 dimensions, each on with p = 0.05",
        "derived: p (n - 1) / m",
        "0.399",
        "± 0.01",
        "mi_helpers.superposition:random_interference",
    ),
    Claim(
        1,
        "phase-diagram",
        "n = 2, m = 1: share of 144 cells where training finds the closed form's best solution",
        f"{TOY}, phase diagram; derived: three closed-form losses",
        "",
        ">= 0.9",
        "mi_helpers.superposition:phase_agreement",
    ),
    Claim(
        1,
        "linear-control",
        "Negative control, no ReLU: loss over that of principal components, n = 10, m = 3, S = 0.9",
        "derived: Var x · Σ importance of the features left out",
        "1",
        "± 0.02",
        "mi_helpers.superposition:linear_over_optimum",
    ),
    Claim(
        2,
        "sine-climb",
        "y > sin x: accuracy of a probe on the last hidden layer, less that on the input",
        "Alain and Bengio 2016, linear classifier probes; trained in the lesson",
        "",
        ">= 0.15",
        "mi_helpers.probes:sine_gain",
    ),
    Claim(
        2,
        "entropy-bound",
        "Topic probes: cross-entropy less H(topic | words so far), smallest over layers, nats",
        "derived: cross-entropy >= H(Y | representation) >= H(Y | text)",
        "",
        ">= -0.03",
        "mi_helpers.probes:distance_to_floor",
    ),
    Claim(
        2,
        "read-out-both",
        "Agreement: accuracy of the probes for the subject's and the other noun's number, lower",
        "Elazar et al. 2021, Amnesic probing; measured in the lesson",
        "",
        ">= 0.95",
        "mi_helpers.probes:both_numbers_read_out",
    ),
    Claim(
        2,
        "used",
        "Share of the verb's margin lost when the subject's number is removed at the subject",
        "Elazar et al. 2021, Amnesic probing; measured in the lesson",
        "",
        ">= 0.7",
        "mi_helpers.probes:lost_without_the_subjects_number",
    ),
    Claim(
        2,
        "unused",
        "Share of the verb's margin lost when the other noun's number is removed at that noun",
        "Elazar et al. 2021, Amnesic probing; measured in the lesson",
        "0",
        "± 0.05",
        "mi_helpers.probes:lost_without_the_other_nouns_number",
    ),
    Claim(
        2,
        "month-circle",
        "Months on a circle: degrees off for months that the probe never saw, middle layer",
        "measured in the lesson",
        "",
        "<= 25",
        "mi_helpers.probes:month_error",
    ),
    Claim(
        2,
        "month-control",
        "Negative control: the same for shuffled orders of the months, median",
        "derived: 90 degrees for random places on a circle",
        "90",
        "± 15",
        "mi_helpers.probes:shuffled_month_error",
    ),
    Claim(
        3,
        "patching-scale",
        "Normalised logit difference: a layer's whole clean stream put in, less that of no patch",
        "Heimersheim and Nanda 2024, How to use and interpret activation patching; derived: 1 - 0",
        "1",
        "± 1e-3",
        "mi_helpers.patching_lab:whole_scale",
    ),
    Claim(
        3,
        "patching-and",
        "One wire of an AND gate: effect by noising less effect by denoising",
        "Heimersheim and Nanda 2024, AND and OR circuits; derived: needed (1), not enough (0)",
        "1",
        "± 1e-6",
        "mi_helpers.patching_lab:and_contrast",
    ),
    Claim(
        3,
        "patching-or",
        "One wire of an OR gate: effect by noising less effect by denoising",
        "Heimersheim and Nanda 2024, AND and OR circuits; derived: enough (1), not needed (0)",
        "-1",
        "± 1e-6",
        "mi_helpers.patching_lab:or_contrast",
    ),
    Claim(
        3,
        "patching-same-city",
        "Negative control: largest effect between two landmarks of one city, of an ordinary gap",
        "derived: nothing that is asked for differs",
        "0",
        "± 0.1",
        "mi_helpers.patching_lab:same_city_effect",
    ),
    Claim(
        3,
        "attribution-order",
        "Attribution against true patches of the stream, pronouns: rank correlation, median pair",
        "Nanda 2023, Attribution Patching; measured in the lesson",
        "",
        ">= 0.8",
        "mi_helpers.patching_lab:attribution_order",
    ),
    Claim(
        3,
        "attribution-share",
        "Attribution over the true effect at a landmark's name, layer 0: the answer tips over",
        "Nanda 2023, Attribution Patching; measured in the lesson",
        "",
        "<= 0.75",
        "mi_helpers.patching_lab:attribution_share",
    ),
    Claim(
        3,
        "skew-learned",
        "Slope of the model's log-odds of 'she' over the world's: 40 occupations, unseen phrasings",
        "derived: 1 for a calibrated reader of this world",
        "1",
        "± 0.15",
        "mi_helpers.patching_lab:learned_skew",
    ),
    Claim(
        3,
        "skew-removed",
        "The same slope for other occupations when one direction is taken out of the middle layer",
        "measured in the lesson",
        "",
        "<= 0.5",
        "mi_helpers.patching_lab:skew_without_direction",
    ),
    Claim(
        3,
        "skew-side-effect",
        "Without that direction: largest gain in loss of any other family, nats per answer",
        "measured in the lesson",
        "",
        "<= 0.5",
        "mi_helpers.patching_lab:worst_side_effect",
    ),
    Claim(
        3,
        "skew-heads-side-effect",
        "The same without the heads that carry more than a tenth of the skew each",
        "measured in the lesson",
        "",
        ">= 1",
        "mi_helpers.patching_lab:carriers_side_effect",
        fast=False,
    ),
    Claim(
        3,
        "path-keys",
        "Share of the answer lost by one path: previous-token heads to the induction heads' keys",
        "Olsson et al. 2022, In-context Learning and Induction Heads; path as in Wang et al. 2022",
        "",
        ">= 0.6",
        "mi_helpers.patching_lab:path_through_keys",
    ),
    Claim(
        3,
        "path-values",
        "Control: the same path into the values",
        "derived: what stands before a word is no content to be copied",
        "0",
        "± 0.2",
        "mi_helpers.patching_lab:path_through_values",
    ),
    Claim(
        4,
        "tuned-lens",
        "KL to the final output, logit lens less tuned lens: smallest over layers, held-out, nats",
        "Belrose et al. 2023, Tuned Lens: closer than the logit lens at every layer",
        "",
        ">= 0",
        "mi_helpers.lens:tuned_lens_gain",
    ),
    Claim(
        4,
        "attribution-components",
        "Direct logit attribution: sum of all components against the logit, over the largest logit",
        "derived: logits are linear in the stream under a frozen final norm",
        "0",
        "<= 1e-5",
        "mi_helpers.lens:component_error",
    ),
    Claim(
        4,
        "attribution-heads",
        "The same per head, each through the norm after attention",
        "derived: that norm is linear, too, when its scale is frozen",
        "0",
        "<= 1e-5",
        "mi_helpers.lens:head_error",
    ),
    Claim(
        4,
        "attribution-post-norm",
        "The heads' terms when that norm is left out: Σ |error| / Σ |term|, indirect objects",
        "measured in the lesson",
        "",
        ">= 0.2",
        "mi_helpers.lens:error_without_post_norm",
    ),
    Claim(
        4,
        "lens-untrained",
        "Negative control, untrained model: share of right answers at rank 1, best layer",
        "derived: one over the vocabulary's size",
        "0",
        "± 0.03",
        "mi_helpers.lens:untrained_hits",
    ),
    Claim(
        4,
        "lens-random-token",
        "Negative control: mean rank of a random token over d_vocab, layer furthest from 1/2",
        "derived: every rank is equally likely",
        "1/2",
        "± 0.05",
        "mi_helpers.lens:random_token_rank",
    ),
    Claim(
        5,
        "induction-ablation",
        "Repeated random words: share of the gain lost without the induction heads",
        "Olsson et al. 2022, In-context Learning and Induction Heads, ablations",
        "",
        ">= 0.8",
        "mi_helpers.heads:lost_without_induction",
    ),
    Claim(
        5,
        "random-ablation",
        "Negative control: the same without as many other heads, median of 15 random sets",
        "derived: 0 where the other heads have no part in it",
        "0",
        "± 0.1",
        "mi_helpers.heads:lost_without_others",
        fast=False,
    ),
    Claim(
        5,
        "induction-control",
        "Negative control: highest induction score on random words without repetition",
        "derived: near 1/n, as for any other place",
        "0",
        "± 0.2",
        "mi_helpers.heads:induction_without_repetition",
    ),
    Claim(
        5,
        "k-composition",
        "Share of log p that hangs on the path previous-token head → induction heads' keys",
        "Elhage et al. 2021, A Mathematical Framework, K-composition; measured by path patching",
        "",
        ">= 0.6",
        "mi_helpers.heads:previous_token_through_keys",
    ),
    Claim(
        5,
        "q-v-composition",
        "Negative control: the largest share on any head's path into their queries or values",
        "derived: the queries and values of these heads bring the word itself",
        "0",
        "± 0.1",
        "mi_helpers.heads:through_queries_and_values",
        fast=False,
    ),
    Claim(
        5,
        "phase-change",
        "Share of the induction score's rise in the steepest tenth of training (shipped log)",
        "Olsson et al. 2022, In-context Learning and Induction Heads, phase change",
        "",
        ">= 0.6",
        "mi_helpers.heads:phase_change",
        seeds=1,
    ),
    Claim(
        5,
        "ioi-faithfulness",
        "F(circuit) / F(model), IO less other names, on prompts not searched on",
        "Wang et al. 2022, section 4 (26 heads of GPT-2 small; IO less S)",
        "0.87",
        ">= 0.8",
        "mi_helpers.ioi:circuit_faithfulness",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-first-choice",
        "Share of those prompts where the circuit alone names the receiver",
        "measured in the lesson",
        "",
        ">= 0.9",
        "mi_helpers.ioi:circuit_first_choice",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-random",
        "Negative control: mean faithfulness of 10 random circuits of equal size",
        "Wang et al. 2022, section 4",
        "",
        "<= 0.3",
        "mi_helpers.ioi:random_faithfulness",
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
        "mi_helpers.ioi:least_needed",
        seeds=3,
    ),
    Claim(
        5,
        "ioi-giver",
        "p(giver) after three different names: excluded for giving, not for being named twice",
        "measured in the lesson",
        "",
        "<= 0.01",
        "mi_helpers.ioi:giver_named",
        seeds=3,
    ),
    Claim(
        6,
        "image-filters",
        "Sparse coding of natural images: share of filters that are localised and oriented",
        "Olshausen and Field 1996, Emergence of simple-cell receptive field properties, figure 4",
        "",
        ">= 0.35",
        "mi_helpers.image_coding:learned_share",
    ),
    Claim(
        6,
        "image-components",
        "Negative control: the same share of the patches' principal components",
        "Olshausen and Field 1996, figure 1",
        "0",
        "± 0.05",
        "mi_helpers.image_coding:component_share",
    ),
    Claim(
        6,
        "image-gaussian",
        "Negative control: the same share learned from Gaussian patches of equal covariance",
        "derived: nothing but pairwise statistics, so no direction is sparser than another",
        "0",
        "± 0.05",
        "mi_helpers.image_coding:gaussian_share",
        fast=False,
    ),
    Claim(
        6,
        "sae-explained",
        "SAE, 8 d_model latents, k = 8, middle layer: explained variance on held-out text",
        "measured in the lesson; the reference run on Gemma 2 2B has 0.784 with k = 32",
        "",
        ">= 0.8",
        "mi_helpers.sae_lab:explained",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "sae-recovered",
        "The same SAE spliced into the model: share of the loss recovered, against zeros",
        "measured in the lesson",
        "",
        ">= 0.85",
        "mi_helpers.sae_lab:loss_recovered",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "sae-dead",
        "The same SAE: share of latents that never fire in 100,000 tokens",
        "measured in the lesson; the reference run has 0.0036",
        "",
        "<= 0.1",
        "mi_helpers.sae_lab:dead_share",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "concepts-latents",
        "Six concepts of the reference run: F1 of each one's best latent, median",
        "Gao et al. 2024, Scaling and evaluating sparse autoencoders, probe loss",
        "",
        ">= 0.5",
        "mi_helpers.sae_lab:median_f1",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "concepts-over-neurons",
        "The same, less that of the best neuron of the same block, either sign",
        "Bricken et al. 2023, Towards Monosemanticity: features against neurons",
        "",
        ">= 0.15",
        "mi_helpers.sae_lab:gain_over_neurons",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "concepts-directions",
        "Control: F1 of the best of as many random directions",
        "measured in the lesson",
        "",
        "<= 0.45",
        "mi_helpers.sae_lab:median_f1_of_directions",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "concepts-untrained",
        "Control: the same with the best latent of an SAE of a model with random weights",
        "Heap et al. 2025, Sparse Autoencoders Can Interpret Randomly Initialized Transformers",
        "",
        "<= 0.3",
        "mi_helpers.sae_lab:median_f1_untrained",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "purity-of-words",
        "Token purity of SAE latents: model with its embedding alone trained, over tiny-gemma",
        "Heap et al. 2025, Sparse Autoencoders Can Interpret Randomly Initialized Transformers",
        "",
        ">= 0.7",
        "mi_helpers.sae_lab:purity_of_words_alone",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "sae-gaussian",
        "Explained variance of a small SAE, less that on Gaussian rows of equal covariance",
        "derived: above 0 only where activations are sparse in some directions",
        "",
        ">= 0.05",
        "mi_helpers.sae_lab:gaussian_gap",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "sae-seeds",
        "Two seeds: share of latents found again, less that of random directions like them",
        "Paulo and Belrose 2025, SAEs Trained on the Same Data Learn Different Features",
        "",
        ">= 0.1",
        "mi_helpers.sae_lab:shared_beyond_chance",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "topk-against-l1",
        "nMSE of ReLU with L1 over that of TopK at equal L0 and width (shipped table)",
        "Gao et al. 2024, figure 2; Rajamanoharan et al. 2024, Gated SAEs",
        "",
        ">= 1",
        "mi_helpers.sae_lab:gain_over_l1",
        seeds=1,
    ),
    Claim(
        6,
        "concepts-ahead",
        "Topics' best latents, a list read again: value at the topic's word over the word before",
        "measured in the lesson: such a latent says which words are to be expected",
        "",
        "<= 0.3",
        "mi_helpers.sae_lab:value_ahead",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "splitting",
        "Latents of Norwegian alone: an SAE of 16 d_model over one of 2 d_model, k = 8",
        "Bricken et al. 2023, Towards Monosemanticity, feature splitting",
        "",
        ">= 1.5",
        "mi_helpers.sae_lab:splitting",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "splitting-topics",
        "The other concepts there: latents of a topic alone at 16 d_model, mean of 28 topics",
        "measured in the lesson: one direction says what there is to say",
        "",
        "<= 1.5",
        "mi_helpers.sae_lab:latents_of_a_topic",
        seeds=3,
        fast=False,
    ),
    Claim(
        6,
        "scaling-law",
        "R² of log nMSE as a plane over log width and log k (shipped table, 25 runs)",
        "Gao et al. 2024, figure 1",
        "",
        ">= 0.9",
        "mi_helpers.sae_lab:scaling_fit",
        seeds=1,
    ),
    Claim(
        7,
        "transcoder-small",
        "Small transcoder of the middle MLP, 4 d_model latents, k = 16: explained variance",
        "measured in the lesson",
        "",
        ">= 0.75",
        "mi_helpers.transcoders:explained_small",
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
        "mi_helpers.transcoders:explained_shuffled",
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
        "mi_helpers.transcoders:above_affine",
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
        "mi_helpers.transcoders:above_random",
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
        "mi_helpers.transcoders:above_neurons",
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
        "mi_helpers.transcoders:most_added",
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
        "mi_helpers.transcoders:all_layers",
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
        "mi_helpers.transcoders:all_layers_skip",
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
        "mi_helpers.transcoders:biases_alone",
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
        "mi_helpers.transcoders:compounding",
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
        "mi_helpers.transcoders:foretold_first",
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
        "mi_helpers.transcoders:foretold_last",
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
        "mi_helpers.transcoders:foretold_exchanged",
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
        "mi_helpers.transcoders:written_last",
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
        "mi_helpers.transcoders:written_first",
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
        "mi_helpers.transcoders:written_exchanged",
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
        "mi_helpers.transcoders:virtual_correlation",
        seeds=3,
    ),
    Claim(
        7,
        "virtual-across",
        "The same between positions, where only attention leads",
        "derived: no direct path between positions",
        "0",
        "± 0.3",
        "mi_helpers.transcoders:virtual_correlation_across",
        seeds=3,
    ),
    Claim(
        7,
        "virtual-even",
        "Between positions, all weights but with attention spread evenly: the pattern is missing",
        "measured in the lesson",
        "",
        "<= 0.85",
        "mi_helpers.transcoders:even_correlation_across",
        seeds=3,
    ),
    Claim(
        7,
        "gemma-scope-layout",
        "Gemma Scope's layout, without the gain: explained variance, less that turned back",
        "derived: the gain has changed places, nothing else; Lieberum et al. 2024, Gemma Scope",
        "0",
        "± 0.01",
        "mi_helpers.transcoders:layouts_differ",
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
        "mi_helpers.transcoders:cost_of_jumprelu",
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
        "mi_helpers.tracing_claims:edges_off",
    ),
    Claim(
        8,
        "circuit-edges-scaled",
        "The same, each over the Σ |edges| + |bias| of its node",
        "derived: 0 but for rounding",
        "0",
        "<= 1e-4",
        "mi_helpers.tracing_claims:edges_off_scaled",
    ),
    Claim(
        8,
        "circuit-replacement",
        "Median replacement score of whole graphs, 14 prompts",
        "Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
        "",
        ">= 0.7",
        "mi_helpers.tracing_claims:median_replacement",
    ),
    Claim(
        8,
        "circuit-completeness",
        "Median completeness score of the same graphs",
        "Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
        "",
        ">= 0.85",
        "mi_helpers.tracing_claims:median_completeness",
    ),
    Claim(
        8,
        "circuit-exchanged",
        "Negative control: replacement score, decoder rows exchanged among latents",
        "measured in the lesson",
        "",
        "<= 0.55",
        "mi_helpers.tracing_claims:exchanged_replacement",
    ),
    Claim(
        8,
        "circuit-dealt",
        "What the score does not see: the same with all edges dealt out anew",
        "derived: errors are few among the possible sources",
        "",
        ">= 0.7",
        "mi_helpers.tracing_claims:dealt_replacement",
    ),
    Claim(
        8,
        "two-hop-country",
        "Never-seen two hops, the country's features swapped: change of the logit gap, as a share",
        "Lindsey et al. 2025, On the Biology of a Large Language Model, multi-step reasoning",
        "",
        "<= -0.6",
        "mi_helpers.tracing_claims:country_swap",
    ),
    Claim(
        8,
        "two-hop-pair",
        "The same with features of this country and question alone",
        "measured in the lesson",
        "",
        ">= -0.7",
        "mi_helpers.tracing_claims:pair_swap",
        fast=False,
    ),
    Claim(
        8,
        "two-hop-both",
        "The same with both; -2 would be all that differs",
        "measured in the lesson",
        "",
        "<= -1",
        "mi_helpers.tracing_claims:both_swap",
        fast=False,
    ),
    Claim(
        8,
        "two-hop-random",
        "Negative control: as many features of the same layers, as active, taken out",
        "derived: nothing that is asked for changes",
        "0",
        "± 0.1",
        "mi_helpers.tracing_claims:country_random",
    ),
    Claim(
        8,
        "asked-swap",
        "Features of what is asked swapped: change of the logit gap, as a share",
        "Ameisen et al. 2025, Circuit Tracing; circuit-tracer's demonstration, say a capital",
        "",
        "<= -1",
        "mi_helpers.tracing_claims:asked_swap",
    ),
    Claim(
        8,
        "story-correlation",
        "Correlation of predicted and observed change, suppress and swap, 20 stories of steps",
        "Ameisen et al. 2025, Circuit Tracing, Validating with Interventions",
        "",
        ">= 0.7",
        "mi_helpers.tracing_claims:predicted_steps",
    ),
    Claim(
        8,
        "story-size",
        "The same stories: observed change over the predicted one",
        "derived: 1 in the replacement model",
        "1",
        "± 0.35",
        "mi_helpers.tracing_claims:size_of_steps",
    ),
    Claim(
        8,
        "story-size-labels",
        "The same for stories of the largest label",
        "measured in the lesson",
        "",
        "<= 0.6",
        "mi_helpers.tracing_claims:size_of_labels",
        fast=False,
    ),
    Claim(
        8,
        "single-correlation",
        "Correlation of predicted and observed change, single features, 4 prompts",
        "measured in the lesson",
        "",
        ">= 0.15",
        "mi_helpers.tracing_claims:predicted_singles",
        fast=False,
    ),
]


# -- verdicts --------------------------------------------------------------------------------


def number(text: str) -> float:
    """A published value, such as "2/5", "0.784" or "1e-5"."""
    return float(Fraction(text))


def bound(tolerance: str) -> tuple[str, float]:
    """Its sign, "±", ">=" or "<=", and its number. ValueError, with a sentence, for other text."""
    found = re.fullmatch(r"(±|>=|<=) *(\S+)", tolerance.strip())
    if not found:
        raise ValueError(
            f"The tolerance '{tolerance}' cannot be applied: write '± 0.02' beside a published "
            "value, or a bound such as '>= 0.9' or '<= 1e-5'."
        )
    return found[1], number(found[2])


def verdict(published: str, ours: float, tolerance: str) -> str:
    """HOLDS or FAILS. ValueError, with a sentence, for a tolerance that cannot be applied."""
    sign, limit = bound(tolerance)
    if sign == "±" and not published:
        raise ValueError(f"'{tolerance}' cannot be applied: there is no published value beside it.")
    if not math.isfinite(ours):
        return FAILS
    if sign == "±":
        return HOLDS if abs(ours - number(published)) <= limit else FAILS
    return HOLDS if (ours >= limit if sign == ">=" else ours <= limit) else FAILS


def is_rounding(row: dict[str, str]) -> bool:
    """Whether only rounding is measured: 0 is derived, and ours is to stay under a bound."""
    return row["published"] == "0" and bound(row["tolerance"])[0] == "<="


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
    claims = CLAIMS if claims is None else claims
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


def measure(lessons: list[int], path: Path = LEDGER, claims: list[Claim] | None = None) -> None:
    """Measure the claims of these lessons (all of them when empty), keep the others' rows."""
    claims = CLAIMS if claims is None else claims
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
    """Our value as text: mean ± standard deviation over the seeds; of rounding, its bound."""
    if not row["ours"]:
        return UNMEASURED
    if is_rounding(row) and row["verdict"] == HOLDS:
        return row["tolerance"]
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


def main(argv: list[str]) -> int:
    """`python -m mi_helpers claims [--measure [LESSON …]] [--readme]`."""
    parser = argparse.ArgumentParser(prog="python -m mi_helpers claims", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--measure", nargs="*", type=int, metavar="LESSON", help="measure anew")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="another claims.csv")
    options = parser.parse_args(argv)
    lessons = {claim.lesson for claim in CLAIMS}
    if unknown := set(options.measure or []) - lessons:
        parser.error(f"lesson {min(unknown)} has no claims; there are lessons {sorted(lessons)}.")
    try:
        if options.measure is not None:
            measure(options.measure, options.ledger)
            print("Now write the checksums of data/: python -m mi_helpers manifest --write\n")
        rows = read(options.ledger)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    if options.readme and not update_readme(rows):
        print(f"README.md has no markers {BEGIN} … {END}: put them where the table should stand.")
        return 1
    found = problems(rows)
    print("\n".join(["", *found]) if found else f"\nAll {len(rows)} claims hold.")
    return 1 if found else 0
