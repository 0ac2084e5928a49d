"""The engine without the method: skip random tokens of a plain language model in training.

    python -m examples.engine_alone

No multimodal model, no teacher: any rule may choose the positions a decoder computes.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regate_patch


def main(steps: int = 5, share: float = 0.5) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = regate_patch.patch(model.model, backend="eager")
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 256, (4, 128))
        active = torch.rand(ids.shape) < share  # the rule: here, chance
        labels = ids.clone()
        labels[:, 1:][~active[:, :-1]] = -100  # a position that is not computed predicts nothing
        with regate_patch.active(active):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"loss {losses[-1]:.3f}, {int(active.sum())} of {active.numel()} positions computed")
    dense, sparse = (handle.statistics.flops(n) for n in (128, round(128 * share)))
    blocks = f"{handle.statistics.attention} attention and {handle.statistics.mlp} MLP blocks"
    print(f"{blocks}, {dense / sparse:.2f}x fewer FLOPs")
    handle.remove()
    return losses


if __name__ == "__main__":
    main()
