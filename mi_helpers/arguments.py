"""What a function was given, checked: numbers, tensors, names, prompts, a device.

    k = whole("k", k, least=1, most=model.d_vocab)
    stream = tensor("stream", stream, "depths n d_model", model)     # finite, on the model's device
    rows = prompt_rows(model, ["one prompt", "a longer one"])        # each prompt's own token ids
    device = resolve_device("auto")

Each returns what is gone on with, or raises `ModelError` with one sentence that names the argument.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mi_helpers.layouts import ModelError, nearest

# -------------------------------------------------------------------------- numbers and names


def one_of(what: str, given, known: Sequence[str]) -> str:
    """`given`, one of some names.

    Raises:
        ModelError: it is none of them; the nearest one is named.
    """
    if not isinstance(given, str) or given not in known:
        raise ModelError(
            f"{what} is {given!r}: expected one of {', '.join(known)}.{nearest(given, known)}"
        )
    return given


def whole(what: str, given, least: int | None = None, most: int | None = None) -> int:
    """A whole number from `least` to `most`, as an int.

    Raises:
        ModelError: it is no whole number (True and 2.0 are none), or out of range.
    """
    single = not isinstance(given, bool | np.bool_) and getattr(given, "ndim", 0) == 0
    try:
        value = operator.index(given) if single else None
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without data
        value = None
    low = -math.inf if least is None else least
    high = math.inf if most is None else most
    if value is None or not low <= value <= high:
        bounds = {"of at least": least, "of at most": most}
        if least is not None and most is not None:
            bounds = {"from": least, "to": most}
        said = " ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        raise ModelError(f"{what} is {shown(given)}: expected a whole number {said}".rstrip() + ".")
    return value


def number(
    what: str, given, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> float:
    """A finite number from `least` to `most`, and above `above`.

    Raises:
        ModelError: it is none, NaN, infinite or out of range.
    """
    fits = isinstance(given, numbers.Real) and not isinstance(given, bool | np.bool_)
    try:
        fits = fits and math.isfinite(given) and least <= given <= most and given > above
    except OverflowError:  # a whole number that no float holds
        fits = False
    if not fits:
        said = "a finite number"
        said += f" above {above:g}" if above > -math.inf else ""
        said += f" of at least {least:g}" if least > -math.inf else ""
        said += f" of at most {most:g}" if most < math.inf else ""
        raise ModelError(f"{what} is {shown(given)}: expected {said}.")
    return float(given)


def indices(given: int | Sequence[int] | None, count: int, what: str) -> list[int]:
    """Indices from 0 to count - 1; None gives all, and negative ones count from the end.

    Raises:
        ModelError: none at all, no whole numbers, or one that is out of range; `what` names one of
            them in the message.
    """
    if given is None:
        return list(range(count))
    each = given if isinstance(given, Tensor | np.ndarray | Sequence) else [given]
    each = [each] if isinstance(each, str) or getattr(each, "ndim", 1) == 0 else each
    if isinstance(each, Tensor | np.ndarray) and each.ndim == 1 and "int" in str(each.dtype):
        each = each.tolist()
    fits = [isinstance(i, int) and not isinstance(i, bool) for i in each]
    each = [i if fit else _plain_int(i) for i, fit in zip(each, fits, strict=True)]
    fits = [isinstance(i, int) and not isinstance(i, bool) and -count <= i < count for i in each]
    if not each or not all(fits):
        raise ModelError(
            f"The {what}s are {shown(each)}: expected at least one, from 0 to {count - 1}, or "
            "negative ones, which count from the end."
        )
    return [i % count for i in each]


def _plain_int(given: Any) -> Any:
    """A whole number as an int, anything else as it is."""
    try:
        return whole("", given)
    except ModelError:
        return given


def token_ids(what: str, given, d_vocab: int) -> list[int]:
    """Token ids, one or several; negative ones are none.

    Raises:
        ModelError: what else was given.
    """
    if isinstance(given, Tensor | np.ndarray):
        given = [] if getattr(given, "is_meta", False) else given.reshape(-1).tolist()
    each = list(given) if isinstance(given, list | tuple | range) else [given]
    try:
        found = [whole(what, i, 0, d_vocab - 1) for i in each]
    except ModelError:
        found = []
    if not found:
        raise ModelError(
            f"{what} is {shown(each)}: expected token ids, at least one, from 0 to {d_vocab - 1}."
        )
    return found


def ids_on(model: Any, what: str, given) -> Tensor:
    """`token_ids` of a model, (n,), on its device."""
    return torch.tensor(token_ids(what, given, model.d_vocab), device=model.device)


def checked_head(model: Any, head: Any, what: str = "The head") -> tuple[int, int]:
    """A head as (layer, head), counted from the first.

    Raises:
        ModelError: the model has no such head.
    """
    if not isinstance(head, tuple | list) or len(head) != 2:
        raise ModelError(f"{what} is {shown(head)}: expected (layer, head).")
    layer, number_ = head
    return (
        indices([layer], model.n_layers, "layer")[0],
        indices([number_], model.n_heads, "head")[0],
    )


def shown(given: Any) -> str:
    """A value in a sentence: arrays and tensors by their shape, long texts cut."""
    if isinstance(given, Tensor | np.ndarray) and given.ndim:
        kind = "a tensor" if isinstance(given, Tensor) else "an array"
        return f"{kind} of shape {tuple(given.shape)}"
    text = " ".join(repr(given).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------- tensors and arrays

KINDS = {
    "numbers": lambda x: x.is_floating_point(),
    "ids": lambda x: not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool),
    "booleans": lambda x: x.dtype == torch.bool,
}


def tensor(what: str, given, axes: str, sizes: Any = None, kind: str = "numbers") -> Tensor:
    """A tensor with the axes, the kind and the device that are expected, and without NaN.

    Args:
        axes: names such as "batch pos d_model"; "..." first stands for any number of axes.
        sizes: a model or {name: size}, which say how large an axis of that name is; any other may
            have any size but 0. Numbers have to be on a model's device.
        kind: "numbers" (floating point, finite), "ids" (whole numbers) or "booleans".

    Raises:
        ModelError: what is expected, and what was given.
    """
    if not isinstance(given, Tensor):
        raise ModelError(f"{what} is {_kind_of(given)}: expected a tensor ({axes}).")
    shown = _axes_missed(tuple(given.shape), axes, sizes)
    if shown or not KINDS[kind](given):
        raise ModelError(
            f"{what} has shape {tuple(given.shape)} and holds {given.dtype}: expected {kind} of "
            f"shape ({shown or axes}), at least one."
        )
    device = None if isinstance(sizes, Mapping) else getattr(sizes, "device", None)
    if given.device.type == "meta" and device != given.device:
        raise ModelError(f"{what} is on the meta device, so it holds no numbers.")
    if kind == "numbers":
        if device is not None and given.device != device:
            raise ModelError(
                f"{what} is on {given.device} and {sizes.name} on {device}: move one with .to(...)."
            )
        finite(what, given)
    return given


def _axes_missed(shape: tuple[int, ...], axes: str, sizes: Any) -> str:
    """The shape that is expected, in words, where another was given; else ""."""
    names = axes.split()
    more = names[0] == "..."
    names = names[1:] if more else names
    wanted = [_size_of(name, sizes) for name in names]
    last = shape[max(0, len(shape) - len(names)) :] if more else shape
    fits = len(last) == len(names) and 0 not in shape
    if fits and all(size in (None, s) for size, s in zip(wanted, last, strict=True)):
        return ""
    each = [name if size is None else str(size) for name, size in zip(names, wanted, strict=True)]
    return ", ".join(["..."] * more + each)


def _size_of(name: str, sizes: Any) -> int | None:
    """The size that an axis of this name has in a model or a mapping; None: any."""
    if name.isdigit():
        return int(name)
    found = sizes.get(name) if isinstance(sizes, Mapping) else getattr(sizes, name, None)
    return found if isinstance(found, int) else None


def finite(what: str, x: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: how many numbers are neither.
    """
    if x.device.type == "meta" or math.isfinite(float(x.detach().sum(dtype=torch.float32))):
        return  # one pass without a mask; a sum may overflow, so look again
    wrong = int((~torch.isfinite(x.detach())).sum())
    if wrong:
        raise ModelError(
            f"{what} holds NaN or infinity in {wrong} of {x.numel()} numbers: leave these out, "
            "and look for where they come from."
        )


