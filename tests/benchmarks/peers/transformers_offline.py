"""Transformers' `generate` as a child of `offline.py`: static batches, padded on the left, in bfloat16.

Usage: transformers_offline.py MODEL OPTIONS, the options as JSON: `batch_size` (1: one by one) and `threads`.
"""

from __future__ import annotations

import json
import sys

import torch
from child import answer, private_stdout
from transformers import AutoModelForCausalLM

PAD = 2


def main() -> None:
    stdout = private_stdout()
    options = json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    size = options["batch_size"]
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], output_lens: list[int]) -> int:
        for begin in range(0, len(prompts), size):
            _generate_batch(model, prompts[begin: begin + size], max(output_lens[begin: begin + size]))
        # A static batch runs until its longest answer is there; what the others get beyond theirs is of no use.
        return sum(output_lens)

    answer(stdout, generate)


@torch.inference_mode()
def _generate_batch(model, prompts: list[list[int]], output_len: int) -> None:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt):] = torch.tensor(prompt)
        mask[row, longest - len(prompt):] = 1
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=output_len, min_new_tokens=output_len, do_sample=False,
        pad_token_id=PAD)
    if made.shape[1] != longest + output_len:
        raise RuntimeError(f"generated {made.shape[1] - longest} tokens, {output_len} are needed")


if __name__ == "__main__":
    main()
