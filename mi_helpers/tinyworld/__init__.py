"""TinyWorld: a text generator that labels every token and knows its own entropy.

source     draws that count their surprise; pages, documents, spans
lexicon    words and facts, read from data/
prose      topical prose: hidden variables through shared frames; the perfect reader
facts      facts about places, and questions that take two of them
statements what is said of places, true or false, and verdicts on it
names      who receives, among people named before
grammar    pronouns and agreement
counting   years, calendar, sums, brackets
copying    random and made-up words, again and again
held       what training never touches
dialects   Norwegian and Python code
world      the mixture; streams of documents and of token batches
tokenizer  the trained tokenizer, and labels by token
"""

from mi_helpers.tinyworld.source import Document, Draw, Span
from mi_helpers.tinyworld.world import World

__all__ = ["Document", "Draw", "Span", "World"]