def array(what: str, given, axes: str, sizes: Mapping[str, int] | None = None) -> np.ndarray:
    """A float64 array with the axes that are expected, from whatever NumPy reads as one.

    Args:
        axes, sizes: as for `tensor`.

    Raises:
        ModelError: other axes, nothing in it, no numbers, NaN or infinity.
    """
    if isinstance(given, Tensor):
        given = given.detach().cpu() if given.device.type != "meta" else None
        if given is not None and given.dtype == torch.bfloat16:  # which NumPy does not have
            given = given.float()
    try:
        found = np.asarray(given, dtype=None if hasattr(given, "dtype") else np.float64)
        found = found.astype(np.float64, casting="unsafe" if found.dtype.kind != "c" else "safe")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ModelError(f"{what} is {_kind_of(given)}: expected numbers ({axes}).") from None
    if shown := _axes_missed(found.shape, axes, sizes or {}):
        raise ModelError(
            f"{what} has shape {found.shape}: expected numbers of shape ({shown}), at least one."
        )
    if not np.isfinite(found).all():
        raise ModelError(
            f"{what} holds NaN or infinity in {int((~np.isfinite(found)).sum())} of {found.size} "
            "numbers: look for where they come from."
        )
    return found


def _kind_of(given: Any) -> str:
    name = type(given).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if given is not None else "None"


