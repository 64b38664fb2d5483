"""STEVE's two transformers: over a frame's slots (the predictor), and over a frame's tokens, which see its slots.

Both are pre-norm, but the first norm of the first block takes the place of the stream. Shapes: M frames, N slots,
d their size, K tokens, D the decoder's width, V the vocabulary. Modules have the names of the public files.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # of the decoder; the predictor has none
KeysValues = tuple[Tensor, Tensor]  # of all heads, `(M, heads, tokens, size / heads)`


class Attention(nn.Module):
    """Multi-head attention without biases, of queries on keys and values that were made before."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.proj_q, self.proj_k, self.proj_v, self.proj_o = (
            nn.Linear(size, size, bias=False) for _ in range(4)
        )
        self.dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> KeysValues:
        return self._split(self.proj_k(memory)), self._split(self.proj_v(memory))

    def forward(self, x: Tensor, keys_values: KeysValues, *, causal: bool = False) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        queries = self._split(self.proj_q(x))
        y = F.scaled_dot_product_attention(queries, *keys_values, dropout_p=dropout, is_causal=causal)
        return self.dropout(self.proj_o(y.transpose(1, 2).flatten(2)))


def feed_forward(size: int, dropout: float) -> nn.Sequential:
    """Linear(4 size) -> ReLU -> Linear(size) -> dropout."""
    return nn.Sequential(nn.Linear(size, 4 * size), nn.ReLU(), nn.Linear(4 * size, size), nn.Dropout(dropout))


class PredictorBlock(nn.Module):
    """Attention among the slots, then a feed-forward."""

    def __init__(self, size: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.attn_layer_norm = nn.LayerNorm(size)
        self.attn = Attention(size, heads, dropout=0)
        self.ffn_layer_norm = nn.LayerNorm(size)
        self.ffn = feed_forward(size, dropout=0)

    def forward(self, x_MND: Tensor) -> Tensor:
        normed = self.attn_layer_norm(x_MND)
        x_MND = normed if self.first else x_MND
        x_MND = x_MND + self.attn(normed, self.attn.keys_values(normed))
        return x_MND + self.ffn(self.ffn_layer_norm(x_MND))

    def last_layers(self) -> list[nn.Linear]:
        """What is added to the stream comes out of these."""
        return _last_layers(self, self.attn)


class Predictor(nn.Module):
    """From a frame's slots `(M, N, d)` to those that the next frame starts from."""

    blocks: Any  # of `PredictorBlock`

    def __init__(self, size: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PredictorBlock(size, heads, first=not i) for i in range(blocks)])
        self.layer_norm = nn.LayerNorm(size)

    def forward(self, x_MND: Tensor) -> Tensor:
        for block in self.blocks:
            x_MND = block(x_MND)
        return self.layer_norm(x_MND)


class TokenBlock(nn.Module):
    """Attention to the tokens before, attention to the slots, then a feed-forward."""

    def __init__(self, size: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.self_attn = Attention(size, heads, DROPOUT)
        self.encoder_decoder_attn_layer_norm = nn.LayerNorm(size)
        self.encoder_decoder_attn = Attention(size, heads, DROPOUT)
        self.ffn_layer_norm = nn.LayerNorm(size)
        self.ffn = feed_forward(size, DROPOUT)

    def forward(
        self, x_MKD: Tensor, memory: KeysValues, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """The tokens' stream, and the keys and values of all tokens so far.

        memory: the slots' (`encoder_decoder_attn.keys_values`). past: those of the tokens before; then x is one token.
        """
        normed = self.self_attn_layer_norm(x_MKD)
        x_MKD = normed if self.first else x_MKD
        seen = self.self_attn.keys_values(normed)
        if past is not None:
            seen = torch.cat([past[0], seen[0]], 2), torch.cat([past[1], seen[1]], 2)
        x_MKD = x_MKD + self.self_attn(normed, seen, causal=past is None)
        x_MKD = x_MKD + self.encoder_decoder_attn(self.encoder_decoder_attn_layer_norm(x_MKD), memory)
        return x_MKD + self.ffn(self.ffn_layer_norm(x_MKD)), seen

    def last_layers(self) -> list[nn.Linear]:
        """What is added to the stream comes out of these."""
        return _last_layers(self, self.self_attn, self.encoder_decoder_attn)


def _last_layers(block: PredictorBlock | TokenBlock, *attentions: Attention) -> list[nn.Linear]:
    linear = [layer for layer in block.ffn if isinstance(layer, nn.Linear)]
    return [*(attention.proj_o for attention in attentions), linear[-1]]


class TokenTransformer(nn.Module):
    """The blocks, and a last norm."""

    blocks: Any  # of `TokenBlock`

    def __init__(self, size: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TokenBlock(size, heads, first=not i) for i in range(blocks)])
        self.layer_norm = nn.LayerNorm(size)

    def memories(self, slots_MND: Tensor) -> list[KeysValues]:
        """The slots' keys and values for each block."""
        return [block.encoder_decoder_attn.keys_values(slots_MND) for block in self.blocks]

    def forward(
        self, x_MKD: Tensor, memories: list[KeysValues], past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """As `TokenBlock`, for all blocks."""
        so_far = []
        for block, memory, before in zip(self.blocks, memories, past or itertools.repeat(None), strict=False):
            x_MKD, seen = block(x_MKD, memory, before)
            so_far.append(seen)
        return self.layer_norm(x_MKD), so_far


class TokenEmbedding(nn.Module):
    """A vector for each token."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.dictionary = nn.Embedding(vocabulary, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dictionary(tokens)


class Positions(nn.Module):
    """A learned vector for each position, the begin token's first."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.pe = nn.Parameter(torch.randn(1, length, size) * size**-0.5)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_MKD: Tensor, start: int = 0) -> Tensor:
        """Tokens from position `start` on."""
        return self.dropout(x_MKD + self.pe[:, start : start + x_MKD.shape[1]])


class TokenDecoder(nn.Module):
    """Autoregressive: each token from those before it, row by row, and from the frame's slots `(M, N, D)`."""

    def __init__(self, vocabulary: int, tokens: int, size: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.bos = nn.Parameter(torch.randn(1, 1, size) * size**-0.5)
        self.dict = TokenEmbedding(vocabulary, size)
        self.pos = Positions(1 + tokens, size)
        self.tf = TokenTransformer(size, blocks, heads)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens_MK: Tensor, slots_MND: Tensor) -> Tensor:
        """Logits `(M, K, V)` of every token given those before it (teacher forcing)."""
        begin = self.bos.expand(len(tokens_MK), -1, -1)
        x_MKD = self.pos(torch.cat([begin, self.dict(tokens_MK[:, :-1])], 1))
        return self.head(self.tf(x_MKD, self.tf.memories(slots_MND))[0])

    @torch.no_grad()
    def generate(self, slots_MND: Tensor) -> Tensor:
        """The tokens `(M, K)` that slots stand for: the most likely one each, given those chosen before."""
        memories, past = self.tf.memories(slots_MND), None
        x_M1D, chosen = self.bos.expand(len(slots_MND), -1, -1), []
        for position in range(self.tokens):
            x_M1D, past = self.tf(self.pos(x_M1D, position), memories, past)
            chosen.append(self.head(x_M1D).argmax(-1))
            x_M1D = self.dict(chosen[-1])
        return torch.cat(chosen, 1)
