"""Two ways of writing that share nothing with the English frames: Norwegian prose, Python code."""

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD
from mi_helpers.tinyworld.source import LOG, Document, Draw, Page, compile_template

NORWEGIAN_FRAMES = tuple(
    compile_template(frame)
    for frame in (
        "{Name} {V} {N} i {Place}.",
        "{Time} {V} {Name} {N}.",
        "{DN} {ER} {Pred}.",
        "{N} ved {N2} {ER} {Pred}.",
        "i {Place} {FINNES} det {AN}.",
        "{Name} og {Name} {V} {N} {Time}.",
        "{Name} {SIER} at {N} {ER} {Pred}.",
        "hvorfor {V} {Name} {DN}?",
        "{Name} {V} {Adverb} {DN}.",
        "det {ER} {Name} som {V} {N}.",
        "{N} {V} {N2}, og {Name} {V} {DN}.",
        "{Name} {V} {AN} fra {Place}.",
    )
)
VERBS = {"ER": ("er", "var"), "FINNES": ("finnes", "fantes"), "SIER": ("sier", "sa")}


class Norwegian:
    """Bokmål: definite nouns, adjectives that agree, the verb second. The tense is hidden."""

    def __init__(self, draw: Draw):
        self.draw, self.page = draw, Page()
        self.past = draw.latent((False, True))
        self.head = None

    def document(self) -> Document:
        draw, page = self.draw, self.page
        shown = False
        for i in range(draw.pick((2, 3, 4, 5))):
            if i:
                page.write(" ")
            page.capital = True
            for part in draw.pick(NORWEGIAN_FRAMES):
                if isinstance(part, str):
                    page.write(part)
                else:
                    self.slot(part[0])
            shown = True  # every frame has a finite verb, which shows the tense
        # the tense costs its surprise once, with the first verb: nothing stays hidden
        nats = draw.nats + (draw.hidden if shown else 0.0)
        tense = "past" if self.past else "present"
        return Document(page.text(), "norwegian", {"tense": tense}, page.spans, nats)

    def slot(self, name: str) -> None:
        draw, page, words = self.draw, self.page, lexicon.norwegian()
        if name in VERBS:
            page.write(VERBS[name][self.past])
        elif name == "V":
            page.write(draw.pick(words["verb"])[self.past])
        elif name in ("N", "N2"):
            noun = draw.pick(words["noun"])
            if name == "N":
                self.head = noun  # a predicate agrees with the head, not with the nearest noun
            page.write(noun[1])
        elif name == "DN":
            self.head = draw.pick(words["noun"])
            definite = "det" if self.head[2] == "et" else "den"
            page.write(f"{definite} {draw.pick(words['adj'])[2]} {self.head[1]}")
        elif name == "AN":
            self.head = draw.pick(words["noun"])
            adjective = draw.pick(words["adj"])[self.head[2] == "et"]
            page.write(f"{self.head[2]} {adjective} {self.head[0]}")
        elif name == "Pred":
            page.write(draw.pick(words["adj"])[self.head[2] == "et"])
        elif name in ("Name", "Place"):
            kind = name.lower()
            page.mark(draw.pick(words[kind])[0], "entity", "person" if kind == "name" else "city")
        else:  # Adverb, Time
            page.write(draw.pick(words[name.lower()])[0])


def norwegian(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    return Norwegian(draw).document()


CODE_NAMES = (
    "value", "total", "count", "index", "item", "items", "result", "data", "text", "name",
    "line", "lines", "node", "left", "right", "size", "start", "end", "path", "score",
)  # fmt: skip
CODE_FUNCTIONS = (
    "load", "save", "find", "add", "merge", "split", "sort", "update", "parse", "check",
)  # fmt: skip
CODE_BODIES = tuple(
    compile_template(body)
    for body in (
        "    {c} = {a} + {n}\n    return {c!}\n",
        "    for {c} in {a}:\n        print({c!})\n    return {a}\n",
        "    if {a} > {n}:\n        return {a!}\n    return {b!}\n",
        "    {c} = len({a})\n    return {c!} - {n}\n",
        "    while {a} < {b}:\n        {a!} += {n}\n    return {a!}\n",
        "    {c} = [{a}, {b}]\n    return {c!}[{n}]\n",
        "    {c} = {a}.{f}({b})\n    return {c!}\n",
        "    print({a}, {b})\n    return None\n",
    )
)


def unseen(body: list) -> float:
    """What `python_code` draws for slots that a body lacks, in nats: a reader never pays it."""
    slots = {part[0] for part in body if not isinstance(part, str)}
    cost = {"c": LOG[len(CODE_NAMES) - 2], "n": LOG[10], "f": LOG[len(CODE_FUNCTIONS)]}
    return sum(nats for slot, nats in cost.items() if slot not in slots)


def python_code(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """Short functions, whose variables have to be the ones that were introduced."""
    page = Page()
    for _ in range(draw.pick((1, 2, 3))):
        a, b, c = draw.sample(CODE_NAMES, 3)
        function, other = draw.pick(CODE_FUNCTIONS), draw.pick(CODE_FUNCTIONS)
        values = {slot: (name, "variable", name) for slot, name in (("a", a), ("b", b), ("c", c))}
        values["n"] = (str(draw.pick(range(10))), None, None)
        values["f"] = (other, None, None)
        page.write("def ")
        page.mark(function, "entity", "function")
        page.write(f"({a}, {b}):\n")
        body = draw.pick(CODE_BODIES)
        draw.nats -= unseen(body)
        page.fill(body, values)
        page.write("\n")
    return Document(page.text(), "python", {}, page.spans, draw.nats)