def square(what: str, given) -> Tensor:
    """A square matrix of finite numbers, (n, n).

    Raises:
        ModelError: what else was given.
    """
    n = given.shape[0] if isinstance(given, Tensor) and given.ndim else 1
    return tensor(what, given, "n n", {"n": n})


# ------------------------------------------------------------------------------------- devices

NO_FLOAT64 = {"mps"}  # the kinds of device that have no float64


def resolve_device(given: str | torch.device | None = None) -> torch.device:
    """The device of a name.

    Args:
        given: "auto" (CUDA, else MPS, else the CPU), "cpu", "cuda", "cuda:1" or "mps"; None means
            the environment variable MI_DEVICE, else the CPU.

    Raises:
        ModelError: there is no such device, or not on this machine.
    """
    name = "" if given is None else str(given)
    asked = name or os.environ.get("MI_DEVICE") or "cpu"
    by = "The device" if name else "MI_DEVICE"
    if asked == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((kind for kind, there in found.items() if there), "cpu"))
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"{by} is {asked!r}: expected auto, cpu, cuda, cuda:1 or mps.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"{by} is {asked!r}, and torch sees no CUDA device here: choose cpu, or auto for what "
            "there is."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"{by} is {asked!r}, and this machine has {torch.cuda.device_count()} CUDA device(s), "
            "numbered from 0."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(
            f"{by} is {asked!r}, and this machine has no MPS, Apple's GPU: choose cpu, or auto for "
            "what there is."
        )
    return device


def exact(x: Tensor) -> Tensor:
    """x in float64, or in float32 on a device that has no float64 (MPS)."""
    return x.to(torch.float32 if x.device.type in NO_FLOAT64 else torch.float64)


# -------------------------------------------------------------------------------------- prompts


def prompt_rows(model: Any, prompts: Any, what: str = "The prompts") -> list[Tensor]:
    """Each prompt's own token ids, (pos,) each, without padding.

    Args:
        prompts: a text, or texts; ids (pos,) or (batch, pos), padded on either side with the
            tokenizer's own padding token; rows of ids of unequal length; or what a tokenizer
            returns, a mapping with `input_ids` and `attention_mask`.
        what: names them in a message.

    Raises:
        ModelError: what `model.ids` refuses; padding between tokens, on its own, or that cannot be
            told from text.
    """
    if isinstance(prompts, Mapping):
        return _masked_rows(model, prompts, what)
    if isinstance(prompts, list | tuple) and prompts:
        if any(isinstance(each, str) for each in prompts):
            if not all(isinstance(each, str) for each in prompts):
                raise ModelError(f"{what} are texts and ids: give one or the other.")
            return [model.ids(each)[0] for each in prompts]
        listed = (each for each in prompts if isinstance(each, list | tuple | Tensor | np.ndarray))
        sizes = {len(each) for each in listed if getattr(each, "ndim", 1)}
        if len(sizes) > 1:
            rows = [model.ids(each) for each in prompts]
            if any(len(row) != 1 for row in rows):
                raise ModelError(f"{what} hold a batch in a list: give one row of ids for each.")
            return [row[0] for row in rows]
        if isinstance(prompts[0], Tensor) and prompts[0].ndim == 1:
            prompts = torch.stack(list(prompts))
    if isinstance(prompts, str):
        return list(model.ids(prompts))
    pad = padding_token(model)
    if pad is not None and pad >= model.d_vocab:  # a row was never added for it
        mask = torch.as_tensor(prompts) != pad
        return _masked_rows(model, {"input_ids": prompts, "attention_mask": mask.int()}, what)
    return _without_padding(model, model.ids(prompts), what)


