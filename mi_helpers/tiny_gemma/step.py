"""A training step of a Gemma 2, in fewer and larger parts than Hugging Face's.

It computes what `Gemma2ForCausalLM` and the cross entropy do, to float32's rounding
(tests/tiny_gemma), in a half to a third of the time.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2ForCausalLM

CHUNK = 512  # rows of logits that exist at a time


def tanh(x: Tensor) -> Tensor:
    """tanh through exp, which the compiler has at a quarter of the price; 2e-7 off at most."""
    return 2 * torch.sigmoid(2 * x) - 1


class Bf16Product(torch.autograd.Function):
    """x Wᵀ with factors in bfloat16, forward and backward; sums, and what goes on, in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).float()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return (gradient @ weight).float(), (gradient.t() @ x).float()


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy of x Wᵀ, soft-capped, and its gradients, a few hundred rows at a time.

    With u = x · W / cap and logits l = cap tanh u, the loss of a row with target y is
    log Σ exp l - l_y, and its derivative by x · W is (softmax l - [y]) (1 - tanh² u). So the
    gradients are there as soon as the logits are, and no matrix of all logits ever exists. Since
    |l| ≤ cap, exp cannot overflow; the targets' own terms are a product of rows, apart.
    """

    @staticmethod
    def forward(ctx, x, weight, target, cap, bf16):
        n, kind = len(x), torch.bfloat16 if bf16 else x.dtype
        w = weight.to(kind)
        at_target = weight[target]
        t = tanh((x * at_target).sum(-1, keepdim=True) / cap)
        loss = -cap * t.sum()
        own = (1 - t * t) / n
        x_gradients, w_gradient = [], torch.zeros_like(weight).index_add(0, target, -own * x)
        for part in x.to(kind).chunk(-(-n // CHUNK)):
            t = tanh((part @ w.t()).float() / cap)
            p = torch.exp(cap * t)
            total = p.sum(-1, keepdim=True)
            loss = loss + total.log().sum()
            slope = (p * (1 - t * t) * (1 / (n * total))).to(kind)
            x_gradients.append((slope @ w).float())
            w_gradient = w_gradient + (slope.t() @ part).float()
        ctx.save_for_backward(torch.cat(x_gradients) - own * at_target, w_gradient)
        return loss / n

    @staticmethod
    def backward(ctx, gradient):
        x_gradient, w_gradient = ctx.saved_tensors
        return gradient * x_gradient, gradient * w_gradient, None, None, None


def make_loss(model: Gemma2ForCausalLM, length: int, bf16: bool = False):
    """loss(ids (rows, length)) of a Gemma 2 with soft caps and without biases: the mean over
    tokens 1 … length - 1. `model` keeps its weights, and gets the gradients.

    One product for q, k and v, one for gate and up; tables and masks made once; the query heads
    that share a key-value head are one matrix. For the softmax see `NextTokenLoss`.
    """
    c, core = model.config, model.model
    device = model.device
    heads, groups, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    shared, half = heads // groups, width // 2
    cap, scale = c.attn_logit_softcapping, c.query_pre_attn_scalar**-0.5
    product = Bf16Product.apply if bf16 else F.linear
    position = torch.arange(length, device=device)
    with torch.no_grad():
        cos, sin = core.rotary_emb(torch.zeros(1, device=device), position[None])
    cos, sin = cos[0, :, None], sin[0, :, None]  # (length, 1, width)
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    distance = position[:, None] - position
    windows = [layer.self_attn.sliding_window or length for layer in core.layers]
    masks = [((distance >= 0) & (distance < w)).float().repeat(shared, 1) for w in windows]

    def norm(x, of):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + of.eps) * (1 + of.weight)

    def rotate(x):
        return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin

    def attention(x, of, mask):  # x (rows · length, d_model)
        weight = torch.cat([of.q_proj.weight, of.k_proj.weight, of.v_proj.weight])
        qkv = product(x, weight).view(-1, length, heads + 2 * groups, width)
        q, k, v = qkv.split([heads, groups, groups], 2)
        q = rotate(q).view(-1, length, groups, shared, width).permute(0, 2, 3, 1, 4)
        q = q.reshape(-1, shared * length, width)  # (rows · groups, …)
        k = rotate(k).transpose(1, 2).reshape(-1, length, width)
        v = v.transpose(1, 2).reshape(-1, length, width)
        scores = cap * tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / cap))
        pattern = torch.exp(scores) * mask
        pattern = pattern / pattern.sum(-1, keepdim=True)
        z = torch.bmm(pattern, v).view(-1, groups, shared, length, width)
        return product(z.permute(0, 3, 1, 2, 4).reshape(-1, heads * width), of.o_proj.weight)

    def mlp(x, of):
        gate, up = product(x, torch.cat([of.gate_proj.weight, of.up_proj.weight])).chunk(2, -1)
        u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3))
        return product(gate * torch.sigmoid(2 * u) * up, of.down_proj.weight)  # GELU, tanh's

    def loss(ids):
        embedding = core.embed_tokens
        x = F.embedding(ids.flatten(), embedding.weight, embedding.padding_idx)
        x = x * embedding.scalar_embed_scale
        for layer, mask in zip(core.layers, masks, strict=True):
            y = attention(norm(x, layer.input_layernorm), layer.self_attn, mask)
            x = x + norm(y, layer.post_attention_layernorm)
            y = mlp(norm(x, layer.pre_feedforward_layernorm), layer.mlp)
            x = x + norm(y, layer.post_feedforward_layernorm)
        x = norm(x, core.norm).view(-1, length, c.hidden_size)[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        return NextTokenLoss.apply(x, model.lm_head.weight, target, c.final_logit_softcapping, bf16)

    return loss
