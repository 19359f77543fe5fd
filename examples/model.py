# SPDX-License-Identifier: Apache-2.0
"""A tiny hybrid decoder language model: gated delta rule and attention, each followed by a mixture of experts.

The family is Qwen3-Next's: three blocks of linear attention to one of full attention, and fused projections throughout.
What the optimizer has to know about a fused weight stands where the weight is made, as its module's `muon_layout`.

Shapes: B sequences of T tokens, N = B * T; d features; E experts of f hidden units. The recurrent blocks tell the order
of tokens, so attention needs no position encoding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impl import Layout, Section


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor) -> Tensor:
    """The outputs o_t = S_t q_t of a linear memory that forgets, and that corrects what it holds under a key:

        S_t = alpha_t S_{t-1} + u_t k_t^T,    u_t = beta_t (v_t - alpha_t S_{t-1} k_t),    S_0 = 0

    q, k, v: (..., T, d_head); beta, log_alpha: (..., T); returns (..., T, d_head). All steps at once: unrolled,
    S_t = sum over j <= t of decay[t, j] u_j k_j^T, which makes the definition of u a unit lower triangular system.
    Its cost grows with T^2, a bargain at this example's T.   [Yang et al. 2024, arXiv:2412.06464]
    """
    past = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    total = log_alpha.cumsum(-1)
    # Masked before the exponential: above the diagonal the exponent is positive and might overflow.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
    beta = beta[..., None]
    system = (decay * ((beta * k) @ k.mT)).tril(-1)
    u = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
    return (decay * (q @ k.mT)) @ u


class LinearAttention(nn.Module):
    """Gated DeltaNet, (B, T, d) -> (B, T, d). `in_proj` rows: q | k | v | z, d of each; beta | alpha, one per head."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rows = (d, d, d, d, heads, heads)
        self.in_proj = nn.Linear(d, sum(self.rows), bias=False)
        gate = Section(heads, algorithm="adamw")  # a few vectors, each a gate of its own, rather than a matrix
        sections = (Section(d), Section(d), Section(d), Section(d), gate, gate)
        self.in_proj.muon_layout = Layout(sections=sections)
        self.forget = nn.Parameter(torch.linspace(1.0, 5.0, heads))  # logits: memories of about 4 to 150 tokens
        self.norm = nn.RMSNorm(d // heads)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, z, beta, alpha = self.in_proj(x).split(self.rows, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        beta, log_alpha = beta.sigmoid().mT, F.logsigmoid(alpha + self.forget).mT
        o = gated_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, log_alpha)
        return self.out_proj(self.norm(o.transpose(1, 2)).flatten(2) * F.silu(z))


class Attention(nn.Module):
    """Causal grouped-query attention, (B, T, d) -> (B, T, d). `qkv` rows: q | k | v, of unequal numbers of heads."""

    def __init__(self, d: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.d_head = d // heads
        self.rows = (d, kv_heads * self.d_head, kv_heads * self.d_head)
        self.qkv = nn.Linear(d, sum(self.rows), bias=False)
        self.qkv.muon_layout = Layout(sections=tuple(Section(rows) for rows in self.rows))
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sections = self.qkv(x).split(self.rows, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for t in sections)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out_proj(o.transpose(1, 2).flatten(2))


class MixtureOfExperts(nn.Module):
    """SwiGLU experts, two for each token: (N, d) -> (N, d), and a load-balancing loss that is 1 when balanced.

    Fused by rows, experts on top of each other: `w13` (E * 2 * f, d), each expert's gate, then its up projection;
    `w2` (E * d, f). The loss is Switch Transformer's.   [Fedus et al. 2021, arXiv:2101.03961]
    """

    def __init__(self, d: int, experts: int, hidden: int, active: int = 2) -> None:
        super().__init__()
        self.experts, self.active = experts, active
        self.total: Callable[[Tensor], Tensor] = lambda load: load  # over all processes that share a batch
        self.router = nn.Linear(d, experts, bias=False)
        self.w13 = nn.Parameter(torch.randn(experts * 2 * hidden, d) * d**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts * d, hidden) * hidden**-0.5)
        self.muon_layout = {"w13": Layout(blocks=2 * experts), "w2": Layout(blocks=experts)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        weight, expert = scores.topk(self.active)
        weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort(stable=True)  # the N * active assignments, expert by expert
        token = order // self.active
        load = expert.flatten().bincount(minlength=self.experts)

        batches = x.index_select(0, token).split(load.tolist())
        w13, w2 = (w.unflatten(0, (self.experts, -1)).unbind() for w in (self.w13, self.w2))
        y = torch.cat([swiglu(*each) for each in zip(batches, w13, w2, strict=True)])
        y = torch.zeros_like(x).index_add(0, token, y * weight.flatten()[order, None])
        load = self.total(load)
        return y, self.experts * (load / load.sum() * scores.mean(0)).sum()


def swiglu(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert: x (n, d), w13 (2 * f, d), w2 (d, f) -> (n, d)."""
    gate, up = F.linear(x, w13).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)


class Block(nn.Module):
    """A mixer, then experts, each reading a normalised residual stream: (B, T, d) -> (B, T, d), balancing loss."""

    def __init__(self, d: int, mixer: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(d), mixer
        self.experts_norm, self.experts = nn.RMSNorm(d), experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mixer(self.mixer_norm(x))
        y, balance = self.experts(self.experts_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance


class HybridLM(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocabulary), and the blocks' mean load-balancing loss."""

    def __init__(self, vocabulary: int, d: int = 64, experts: int = 8, hidden: int = 48) -> None:
        super().__init__()
        mixers = [LinearAttention(d, heads=2) for _ in range(3)] + [Attention(d, heads=4, kv_heads=2)]
        self.embedding = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d, mixer, MixtureOfExperts(d, experts, hidden)) for mixer in mixers)
        self.norm = nn.RMSNorm(d)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, balances = self.embedding(tokens), []
        for block in self.blocks:
            x, balance = block(x)
            balances.append(balance)
        return self.lm_head(self.norm(x)), torch.stack(balances).mean()