def _masked_rows(model: Any, prompts: Mapping, what: str) -> list[Tensor]:
    """The rows of a tokenizer's output, by its attention mask."""
    missing = [name for name in ("input_ids", "attention_mask") if name not in prompts]
    if missing:
        raise ModelError(f"{what} have no {missing[0]}: give what the tokenizer returned.")
    ids, mask = (
        torch.atleast_2d(torch.as_tensor(prompts[name], device=model.device))
        for name in ("input_ids", "attention_mask")
    )
    if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise ModelError(
            f"{what} have an attention_mask of shape {tuple(mask.shape)} for ids of shape "
            f"{tuple(ids.shape)}: expected 0 and 1 in the same shape."
        )
    return _cut(model.ids(ids.masked_fill(mask == 0, 0)), mask == 1, what)


def padding_token(model: Any) -> int | None:
    """The token that is nothing but padding: the tokenizer's, unless it stands for BOS, the end of
    text or <unk> as well. It may lie beyond the vocabulary. None where there is none."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
    pad, *others = (getattr(model.tokenizer, name, None) for name in names)
    return None if pad in others else pad


def _without_padding(model: Any, ids: Tensor, what: str) -> list[Tensor]:
    """The rows of a batch without the padding at either end."""
    if (pad := padding_token(model)) is not None:
        return _cut(ids, ids != pad, what)
    rest = ids != model.filler
    ends = {"end": rest.flip(1).int().argmax(1), "begin": rest.int().argmax(1)}
    for side, run in ends.items():
        if (run != run[0]).any():
            raise ModelError(
                f"{what} {side} in unequal numbers of the token {model.filler}, which batches of "
                f"{model.name} are padded with, and which may be text: give rows without padding, "
                "or what the tokenizer returned, with its attention_mask."
            )
    return list(ids)


def _cut(ids: Tensor, mask: Tensor, what: str) -> list[Tensor]:
    """The part of each row where the mask is true, which has to be one stretch."""
    if mask.all():
        return list(ids)
    first, count = mask.int().argmax(1), mask.sum(1)
    place = torch.arange(ids.shape[1], device=ids.device)
    stretch = (place >= first[:, None]) & (place < (first + count)[:, None])
    if (count == 0).any() or (stretch != mask).any():
        row = int(((count == 0) | (stretch != mask).any(1)).nonzero()[0])
        why = "nothing but padding" if count[row] == 0 else "padding between tokens"
        raise ModelError(f"{what} have {why} in row {row}: pad at one end, or not at all.")
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def listed_sites(sites: Any) -> list:
    """Sites as a list: a name or a (name, layer) stands for itself."""
    single = isinstance(sites, tuple) and len(sites) == 2 and hasattr(sites[1], "__index__")
    if not isinstance(sites, str) and not isinstance(sites, Iterable):
        raise ModelError(f"sites is {sites!r}: expected names of sites, or (name, layer).")
    return [sites] if single or isinstance(sites, str) else list(sites)


def kept_positions(model: Any, ids: Tensor, pos: Any) -> Any:
    """The positions of a batch (batch, pos) that a cache keeps: None, a slice, an index or a list.

    Raises:
        ModelError: none, one out of range, or the last of a batch where it is padding.
    """
    length = ids.shape[1]
    if pos is None:
        return pos
    if isinstance(pos, slice):
        if not range(*pos.indices(length)):
            raise ModelError(f"pos is {pos}, which holds none of the {length} positions.")
        return pos
    chosen = indices(pos, length, "position")
    _refuse_padding_at_the_end(model, ids, chosen)
    return chosen[0] if getattr(pos, "ndim", isinstance(pos, Sequence)) == 0 else chosen


def _refuse_padding_at_the_end(model: Any, ids: Tensor, chosen: list[int]) -> None:
    """The last position of a batch is no prompt's last token where there is padding."""
    last, pad = ids.shape[1] - 1, padding_token(model)
    if pad is not None and last in chosen:
        padded = (ids[:, -1] == pad).nonzero()[:, 0].tolist()
        if padded and len(padded) < len(ids):
            raise ModelError(
                f"pos reaches the last position, where row {padded[0]} has padding: give texts of "
                "equal length, or read each text's own last token with `activations_at`."
            )


def by_length(keys: Sequence) -> list[list[int]]:
    """The numbers of the prompts with the same key, such as a length: each list can be run as one
    batch without padding."""
    found: dict = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]], dim: int) -> Tensor:
    """The results of groups of prompts, put together along `dim` in the prompts' own order."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=parts[0].device)
    return torch.cat(list(parts), dim).index_select(dim, order.argsort())
