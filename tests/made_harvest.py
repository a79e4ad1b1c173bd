"""A harvest written by hand, so that what is in it is known."""

import torch

from mi_helpers.files import save_tensors, write_sealed
from mi_helpers.saes.activations import FORMAT, MANIFEST, Activations


def made_harvest(folder, x, target=None, shard_rows=300, piece=7, ids=None):
    """Rows x (n, d_in) and targets (n, d_out), in pieces of `piece` tokens without BOS."""
    shards, at_document = [], 0
    ids = torch.arange(len(x)) % 50 if ids is None else ids
    for index, begin in enumerate(range(0, len(x), shard_rows)):
        rows = slice(begin, min(begin + shard_rows, len(x)))
        n = rows.stop - rows.start
        start = torch.tensor([*range(0, n, piece), n])
        where = torch.arange(n)
        tensors = {
            "source": x[rows].bfloat16(),
            "piece": (where // piece).int(),
            "at": (where % piece).int(),
            "ids": ids[rows].int(),
            "start": start.int(),
            "document": at_document + torch.arange(len(start) - 1),
            "offset": torch.zeros(len(start) - 1, dtype=torch.int32),
        }
        if target is not None:
            tensors["target"] = target[rows].bfloat16()
        at_document += len(start) - 1
        name = f"shard-{index:05}.safetensors"
        digest = save_tensors(folder / name, tensors)
        shards.append({"file": name, "rows": n, "tokens": n, "sha256": digest})
    manifest = {
        "format": FORMAT,
        "model": {"name": "none", "sha256": ""},
        "source": ["resid_post", 1],
        "target": None if target is None else ["mlp_out", 1],
        "text": {"name": "made"},
        "d_in": x.shape[1],
        "d_out": (x if target is None else target).shape[1],
        "tokens": len(x),
        "rows": len(x),
        "left_out": {"bos": 0, "outliers": 0},
        "shards": shards,
    }
    write_sealed(folder / MANIFEST, manifest)
    return Activations.open(folder)


def sparse_data(n, d=16, latents=40, k=3, seed=0):
    """x (n, d): sums of k of `latents` random directions, with a common mean."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, d, generator=rng), dim=1)
    which = torch.rand(n, latents, generator=rng).topk(k).indices
    size = 1 + torch.rand(n, k, generator=rng)
    return (size[..., None] * directions[which]).sum(1) + 0.5
