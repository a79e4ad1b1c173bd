"""Every kind of file that the project reads, small and valid, and ways to spoil it.

`KINDS[name].make(folder)` writes the files of one kind, `.read(folder)` reads and uses them.
`spoiled(path)` gives the ways to spoil a file by hand, `others(value)` what may stand in JSON where
a value of another kind is expected.
"""

import importlib
import importlib.util
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from families import build, make_tokenizer
from made_harvest import made_harvest, sparse_data
from safetensors.torch import load_file, save_file

from mi_helpers.circuits.files import load_graph, save_graph
from mi_helpers.circuits.graphs import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, Node
from mi_helpers.course import ledger, record
from mi_helpers.files import (
    read_shapes,
    save_tensors,
    seal,
    verify_manifest,
    write_json,
    write_manifest,
)
from mi_helpers.lens import TunedLens
from mi_helpers.loading import load_model
from mi_helpers.saes import estimate
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import Features, collect
from mi_helpers.saes.files import load_coder, save_coder
from mi_helpers.saes.pipeline import read_settings
from mi_helpers.saes.processes import ALONE
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import Run, TrainConfig, keep_config, train

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Kind:
    """A kind of folder: which of its files strangers write, how it is made, how it is read."""

    files: tuple[str, ...]
    make: Callable[[Path], object]
    read: Callable[[Path], object]


# ---------------------------------------------------------------------------------------- models


