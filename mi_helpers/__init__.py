"""Helpers of the course: small functions on torch and transformers, one module per method.

    from mi_helpers import load_model, logit_lens

The names below are what a notebook begins with; each is loaded from its module when it is first
used. All others are imported from their modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mi_helpers.attribution import direct_logit_attribution
    from mi_helpers.gradients import attribution_patch
    from mi_helpers.heads import head_scores
    from mi_helpers.layouts import ModelError
    from mi_helpers.lens import logit_lens
    from mi_helpers.loading import load_model, untrained
    from mi_helpers.models import LanguageModel
    from mi_helpers.patching import activation_patch
    from mi_helpers.paths import path_patch
    from mi_helpers.probes import fit_probe
    from mi_helpers.widgets import explore

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "ModelError",
    "activation_patch",
    "attribution_patch",
    "direct_logit_attribution",
    "explore",
    "fit_probe",
    "head_scores",
    "load_model",
    "logit_lens",
    "path_patch",
    "untrained",
]
_MODULES = {
    "attribution": ["direct_logit_attribution"],
    "gradients": ["attribution_patch"],
    "heads": ["head_scores"],
    "layouts": ["ModelError"],
    "lens": ["logit_lens"],
    "loading": ["load_model", "untrained"],
    "models": ["LanguageModel"],
    "patching": ["activation_patch"],
    "paths": ["path_patch"],
    "probes": ["fit_probe"],
    "widgets": ["explore"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
