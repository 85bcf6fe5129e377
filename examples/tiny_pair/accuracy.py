"""Exact match on held-out items by native greedy decoding: block by block, the most confident token first."""

import torch
from batches import BLOCK_LENGTH, Encoder
from transformers import PreTrainedModel

from simsd import tasks


def accuracies(model: PreTrainedModel, encoder: Encoder, count: int, seed: int = 0) -> dict[str, float]:
    """The fraction of `count` held-out items of each family that the model answers right."""
    result = {}
    for family in tasks.FAMILIES:
        items = tasks.held_out(family, count, seed)
        responses = decode(model, encoder, [encoder.prompt(item) for item in items])
        texts = [encoder.tokenizer.decode(response) for response in responses]
        result[family] = sum(map(tasks.is_correct, items, texts)) / count
    return result


@torch.inference_mode()
def decode(
    model: PreTrainedModel, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int = 40
) -> list[list[int]]:
    """Decode all prompts together without a cache, one token per step and sequence; returns the new tokens before end.

    Every sequence works on its own block. Rows behind that block hold mask tokens which, the mask being block-causal,
    nobody earlier sees.
    """
    L = BLOCK_LENGTH
    B = len(prompts)
    N = -(-(max(map(len, prompts)) + max_new_tokens) // L) * L
    tokens = torch.full((B, N), encoder.mask_id)  # [B, N]
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt)] = torch.tensor(prompt)
    length = torch.tensor([len(prompt) for prompt in prompts])
    revealed = torch.arange(N) < length[:, None]  # [B, N]
    block = length // L  # [B]
    open_ = torch.ones(B, dtype=torch.bool)

    while open_.any():
        live = open_.nonzero()[:, 0]
        end = int(block[live].max() + 1) * L
        rows = block[live, None] * L + torch.arange(L)  # [b, L]
        at = torch.arange(end) // L
        hidden = model.model(
            tokens[live, :end],
            attention_mask=(at[:, None] >= at[None, :]).expand(len(live), 1, end, end),
            position_ids=torch.arange(end)[None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))).float()  # [b, L, V]
        best, choice = logits.max(-1)
        others = logits.scatter(-1, choice[..., None], float("-inf")).logsumexp(-1)
        shown = revealed[live].gather(1, rows)
        pick = (best - others).masked_fill(shown, float("-inf")).argmax(-1)  # [b]
        position = rows.gather(1, pick[:, None])[:, 0]
        tokens[live, position] = choice.gather(1, pick[:, None])[:, 0]
        revealed[live, position] = True

        full = revealed[live].gather(1, rows).all(-1)
        ended = ((tokens[live].gather(1, rows) == encoder.end_id) & (rows >= length[live, None])).any(-1)
        block[live[full]] += 1
        open_[live[full & ended]] = False
        open_ &= (block + 1) * L <= N

    responses = []
    for b in range(B):
        new = tokens[b, length[b] : block[b] * L].tolist()
        responses.append(new[: new.index(encoder.end_id)] if encoder.end_id in new else new)
    return responses
