"""What the learner of lesson 03 writes, written: the answers to its exercises."""

import torch


def scale(last, answer, wrong, at_clean, at_corrupted):
    """The prompts' mean logit difference, moved so that at_corrupted is 0 and at_clean is 1.

    last  logits at the last token, (batch, d_vocab); answer, wrong  token ids, (batch,)
    at_clean, at_corrupted  the mean logit differences of the two unpatched runs
    """
    rows = torch.arange(len(last))
    difference = (last[rows, answer] - last[rows, wrong]).mean()
    return (difference - at_corrupted) / (at_clean - at_corrupted)


def patch_vector(model, base, other, layer, position):
    """Logits at the last token, (batch, d_vocab), of base with one vector of each prompt replaced.

    base, other  token ids (batch, pos). The vector at `position` of the stream that enters `layer`,
    ("resid_pre", layer), (batch, pos, d_model), comes from the run on other. run_with_cache keeps
    it, and in `with model.hooks({site: hook}):` a run goes on with hook(stream).
    """
    key = ("resid_pre", layer)
    _, kept = model.run_with_cache(other, key)

    def put_in(stream):
        stream[:, position] = kept[key][:, position]
        return stream

    with model.hooks({key: put_in}):
        return model(base)[:, -1]


def sweep(model, clean, corrupted, answer, wrong):
    """The scale's value for each patch of a clean vector into the corrupted run, (layers, pos).

    clean, corrupted  token ids (batch, pos); answer, wrong  token ids (batch,)
    """
    ends = [scale(model(ids)[:, -1], answer, wrong, 1, 0) for ids in (clean, corrupted)]
    effect = torch.zeros(model.n_layers, clean.shape[1])
    for layer in range(model.n_layers):
        for position in range(clean.shape[1]):
            last = patch_vector(model, corrupted, clean, layer, position)
            effect[layer, position] = scale(last, answer, wrong, *ends)
    return effect


def patch_heads(model, base, other, heads):
    """Logits at the last token, (batch, d_vocab), of base with some heads taken from other.

    heads  [(layer, head), …]; two may be of one layer
    Only at the last token: z, ("z", layer), is (batch, pos, n_heads, d_head).
    """
    _, kept = model.run_with_cache(other, "z")
    hooks = {}
    for layer in {layer for layer, _ in heads}:
        chosen = [head for each, head in heads if each == layer]

        def put_in(z, layer=layer, chosen=chosen):
            z[:, -1, chosen] = kept["z", layer][:, -1, chosen]
            return z

        hooks["z", layer] = put_in
    with model.hooks(hooks):
        return model(base)[:, -1]


def both_ways(run, clean, corrupted):
    """How far each wire of a small network is enough, and how far it is needed: two (n,) tensors.

    run(wires)        one number, for wires (n,); clean and corrupted are the wires of the two runs
    enough[i]         where run(corrupted with wire i clean) lies: 0 is run(corrupted), 1 run(clean)
    needed[i]         how much of 1 is lost by run(clean with wire i corrupted)
    """
    low, gap = run(corrupted), run(clean) - run(corrupted)
    enough, needed = torch.zeros(len(clean)), torch.zeros(len(clean))
    for i in range(len(clean)):
        one, rest = corrupted.clone(), clean.clone()
        one[i], rest[i] = clean[i], corrupted[i]
        enough[i], needed[i] = (run(one) - low) / gap, 1 - (run(rest) - low) / gap
    return enough, needed


def restored(model, ids, noise, layer, position):
    """Logits at the last token, (batch, d_vocab), with noise on the embedding, one vector clean.

    ids    token ids (batch, pos)
    noise  (batch, pos, d_model), added at the site "embed"; 0 outside the subject
    The vector at `position` of ("resid_pre", layer) is that of the run without noise.
    """
    key = ("resid_pre", layer)
    _, clean = model.run_with_cache(ids, key)

    def put_in(stream):
        stream[:, position] = clean[key][:, position]
        return stream

    with model.hooks({"embed": lambda x: x + noise, key: put_in}):
        return model(ids)[:, -1]


def patch_each(model, base, other, layer, at, taken):
    """As patch_vector, for prompts of any lengths: each one's last logits, (prompts, d_vocab).

    base, other  lists of texts. at, taken  a position for each prompt: where the vector is put in
    its base text, and where it is taken from in its other text; -1 is that text's last token.
    """
    key, found = ("resid_pre", layer), []
    for text, source, to, of in zip(base, other, at, taken, strict=True):
        _, kept = model.run_with_cache(source, key)

        def put_in(stream, to=to, vector=kept[key][0, of]):
            stream[0, to] = vector
            return stream

        with model.hooks({key: put_in}):
            found.append(model(text)[0, -1])
    return torch.stack(found)


def attribution(model, base, other, layer, answer, wrong):
    """The estimated change of the mean logit difference by a patch at each position, (pos,).

    base, other  token ids (batch, pos); the patches are of ("resid_pre", layer), from other.
    answer, wrong  token ids (batch,). One backward pass, by torch.autograd.grad.
    """
    key, held = ("resid_pre", layer), {}
    _, there = model.run_with_cache(other, key)

    def keep(stream):
        held["here"] = stream.requires_grad_()
        return stream

    with model.hooks({key: keep}):
        difference = scale(model(base)[:, -1], answer, wrong, 1, 0)
    (gradient,) = torch.autograd.grad(difference, held["here"])
    return ((there[key] - held["here"]) * gradient).sum((0, 2)).detach()


def bias_slope(model, sentences, p_she):
    """The slope of the model's log-odds of "she" against "he" over the world's, one number.

    sentences  texts of any lengths, each up to its pronoun; model.to_single_token(" she") is an id
    p_she      the world's probability of "she" for each sentence's occupation, a list
    """
    she, he = (model.to_single_token(word) for word in (" she", " he"))
    last = torch.stack([model(each)[0, -1] for each in sentences])
    said = last[:, she] - last[:, he]  # log p(she) - log p(he): the softmax cancels
    world = torch.logit(torch.tensor(p_she))
    world = world - world.mean()
    return float((said * world).sum() / (world * world).sum())
