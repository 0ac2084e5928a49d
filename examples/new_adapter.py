"""An adapter for an architecture that is not from transformers.

    python -m examples.new_adapter

The model is a toy, but nothing in ReGATE knows it: its own blocks, an image in front of the text, labels that count
the image's positions. An adapter says where things are; it never touches the computation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import regate

VOCABULARY, WIDTH, IMAGE = 64, 32, 4  # an image is four decoder positions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class ToyMLLM(nn.Module):
    """Pixels [B, 3, 8, 8] and tokens [B, T] to logits [B, 4 + T, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.embed, self.to_logits = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.decoder = nn.Sequential(*(Block() for _ in range(3)), nn.LayerNorm(WIDTH))

    def forward(self, pixels: Tensor, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        image = rearrange(self.vision(pixels), "b d y x -> b (y x) d")
        logits = self.to_logits(self.decoder(torch.cat([image, self.embed(tokens)], 1)))
        loss = F.cross_entropy(rearrange(logits[:, :-1], "b s v -> (b s) v"), rearrange(labels[:, 1:], "b s -> (b s)"))
        return {"loss": loss, "logits": logits}


def layout(model: nn.Module, batch: Mapping[str, Any]) -> regate.Layout:
    """The batch as the decoder sees it: one entry for each of its positions, the image's first."""
    input_ids = F.pad(batch["tokens"], (IMAGE, 0))
    visual = (torch.arange(input_ids.shape[1], device=input_ids.device) < IMAGE).expand_as(input_ids)
    return regate.Layout(input_ids, batch["labels"], valid=torch.ones_like(visual), visual=visual)


ADAPTER = regate.ModelAdapter(
    serves=("ToyMLLM",),
    decoder=lambda model: model.decoder,
    embeddings=lambda model: model.embed,
    head=lambda model: model.to_logits,
    layout=layout,
    run_decoder=lambda decoder, embeddings, ids, mask, positions: decoder(embeddings(ids)),
    visual_inputs=("pixels",),
)


def main(argv: list[str] | None = None) -> regate.Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    regate.register_adapter(ADAPTER)  # a package would name it under the entry-point group `regate.adapters`
    model = ToyMLLM()
    gate = regate.apply(model, regate.Config(warmup=1, cycle=4, full_steps=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(args.steps):
        batch = made_up(rows=4)
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kind = "full" if gate.last.full else "sparse"
        print(f"{kind:6} loss {loss.item():.3f}, {int(gate.last.active.sum())} of {gate.last.active.numel()} positions")
    print(gate.report())
    return gate.report()


def made_up(rows: int, *, prompt: int = 6, answer: int = 18) -> dict[str, Tensor]:
    """Noise for an image and counting for a text; the answer alone is trained on."""
    start = torch.randint(VOCABULARY, (rows, 1))
    tokens = (start + torch.arange(prompt + answer)) % VOCABULARY
    labels = F.pad(tokens[:, prompt:], (IMAGE + prompt, 0), value=-100)
    return {"pixels": torch.randn(rows, 3, 8, 8), "tokens": tokens, "labels": labels}


if __name__ == "__main__":
    main()