def make_model(folder: Path) -> None:
    build("gemma2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_sharded(folder: Path) -> None:
    build("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    names = read_shapes(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {n: "model-00001-of-00001.safetensors" for n in names}
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": index})


def use_model(folder: Path) -> None:
    model = load_model(folder)
    model.forward(torch.zeros(1, 2, dtype=torch.int64))
    model.str_tokens("The cat")


# ---------------------------------------------------------------------------------------- coders


def make_sae_lens(folder: Path, activation: str = "topk", **changes) -> None:
    coder = SparseCoder(6, 12, activation=activation, k=2, **changes)
    save_coder(coder, folder, model_name="none", hook_name="blocks.1.hook_resid_post")


def make_sparsify(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    coder = SparseCoder(6, 12, k=2)
    p = {name: x.detach().contiguous() for name, x in coder.named_parameters()}
    p["encoder.weight"] = p.pop("W_enc").T.contiguous()
    p["encoder.bias"] = p.pop("b_enc")
    save_file(p, folder / "sae.safetensors")
    said = {
        "activation": "topk",
        "expansion_factor": 2,
        "normalize_decoder": True,
        "num_latents": 0,
    }
    write_json(folder / "cfg.json", said | {"k": 2, "multi_topk": False, "d_in": 6})


def scope(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    coder = SparseCoder(6, 12, activation="jumprelu")
    return {name: x.detach().contiguous() for name, x in coder.named_parameters()}


def make_scope(folder: Path) -> None:
    np.savez(folder / "params.npz", **{n: x.numpy() for n, x in scope(folder).items()})


def make_scope_2(folder: Path) -> None:
    tensors = {n.replace("W_", "w_"): x for n, x in scope(folder).items()}
    save_file(tensors, folder / "params.safetensors")


def make_layer(folder: Path) -> None:
    tensors = scope(folder)
    tensors["activation_function.threshold"] = tensors.pop("threshold")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, folder / "layer_0.safetensors")


def use_coder(folder: Path) -> None:
    coder = load_coder(folder)
    coder(torch.ones(2, coder.d_in))


# -------------------------------------------------------------------------------- text to features


def make_harvest(folder: Path) -> None:
    made_harvest(folder, sparse_data(40, d=6))


def use_harvest(folder: Path) -> None:
    held = Activations.open(folder)
    held.slice(0, held.rows)
    assert len(held.tokens) == held.rows
    repr(held)


CONFIG = TrainConfig(
    latents=12, k=2, batch=8, steps=2, held_out=4, log_every=1, save_every=1, products="float32"
)


def make_run(folder: Path) -> None:
    """A run that was ended after its first step."""
    held = made_harvest(folder / "harvest", sparse_data(40, d=6))
    run = Run(held, folder, CONFIG, keep_config(folder, CONFIG, held, ALONE))
    run.begin()
    run.log(run.advance())
    run.save(1.0)


def use_run(folder: Path) -> None:
    train(Activations.open(folder / "harvest"), folder, CONFIG, progress=False)


def make_features(folder: Path) -> None:
    held = made_harvest(folder / "harvest", sparse_data(40, d=6))
    collect(held, SparseCoder(6, 12, k=2)).save(folder / "features.safetensors")


def use_features(folder: Path) -> None:
    found = Features.load(folder / "features.safetensors")
    assert found.frequency is not None and found.dead is not None
    found.quantiles(0)


# --------------------------------------------------------------------------------- lens and graph


def make_lens(folder: Path) -> None:
    TunedLens(2, 3).save(folder)


def use_lens(folder: Path) -> None:
    lens = TunedLens.load(folder)
    lens(torch.zeros(lens.d_model), 0)


def make_graph(folder: Path) -> None:
    nodes = (
        Node(EMBEDDING, -1, 0, 5),
        Node(FEATURE, 0, 1, 1),
        Node(ERROR, 0, 1),
        Node(LOGIT, 1, 1, 7),
    )
    values = {"bias": torch.zeros(4), "values": torch.ones(4), "probabilities": torch.ones(1)}
    edges = torch.ones(4, 4).tril(-1)
    about = {"target_names": (" cat",), "supernodes": {"a": ("0_1_1",)}, "settings": {"n": 1}}
    graph = Graph("The cat", ("The", " cat"), nodes, edges, **values, n_layers=1, **about)
    save_graph(graph, folder / "graph.json")


def use_graph(folder: Path) -> None:
    graph = load_graph(folder / "graph.json")
    repr(graph), graph.incoming(graph.nodes[-1].id)


# ------------------------------------------------------------------------------------------- text


def make_lines(folder: Path) -> None:
    rows = [{"text": f"The cat {i} sat.", "n": i} for i in range(3)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make_parquet(folder: Path) -> None:
    pyarrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(
        pyarrow.table({"text": ["The cat", None, "sat"], "n": [1, 2, 3]}), folder / "a.parquet"
    )


def make_text(folder: Path) -> None:
    (folder / "a.txt").write_text("The cat\nsat.\n\nRome\n", "utf-8")


def read_source(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        source = open_source(str(folder / name))
        assert all(isinstance(text, str) for text in source.texts())
        source.identity()

    return read


# -------------------------------------------------------------------------------- settings, course

TOML = 'model = "tiny-gemma"\ntokens = 3\nsparsity = 0.5\nskip = false\nactivation = "topk"\n'


def use_progress(folder: Path) -> None:
    assert isinstance(record.read(folder / "progress.json"), dict)


def make_ledger(folder: Path) -> None:
    row = dict.fromkeys(ledger.COLUMNS, "1")
    ledger.write([row, row], folder / "claims.csv")


def make_manifest(folder: Path) -> None:
    (folder / "a.txt").write_text("a", "utf-8")
    write_manifest(folder)


CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
KINDS = {
    "model": Kind((*CONFIGS, "model.safetensors"), make_model, use_model),
    "shards": Kind((INDEX, "model-00001-of-00001.safetensors"), make_sharded, use_model),
    "shape": Kind(("config.json",), make_model, lambda f: estimate.shape_of(str(f))),
    "SAELens": Kind(("cfg.json", "sae_weights.safetensors"), make_sae_lens, use_coder),
    "sparsify": Kind(("cfg.json", "sae.safetensors"), make_sparsify, use_coder),
    "Gemma Scope": Kind(("params.npz",), make_scope, use_coder),
    "Gemma Scope 2": Kind(("params.safetensors",), make_scope_2, use_coder),
    "circuit-tracer": Kind(("layer_0.safetensors",), make_layer, use_coder),
    "harvest": Kind(("manifest.json", "shard-00000.safetensors"), make_harvest, use_harvest),
    "run": Kind(
        ("recipe.json", "checkpoint.safetensors", "log.csv", "seconds.json"), make_run, use_run
    ),
    "features": Kind(("features.safetensors",), make_features, use_features),
    "lens": Kind(("cfg.json", "lens.safetensors"), make_lens, use_lens),
    "graph": Kind(("graph.json",), make_graph, use_graph),
    "jsonl": Kind(("a.jsonl",), make_lines, read_source("a.jsonl")),
    "txt": Kind(("a.txt",), make_text, read_source("a.txt")),
    "TOML": Kind(
        ("a.toml",),
        lambda f: (f / "a.toml").write_text(TOML, "utf-8"),
        lambda f: read_settings({}, f / "a.toml"),
    ),
    "progress": Kind(
        ("progress.json",),
        lambda f: write_json(f / "progress.json", {"passed": ["1.1", "2.3"]}),
        use_progress,
    ),
    "ledger": Kind(("claims.csv",), make_ledger, lambda f: ledger.read(f / "claims.csv")),
    "manifest": Kind(("MANIFEST",), make_manifest, verify_manifest),
}
if importlib.util.find_spec("pyarrow"):
    KINDS["parquet"] = Kind(("a.parquet",), make_parquet, read_source("a.parquet"))


# ------------------------------------------------------------------------------- ways to spoil them

BYTES = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"x"',
    "an object": b"{}",
    "half": b'{"a": ',
    "NaN": b"NaN",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "closed lists": b"[" * 5_000 + b"]" * 5_000,
    "a vast number": b'{"k": ' + b"9" * 5_000 + b"}",
    "another encoding": '{"k": "é"}'.encode("utf-16"),
    "no UTF-8": b'{"k": "\xff\xfe"}',
    "a lone surrogate": rb'{"k": "\ud800"}',
    "a zero byte": b"\0",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "random": bytes(range(256)),
    "a header's length": struct.pack("<Q", 2**63),
    "a header's length alone": struct.pack("<Q", 4),
}
WRONG = {
    "null": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "vast": 10**30,
    "infinite": float("inf"),
    "NaN": float("nan"),
    "three": "three",
    "a surrogate": "\ud800",
    "up": "../up",
    "a list": [],
    "lists": [[]],
    "numbers": [1, 2, 3],
    "an object": {},
    "objects": {"a": {"b": None}},
}


def spoiled(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """(name, function that spoils it in place) for a file: its whole content, then its values."""
    for name, data in BYTES.items():
        yield name, lambda p, data=data: p.write_bytes(data)
    yield "missing", lambda p: p.unlink()
    yield "a folder", lambda p: (p.unlink(), p.mkdir())
    yield "a loop", lambda p: (p.unlink(), p.symlink_to(p.name))
    yield "truncated", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
    yield "one byte less", lambda p: p.write_bytes(p.read_bytes()[:-1])
    yield "one byte more", lambda p: p.write_bytes(p.read_bytes() + b"\xff")
    if path.suffix == ".json":
        for where in places(json.loads(path.read_bytes())):
            for name, value in WRONG.items():
                yield f"{'.'.join(map(str, where))} {name}", put(where, value)
            yield f"{'.'.join(map(str, where))} left out", put(where, ...)
    elif path.suffix == ".safetensors":
        yield from spoiled_tensors(path)
    elif path.suffix == ".npz":
        yield from spoiled_arrays(path)
    elif path.suffix in (".jsonl", ".toml", ".csv", ".txt", ""):
        yield from spoiled_lines(path)


def places(value, start: tuple = ()) -> Iterator[tuple]:
    """The paths of a JSON value's entries: of each list the first, of large objects a dozen."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries)[: 40 if isinstance(value, dict) and len(start) < 1 else 12]:
        if isinstance(value, list) and key:
            continue
        yield (*start, key)
        if isinstance(inner, dict | list) and len(start) < 3:
            yield from places(inner, (*start, key))


def put(where: tuple, new) -> Callable[[Path], None]:
    """A function that puts a value into a JSON file (..., to leave it out)."""

    def write(path: Path) -> None:
        value = at = json.loads(path.read_bytes())
        for key in where[:-1]:
            at = at[key]
        if new is ...:
            del at[where[-1]]
        else:
            at[where[-1]] = new
        if where != ("sha256",) and isinstance(value.get("sha256"), str):  # as strangers can, too
            value["sha256"] = seal({k: v for k, v in value.items() if k != "sha256"})
        path.write_text(json.dumps(value), "utf-8")

    return write


def head_of(path: Path) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_head(path: Path, head, data: bytes) -> None:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def spoiled_tensors(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Headers of other kinds, and tensors of other shapes, dtypes and values."""
    head, data = head_of(path)
    for name, raw in BYTES.items():
        yield f"its header {name}", lambda p, raw=raw: write_head(p, raw, data)
    for tensor in [name for name in head if name != "__metadata__"]:
        for key in head[tensor]:
            for name, value in WRONG.items():
                new = head | {tensor: head[tensor] | {key: value}}
                yield f"{tensor} {key} {name}", lambda p, new=new: write_head(p, new, data)
        for name in ("I64", "BOOL", "F8_E4M3", "F16", "C64", "U16"):
            new = head | {tensor: head[tensor] | {"dtype": name}}
            yield f"{tensor} {name}", lambda p, new=new: write_head(p, new, data)
        less = {k: v for k, v in head.items() if k != tensor}
        yield f"{tensor} left out of the header", lambda p, new=less: write_head(p, new, data)
    for name, value in WRONG.items():
        new = head | {"__metadata__": value}
        yield f"metadata {name}", lambda p, new=new: write_head(p, new, data)
        about = head | {"__metadata__": {"mi_helpers": json.dumps(value)}}
        yield f"about {name}", lambda p, new=about: write_head(p, new, data)
        said = {"mi_helpers": json.dumps({"sha256": value, "about": value})}
        yield (
            f"inside about {name}",
            lambda p, s=said: write_head(p, head | {"__metadata__": s}, data),
        )
    held, about = load_file(path), head.get("__metadata__")
    for tensor, x in held.items():
        made = {
            "flat": x.reshape(-1),
            "of one more axis": x[None],
            "a number": x.reshape(-1)[:1].reshape(()),
            "empty": x.reshape(-1)[:0],
            "whole numbers": x.long(),
            "double": x.double(),
            "minus one": torch.full_like(x, -1) if x.dtype != torch.bool else x,
            "vast": torch.full_like(x, 2**15) if x.dtype != torch.bool else x,
            "bits": x.bool(),
        }
        if x.is_floating_point():
            made |= {"NaN": x * float("nan"), "infinite": x + float("inf")}
        for name, new in made.items():
            put_in = held | {tensor: new.contiguous()}
            yield f"{tensor} {name}", lambda p, t=put_in: save_file(t, p, about)
        less = {k: v for k, v in held.items() if k != tensor}
        yield f"{tensor} left out", lambda p, t=less: save_file(t, p, about)
    more = held | {"more": torch.zeros(2)}
    yield "one tensor more", lambda p: save_file(more, p, about)
    if about and "mi_helpers" in about:
        of = json.loads(about["mi_helpers"])["about"]
        for tensor in held:  # with a checksum that fits: as a stranger would write it
            less = {k: v for k, v in held.items() if k != tensor}
            yield f"{tensor} left out, checksum right", lambda p, t=less: save_tensors(p, t, of)
            flat = held | {tensor: held[tensor].reshape(-1)[:1]}
            yield f"{tensor} short, checksum right", lambda p, t=flat: save_tensors(p, t, of)
        for where in places(of):
            for name, value in WRONG.items():
                new = of | {where[0]: value}
                if len(where) == 1:
                    yield (
                        f"about {where[0]} {name}, checksum right",
                        lambda p, n=new: save_tensors(p, held, n),
                    )


def spoiled_arrays(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Arrays of other kinds, and archives of other contents."""
    with np.load(path) as file:
        held = dict(file)
    for key, x in held.items():
        made = {
            "flat": x.reshape(-1),
            "a number": x.reshape(-1)[0],
            "empty": x.reshape(-1)[:0],
            "text": np.array(["a", "b"]),
            "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
            "complex": x.astype(complex),
            "unsigned": x.astype(np.uint16),
            "records": np.zeros(3, dtype=[("a", "f4")]),
            "NaN": x * np.nan,
            "big-endian": x.astype(">f4"),
            "long": x.astype(np.longdouble),
        }
        for name, new in made.items():
            yield f"{key} {name}", lambda p, a=held | {key: new}: np.savez(p, **a)
        less = {k: v for k, v in held.items() if k != key}
        yield f"{key} left out", lambda p, a=less: np.savez(p, **a)

    def entry(name: str, data: bytes) -> Callable[[Path], None]:
        def write(p: Path) -> None:
            with zipfile.ZipFile(p, "w") as archive:
                archive.writestr(name, data)

        return write

    yield "no array inside", entry("W_enc.npy", b"no array")
    yield "an entry up", entry("../up.npy", b"")
    yield "a bad header", entry("W_enc.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[  ")
    yield "a deep header", entry("W_enc.npy", b"\x93NUMPY\x02\x00\x00\x20\x00\x00" + b"(" * 8192)
    yield "another version", entry("W_enc.npy", b"\x93NUMPY\x09\x00\x10\x00" + b" " * 16)
    yield "an empty archive", lambda p: zipfile.ZipFile(p, "w").close()


def spoiled_lines(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Every line replaced by other content, and other line ends."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(min(3, len(lines))):
        for name, raw in BYTES.items():
            new = b"".join([*lines[:number], raw + b"\n", *lines[number + 1 :]])
            yield f"line {number} {name}", lambda p, new=new: p.write_bytes(new)
        for name, value in WRONG.items():
            for key in ("text", "tokens", "model", "sparsity"):
                row = json.dumps({key: value}) if path.suffix == ".jsonl" else ""
                row = row or f"{key} = {json.dumps(value)}"
                new = b"".join([*lines[:number], row.encode() + b"\n", *lines[number + 1 :]])
                yield f"line {number} {key} {name}", lambda p, new=new: p.write_bytes(new)
    yield "other line ends", lambda p: p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n"))
