"""What a model is made of: every step from token ids to logits, read off its own modules."""

from dataclasses import dataclass

from mi_helpers.models import LanguageModel


@dataclass(frozen=True)
class Row:
    """One step of the data flow.

    Attributes:
        name, module: such as "blocks.0.q", and the class of its module.
        does: what it does, in words.
        weights: {name: shape} of its parameters.
        activation: its output's shape, with "batch" and "pos" as words.
        parameters: how many it has.
    """

    name: str
    module: str
    does: str
    weights: dict[str, tuple[int, ...]]
    activation: tuple[str | int, ...]
    parameters: int


def architecture(model: LanguageModel) -> list[Row]:
    """Every step from token ids to logits, read off the loaded modules; true on meta as well.

    The parameter counts sum to `model.n_parameters`, as a tied unembedding counts as none.
    """
    m, rows, stream = model, [], ("batch", "pos", model.d_model)

    def add(name, module, does, activation, counted=True):
        own = dict(module.named_parameters()) if counted and module is not None else {}
        shapes = {n: tuple(p.shape) for n, p in own.items()}
        kind = type(module).__name__ if module is not None else "function"
        rows.append(Row(name, kind, does, shapes, activation, sum(p.numel() for p in own.values())))

    scale = getattr(m.part("embed"), "scalar_embed_scale", None)
    does = f"look up each token's row, times {scale:g}" if scale else "look up each token's row"
    add("embed", m.part("embed"), does, stream)
    if m.layout.pos_embed:
        add("pos_embed", m.part("pos_embed"), "add each position's row", stream)
    steps = _block_steps(m)
    for layer in range(m.n_layers):
        local = _window(m, layer)
        for name, part, does, activation in steps:
            if getattr(m.layout, part) is not None:
                does += f" (last {local} tokens)" if part == "attn" and local else ""
                module, counted = m.part(part, layer), part not in ("attn", "rotary")
                add(f"blocks.{layer}.{name}", module, does, activation, counted)
    add("ln_final", m.ln_final, "normalise the stream", stream)
    tied = m.lm_head.weight is m.part("embed").weight
    logits = ("batch", "pos", m.d_vocab)
    does = "a logit per token" + (", with the embedding's rows (tied)" if tied else "")
    add("unembed", m.lm_head, does, logits, counted=not tied)
    if m.softcap:
        add("softcap", None, f"{m.softcap:g} tanh(logit / {m.softcap:g})", logits)
    return rows


def _block_steps(model: LanguageModel) -> list[tuple[str, str, str, tuple]]:
    """The steps of a block, in order: (name, part of `Family`, what it does, activation)."""
    m, config = model, model.config
    stream, heads = ("batch", "pos", m.d_model), ("batch", "pos", m.n_heads, m.d_head)
    keys, neurons = ("batch", "pos", m.n_kv_heads, m.d_head), ("batch", "pos", m.d_mlp)
    names = ("hidden_activation", "hidden_act", "activation_function")
    act = next(getattr(config, n) for n in names if getattr(config, n, None))
    gated = m.layout.w_gate is not None
    cap = getattr(config, "attn_logit_softcapping", None)
    mix = f"soft-cap at {cap:g}, mask, softmax" if cap else "mask, softmax"
    qkv = [
        ("q", "q", "queries", heads),
        ("k", "k", "keys", keys),
        ("v", "v", "values", keys),
        ("q_norm", "q_norm", "normalise each query", heads),
        ("k_norm", "k_norm", "normalise each key", keys),
    ]
    if m.layout.fused:
        whole = (*heads[:3], 3 * m.d_head)
        qkv = [("qkv", "q", "queries, keys and values in one matrix", whole)]
    return [
        ("ln1", "ln1", "normalise the stream for attention", stream),
        *qkv,
        ("rotary", "rotary", "turn queries and keys by their position", heads),
        ("attn", "attn", f"{mix}; each head mixes values: z", heads),
        ("o", "o", "heads back to the stream's width, summed", stream),
        ("ln1_post", "ln1_post", "normalise what attention adds", stream),
        ("ln2", "ln2", "normalise the stream for the MLP", stream),
        ("gate", "w_gate", f"gate of each neuron, through {act}", neurons),
        ("in", "w_in", "times the gate" if gated else f"each neuron, through {act}", neurons),
        ("out", "w_out", "neurons back to the stream's width", stream),
        ("ln2_post", "ln2_post", "normalise what the MLP adds", stream),
    ]


def _window(model: LanguageModel, layer: int) -> int | None:
    """The sliding window of a layer, the token itself included; None for full attention."""
    kinds = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    return window if kinds is None or kinds[layer] == "sliding_attention" else None
