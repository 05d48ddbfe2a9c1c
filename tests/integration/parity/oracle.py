"""What Transformers says of the 32 prompts: greedy tokens in float32, and logits in float64 where tokens differ."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kvarto.cluster.model_hub import cache_folder
from kvarto.cluster.text.tokenizer import Tokenizer

NUM_TOKENS = 64
"""Generated after each prompt."""
TIE = 1e-3
"""The two best float64 logits may be settled either way where they are closer than this."""


@dataclass(frozen=True)
class Prompt:
    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Beam:
    token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Difference:
    """A generated token that is not the oracle's, given the same tokens before it."""

    prompt: str
    position: int
    ours: int
    theirs: int
    gap: float
    """Between the two best float64 logits."""
    is_tie: bool
    """Whether `gap` is below `TIE` and our token is one of the two."""

    def __str__(self) -> str:
        kind = "tie" if self.is_tie else "WRONG"
        return (f"{kind}: prompt '{self.prompt}', token {self.position}: {self.ours} instead of {self.theirs}, the two "
                f"best float64 logits are {self.gap:.2e} apart")


def read_prompts(model_path: str) -> list[Prompt]:
    """The prompts beside this file, as the model's tokens."""
    tokenizer = Tokenizer.load(model_path)
    found = []
    for entry in yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8")):
        if "chat" in entry:
            text = tokenizer.apply_chat_template([{"role": "user", "content": entry["chat"]}])
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            token_ids = tokenizer.encode(entry["text"])
        found.append(Prompt(entry["name"], tuple(token_ids)))
    return found


class Oracle:
    """Transformers' own Llama with the weights of a GGUF file, dequantized by Transformers.

    Its greedy tokens take minutes, so they are kept in the cache folder; a change of anything that they depend on is
    a change of the file's name.
    """

    def __init__(self, model_path: str, prompts: list[Prompt]) -> None:
        self._path = model_path
        self._prompts = prompts
        self._models: dict[torch.dtype, Any] = {}
        self._differences: dict[tuple[Prompt, tuple[int, ...]], list[Difference]] = {}

    @cached_property
    def greedy(self) -> dict[str, list[int]]:
        """Name of a prompt to the `NUM_TOKENS` tokens that greedy search in float32 continues it with."""
        path = cache_folder() / "parity" / f"{self._fingerprint()}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens = {prompt.name: self._generate(prompt) for prompt in self._prompts}
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(tokens, file)
            # At once, so that a run that is cut short leaves nothing that looks whole.
            os.replace(file.name, path)
        found: dict[str, list[int]] = json.loads(path.read_text())
        return found

    def differences(self, prompt: Prompt, ours: list[int]) -> list[Difference]:
        """Where `ours` is not what the oracle generates. After the first difference the texts go apart: from there on
        a token is compared with the best in float64 after *our* tokens (teacher forcing)."""
        key = prompt, tuple(ours)
        if key not in self._differences:
            self._differences[key] = self._compare(prompt, ours)
        return self._differences[key]

    @torch.inference_mode()
    def beams(self, prompt: Prompt, width: int, num_tokens: int, end_token: int | None, **options: Any) -> list[Beam]:
        """What beam search in float32 finds, best first. `end_token` ends a beam; `options` are `generate`'s own."""
        token_ids = torch.tensor([prompt.token_ids])
        output = self._model(torch.float32).generate(
            token_ids, attention_mask=torch.ones_like(token_ids), do_sample=False, num_beams=width,
            num_return_sequences=width, max_new_tokens=num_tokens, eos_token_id=end_token, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, **options)
        found = []
        for tokens, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
            new = tokens[len(prompt.token_ids):]
            if end_token in new:
                new = new[: new.index(end_token) + 1]
            found.append(Beam(tuple(new), score))
        return found

    @torch.inference_mode()
    def logits64(self, token_ids: list[int], num_rows: int) -> torch.Tensor:
        """Of the last `num_rows` positions, `[num_rows, vocab_size]` float64: row -1 predicts what comes next."""
        model = self._model(torch.float64)
        logits: torch.Tensor = model(torch.tensor([token_ids]), logits_to_keep=num_rows).logits[0]
        return logits

    def _compare(self, prompt: Prompt, ours: list[int]) -> list[Difference]:
        theirs = self.greedy[prompt.name]
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is None:
            return []
        # Row i predicts ours[i].
        values, token_ids = self.logits64([*prompt.token_ids, *ours[:-1]], len(ours)).topk(2)
        found = []
        for position in range(first, len(ours)):
            best_two = token_ids[position].tolist()
            expected = theirs[position] if position == first else best_two[0]
            if ours[position] != expected:
                gap = float(values[position, 0] - values[position, 1])
                found.append(Difference(prompt.name, position, ours[position], expected, gap,
                                        is_tie=gap < TIE and ours[position] in best_two))
        return found

    @torch.inference_mode()
    def _generate(self, prompt: Prompt) -> list[int]:
        model = self._model(torch.float32)
        token_ids = torch.tensor([prompt.token_ids])
        output = model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), do_sample=False, max_new_tokens=NUM_TOKENS)
        new: list[int] = output[0, len(prompt.token_ids):].tolist()
        assert len(new) == NUM_TOKENS
        return new

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            config = load_gguf_checkpoint(self._path)["config"]
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
            tensors = load_gguf_checkpoint(self._path, return_tensors=True, model_to_load=model)["tensors"]
            missing = model.load_state_dict(tensors, strict=False).missing_keys
            assert missing in ([], ["lm_head.weight"]) and bool(missing) == config["tie_word_embeddings"]
            model.tie_weights()
            # Not `min_new_tokens`: that would forbid the end-of-sequence token instead of going on after it.
            model.generation_config.eos_token_id = None
            self._models[dtype] = model.eval().to(dtype)
        return self._models[dtype]

    def _fingerprint(self) -> str:
        with open(self._path, "rb") as file:
            model_digest = hashlib.file_digest(file, "sha256").hexdigest()
        parts = [model_digest, NUM_TOKENS, transformers.__version__, torch.__version__,
                 [(prompt.name, prompt.token_ids) for prompt in self._prompts]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
