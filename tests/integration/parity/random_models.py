"""Small random models that Transformers makes, with a tokenizer of as many letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 131
MAX_MODEL_LEN = 256
SIZES = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": MAX_MODEL_LEN}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "alternating": ("Gemma2", SIZES | {"sliding_window": 24, "attn_logit_softcapping": 5.0,
                                       "query_pre_attn_scalar": 16, "tie_word_embeddings": False}),
    "windowed": ("Mistral", SIZES | {"sliding_window": 40}),
    "full": ("Llama", SIZES),
    "short": ("Llama", SIZES | {"max_position_embeddings": 64}),
}
PROMPTS = [[(13 * place + 7 * number) % VOCAB for place in range(length)]
           for number, length in enumerate((1, 23, 24, 61, 130, 200))]


def make_model(directory: Path, name: str, attention: str = "eager") -> Any:
    """The model, which is also saved in `directory`; `attention`: by which implementation it computes here."""
    class_name, settings = MODELS[name]
    config = getattr(transformers, f"{class_name}Config")(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=None, **settings)
    config._attn_implementation = attention
    model = getattr(transformers, f"{class_name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model
