"""What is never written in training: held-out phrasings, pairs, relations."""

import zlib

NO_HOLD = frozenset()
HELD = frozenset({"templates", "entities", "relations"})


def is_held(*entities: str, share: int = 10) -> bool:
    """Whether a combination belongs to the held-out tenth (or 1/share) of the world: by a hash."""
    return zlib.crc32("|".join(entities).encode()) % share == 0


def phrasings(templates: tuple, held: frozenset, keep: int = 2) -> tuple:
    """The last `keep` templates of a list are held out of training."""
    return templates[-keep:] if "templates" in held else templates[:-keep]
