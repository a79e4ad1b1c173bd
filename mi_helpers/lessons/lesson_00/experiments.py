"""The lesion lab of lesson 00: silence a head, an attention block or an MLP; see which skills fail.

    lab = LesionLab(model)
    lab.before()                                  # {family: loss on its answers, nats per token}
    lab.after("head", layer=3, head=1, mode="mean")

A lesion is an ablation of one part (`mi_helpers.ablation`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.ablation import Mean, Part, Resample, Zero, ablate
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import Batch, losses_of_stream, make_batch, token_pool
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld.source import Document

MODES = {"zero": Zero, "mean": Mean, "resample": Resample}


class LesionLab:
    """Lesions of one model, on one batch of documents; every result is computed once.

    A lesion in layer L starts from the stream that enters layer L, which is kept from the intact
    run, so only the layers from L on are run.

    Args:
        batch: what the losses are measured on; by default `make_batch(model)`.
        reference: the other documents, whose activations the means and resamples are taken from.
    """

    def __init__(
        self, model: LanguageModel, batch: Batch | None = None, reference: Batch | None = None
    ):
        self.model = model
        self.batch = make_batch(model) if batch is None else batch
        self.reference = token_pool(model, reference)
        sites = ("resid_pre", "resid_final")
        _, self.clean = model.run_with_cache(self.batch.ids, sites, stop_at_layer=model.n_layers)
        self._known: dict[tuple, dict[str, float]] = {}

    def parts(self, layers=None) -> list[Part]:
        """(kind, layer, head) of every head and every MLP, of all layers or of some."""
        layers = range(self.model.n_layers) if layers is None else layers
        heads = range(self.model.n_heads)
        return [
            part for i in layers for part in (*(("head", i, h) for h in heads), ("mlp", i, None))
        ]

    def before(self) -> dict[str, float]:
        """{family: loss} of the intact model, in nats per scored token."""
        if () not in self._known:
            self._known[()] = losses_of_stream(self.model, self.batch, self.clean["resid_final"])
        return dict(self._known[()])

    def hooks(self, kind: str, layer: int, head: int | None = None, mode: str = "mean") -> dict:
        """The hooks of a lesion, with this lab's reference.

        Args:
            kind: "head", "attn" or "mlp".
            mode: "zero", "mean" or "resample".

        Raises:
            ValueError: no such part or mode.
        """
        if mode not in MODES:
            raise ModelError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")
        how = Zero() if mode == "zero" else MODES[mode](self.reference)
        return ablate(self.model, [(kind, layer, head)], how)

    def after(
        self, kind: str, layer: int, head: int | None = None, mode: str = "mean"
    ) -> dict[str, float]:
        """{family: loss} with one part silenced; arguments and errors as in `hooks`."""
        hooks = self.hooks(kind, layer, head, mode)
        return self._run((kind, layer, head, mode), layer, hooks)

    def noise(
        self, kind: str, layer: int, head: int | None = None, mode: str = "mean", seed: int = 0
    ) -> dict[str, float]:
        """The control: {family: loss} when the stream is pushed as far as the lesion pushes it,
        at every token, but in a random direction."""
        site = "mlp_out" if kind == "mlp" else "attn_out"
        change = self._written(site, layer, self.hooks(kind, layer, head, mode))
        change -= self._written(site, layer, {})  # (n, length, d_model)
        rng = torch.Generator().manual_seed(seed)
        push = F.normalize(torch.randn(change.shape, generator=rng).to(change), dim=-1)
        push *= change.norm(dim=-1, keepdim=True)
        key = (kind, layer, head, mode, "noise", seed)
        return self._run(key, layer, {(site, layer): lambda x: x + push})

    def damage(self, parts: list[Part], mode: str = "mean") -> Tensor:
        """Loss after each lesion less loss before, (parts, families), in nats."""
        before = torch.tensor(list(self.before().values()))
        after = [list(self.after(*part, mode=mode).values()) for part in parts]
        return torch.tensor(after) - before

    @torch.no_grad()
    def _run(self, key: tuple, layer: int, hooks: Mapping) -> dict[str, float]:
        if key not in self._known:
            with self.model.hooks(hooks):
                final = self.model.run_from_layer(
                    self.clean["resid_pre", layer], layer, stop_at_layer=self.model.n_layers
                )
            self._known[key] = losses_of_stream(self.model, self.batch, final)
        return dict(self._known[key])

    @torch.no_grad()
    def _written(self, site: str, layer: int, hooks: Mapping) -> Tensor:
        """What a layer's attention or MLP adds to the stream, (n, length, d_model)."""
        seen: list[Tensor] = []
        with self.model.hooks(hooks), self.model.hooks({(site, layer): seen.append}):
            self.model.run_from_layer(self.clean["resid_pre", layer], layer, layer + 1)
        return seen[0]


def strongest_dissociation(damage: Tensor) -> tuple[int, int, int, int]:
    """The two parts and two skills (i, a, j, b) with the largest

        (damage[i, a] - damage[i, b]) · (damage[j, b] - damage[j, a]),    both factors positive.

    The lesion of i takes skill a and spares b, that of j takes b and spares a: Teuber's (1955)
    double dissociation. A lesion that harms all skills alike scores 0.

    Args:
        damage: (parts, skills).
    """
    gap = damage[:, :, None] - damage[:, None, :]  # (parts, skills, skills)
    best = gap.amax(0).clamp(min=0)
    strength = best * best.T  # (skills, skills)
    a, b = divmod(int(strength.argmax()), strength.shape[1])
    return int(gap[:, a, b].argmax()), a, int(gap[:, b, a].argmax()), b


def last_answer(
    model: LanguageModel, document: Document, hooks: Mapping | None = None
) -> tuple[str, str, str]:
    """(text before the last answer, the answer, what the model says there under `hooks`)."""
    span = (document.find("answer") or document.find("pronoun"))[-1]
    prompt, truth = document.text[: span.start].rstrip(), document.text[span.start : span.end]
    n = len(model.str_tokens(f"{prompt} {truth}")) - len(model.str_tokens(prompt))
    with model.hooks(hooks or {}):
        return prompt, truth, model.generate(prompt, n)[len(prompt) :].strip()
