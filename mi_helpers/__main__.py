"""`python -m mi_helpers COMMAND …`: one table of commands, each imported only when it is called."""

import difflib
import importlib
import sys

COMMANDS = {
    "claims": ("mi_helpers.course.ledger:main", "show the ledger of claims, or measure it anew"),
    "doctor": ("mi_helpers.course.doctor:main", "say what works on this machine"),
    "exercises": ("mi_helpers.course.prove:main", "prove every exercise of every lesson"),
    "features": ("mi_helpers.saes.pipeline:main_features", "say what each latent of a coder is"),
    "harvest": ("mi_helpers.saes.pipeline:main_harvest", "write a model's activations to disk"),
    "make-sae": (
        "mi_helpers.lessons.lesson_06.grid:main",
        "make the sparse autoencoder that ships in data/",
    ),
    "make-transcoders": ("mi_helpers.saes.transcoders:main", "make the transcoders in data/"),
    "manifest": ("mi_helpers.files:main_manifest", "check or write the checksums of data/"),
    "notebooks": ("mi_helpers.course.notebooks:main", "run the notebooks and save them clean"),
    "report": ("mi_helpers.saes.pipeline:main_report", "measure a trained coder, in the model too"),
    "run": ("mi_helpers.saes.pipeline:main_run", "harvest, train, report and features, in one go"),
    "skills": ("mi_helpers.tiny_gemma.skills:main", "measure what the model can do, per family"),
    "tinyworld": ("mi_helpers.tinyworld.__main__:main", "write text from the TinyWorld generator"),
    "train": ("mi_helpers.saes.pipeline:main_train", "train a sparse coder on a harvest"),
    "train-model": ("mi_helpers.tiny_gemma.training:main_train", "train tiny-gemma again"),
}


def usage() -> str:
    """The list of commands, one line each."""
    lines = [f"  {name:16} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m mi_helpers COMMAND [--help]", "", *lines])


def unknown(name: str) -> str:
    """One sentence for a command that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}."
    return f"There is no command '{name}': {advice}"


def main(argv: list[str] | None = None) -> int:
    """Run one command with the rest of the arguments; its exit code, or 2 for a bad command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        print(unknown(name), file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)(rest)


if __name__ == "__main__":
    sys.exit(main())
