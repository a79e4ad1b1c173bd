"""`python -m mi_helpers browse RUN`: the latents of a finished run as one HTML page, to search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mi_helpers.errors import first_line, reading
from mi_helpers.files import RunError, alone_in
from mi_helpers.saes.find import AGAIN, LATENTS
from mi_helpers.saes.name_run import NAMES as LINES
from mi_helpers.saes.name_run import names_of
from mi_helpers.views.latents import latents_page

PAGE, NAMES = "latents.html", "names"


def browse(run: Path, names: str = "names", link: str = "") -> Path:
    """Write RUN/latents.html: each latent's contexts, with its name where `name` gave it one.

    Args:
        run: the run's folder.
        names: the folder in it that has the names.
        link: an address in which {latent} stands for the number, such as Neuronpedia's.

    Returns:
        the page's path.

    Raises:
        RunError: the run has no latents.jsonl yet, or it is damaged; or the names are of another
            coder.
    """
    if not (run / LATENTS).is_file():
        raise RunError(
            f"There is no {LATENTS} in {run}: give the folder of a run, and let `python -m "
            "mi_helpers features` finish there first."
        )
    if link and "{latent}" not in link:
        raise RunError(f"--link is {link!r}: put {{latent}} where the latent's number stands.")
    if names != NAMES and not (run / names / LINES).is_file():
        raise RunError(f"There are no names in {run / names}: give a folder that `name` wrote.")
    named = {
        latent: (each.explanation.text, max(0.0, each.scores.simulation.value))
        for latent, each in names_of(run, names).items()
        if each.explanation is not None and each.scores is not None
    }
    with alone_in(run):
        label = f"{run.resolve().name}: latents"
        said = "{} is damaged: {}. {}".format
        with reading(
            run / LATENTS, RunError, tell=lambda e: said(run / LATENTS, first_line(e), AGAIN)
        ):
            return latents_page(run / PAGE, run / LATENTS, label=label, names=named, link=link)


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    names: str = "names",
    link: str = "",
) -> int:
    """The latents of a finished run as one HTML page, searched by token, name and density.

    Args:
        run: the run's folder
        names: the folder in RUN that `name` put names into, if it did
        link: an address in which {latent} stands for the number
    """
    print(f"{browse(run, names, link)}: open it in any browser; it asks for nothing.")
    return 0
