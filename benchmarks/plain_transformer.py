"""A plain PyTorch transformer with minimal training loops, the peer in benchmarks/step_cost.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_advrm.config.schema import Config, ModelConfig

Cache = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """Pre-norm attention with rotary positions, and a SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, ffn = model.hidden_size, model.ffn_hidden_size
        self.heads, self.dropout = model.num_attention_heads, model.attention_dropout
        self.hidden_dropout = model.hidden_dropout
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, H]; ``past`` keys and values [B, heads, P, d] before these tokens."""
        b, s, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = _rotate(qkv[0], rotation), _rotate(qkv[1], rotation), qkv[2]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None)
        y = self.out(y.transpose(1, 2).reshape(b, s, width))
        x = x + F.dropout(y, self.hidden_dropout, self.training)
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        y = self.down(F.silu(gate) * up)
        return x + F.dropout(y, self.hidden_dropout, self.training), (k, v)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Transformer(nn.Module):
    """A transformer with ``outputs`` values for every token."""

    def __init__(self, cfg: Config, vocabulary: int, outputs: int) -> None:
        super().__init__()
        model = cfg.model
        self.embedding = nn.Embedding(vocabulary, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.num_layers))
        self.norm, self.head = nn.RMSNorm(model.hidden_size), nn.Linear(model.hidden_size, outputs, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=model.init_method_std)
        d = model.hidden_size // model.num_attention_heads
        angles = torch.arange(model.encoder_seq_length)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        angles = torch.cat([angles, angles], -1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Return the last hidden states [B, S, H] of tokens [B, S], and the keys and values of every layer."""
        rotation = (self.cos[: tokens.size(1)], self.sin[: tokens.size(1)])
        if positions is not None:
            rotation = (self.cos[positions][:, None], self.sin[positions][:, None])
        x = self.embedding(tokens)
        cache = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, rotation, mask, None if past is None else past[i])
            cache.append(kept)
        return self.norm(x), cache


class Loop:
    """Trains a model with AdamW and gradient clipping."""

    def __init__(self, model: Transformer, cfg: Config) -> None:
        self.model, self.cfg = model, cfg
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.model.optim.lr)

    def update(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.trainer.gradient_clip_val)
        self.optimizer.step()
        return loss.item()


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), lengths


def log_probs(model: Transformer, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] of all response tokens of (sequence, prompt length) rows, and their row numbers."""
    tokens, lengths = padded([row for row, _ in rows])
    starts = torch.tensor([start for _, start in rows])
    places = torch.arange(tokens.size(1) - 1)
    wanted = (places >= starts[:, None] - 1) & (places < lengths[:, None] - 1)
    hidden, _ = model(tokens)
    logits = model.head(hidden[:, :-1][wanted])
    targets = tokens[:, 1:][wanted]
    return -F.cross_entropy(logits, targets, reduction="none"), wanted.nonzero()[:, 0]


def scores(model: Transformer, rows: list[list[int]]) -> Tensor:
    tokens, lengths = padded(rows)
    hidden, _ = model(tokens)
    return model.head(hidden[torch.arange(len(rows)), lengths - 1]).squeeze(-1)  # type: ignore[no-any-return]


class SftLoop(Loop):
    def step(self, rows: list[tuple[list[int], int]]) -> float:
        return self.update(-log_probs(self.model, rows)[0].mean())


class RewardLoop(Loop):
    def step(self, pairs: list[tuple[list[int], list[int]]]) -> float:
        chosen, rejected = scores(self.model, [a for a, _ in pairs] + [b for _, b in pairs]).chunk(2)
        return self.update(-F.logsigmoid(chosen - rejected).mean())


class RlLoop(Loop):
    """Trains a policy by REINFORCE with the leave-one-out baseline on the mean of reward models."""

    def __init__(self, model: Transformer, members: list[Transformer], cfg: Config, eos_id: int) -> None:
        super().__init__(model, cfg)
        self.members, self.eos_id = members, eos_id

    def step(self, prompts: list[list[int]]) -> float:
        group = self.cfg.rl.group_size
        prompts = [prompt for prompt in prompts for _ in range(group)]
        with torch.no_grad():
            rows = self.generate(prompts)
            rewards = torch.stack([scores(member, [row for row, _ in rows]) for member in self.members]).mean(0)
        table = rewards.view(-1, group)
        advantages = ((table - table.mean(1, keepdim=True)) * group / (group - 1)).flatten()
        values, row_of = log_probs(self.model, rows)
        return self.update(-(values * advantages[row_of]).mean())

    def generate(self, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
        """Return (prompt and response, prompt length) for every prompt."""
        tokens, lengths = padded(prompts)
        width = tokens.size(1)
        self.model.eval()
        hidden, cache = self.model(tokens)
        last = hidden[torch.arange(len(prompts)), lengths - 1]
        written: list[Tensor] = []
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(self.cfg.rl.max_new_tokens):
            picked = torch.multinomial(self.model.head(last).softmax(-1), 1).squeeze(1)
            written.append(torch.where(ended, -1, picked))
            ended |= picked == self.eos_id
            if ended.all():
                break
            places = torch.arange(width + step + 1)
            visible = (places < lengths[:, None]) | (places >= width)
            hidden, cache = self.model(picked[:, None], (lengths + step)[:, None], visible[:, None, None], cache)
            last = hidden[:, 0]
        self.model.train()
        responses = torch.stack(written, 1).tolist()
        return [(p + [t for t in r if t >= 0], len(p)) for p, r in zip(prompts, responses, strict=True)]
