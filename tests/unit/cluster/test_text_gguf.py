"""Tokenizers rebuilt from GGUF metadata, against transformers reading the same files."""

import json
import logging
import os
import struct

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer

from kvarto.cluster.text import tokenizer_cache
from kvarto.cluster.text.gguf_metadata import read_metadata
from kvarto.cluster.text.tokenizer import Tokenizer
from kvarto.protos.errors import ModelLoadError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "Hello world, hello there! It's 2024, isn't it? We'll see 1234567 and 3.14159.", "  two  spaces\n\n\tand tabs  ",
    "naïve café 中文字符 日本語 한국어 Ελληνικά", "👋🏽 emoji 👩‍👩‍👧 family", "def f(x):\n    return x + 1  # don't\n",
] * 3
TEXTS = [
    "", " ", "   ", "\n\n", "Hello world", " hello", "  hello  ", "It's 12345 they'LL", "a  1  22  333", "x\t\ty\r\n z",
    "中文字符 and 日本語", "👋🏽👩‍👩‍👧", "def f(x):\n        return x\n", "<s>Hello</s>", "a<think>b</think> c",
    "e\u0301 é", "\u00a0\u200b\u3000", "𝄞 unseen 𓀀", "<0x41>", "▁ ▁▁", "x" * 300,
]


def train_byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return tokens, [" ".join(pair) for pair in merges]


def train_sentencepiece():
    backend = Backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab()
    return sorted(vocab, key=lambda token: (len(token) == 1, vocab[token]))


BYTE_TOKENS, MERGES = train_byte_level()
PIECES = train_sentencepiece()


def writer(path, architecture="llama"):
    out = GGUFWriter(str(path), architecture)
    out.add_context_length(64)
    out.add_embedding_length(8)
    out.add_block_count(1)
    out.add_feed_forward_length(8)
    out.add_head_count(1)
    out.add_layer_norm_rms_eps(1e-5)
    return out


def close(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_byte_level(path, pre, **options):
    out = writer(path)
    out.add_tokenizer_model(options.get("model", "gpt2"))
    if pre is not None:
        out.add_tokenizer_pre(pre)
    tokens = [*BYTE_TOKENS, "<think>", "</think>"]
    out.add_token_list(tokens)
    out.add_token_types(options.get("types", [CONTROL] * 2 + [NORMAL] * (len(tokens) - 4) + [USER_DEFINED] * 2))
    out.add_token_merges(options.get("merges", MERGES))
    out.add_bos_token_id(0)
    out.add_eos_token_id(options.get("eos", 1))
    out.add_add_bos_token(options.get("add_bos", False))
    out.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    close(out)
    return str(path)


def write_sentencepiece(path, architecture="llama", add_space_prefix=None):
    out = writer(path, architecture)
    out.add_tokenizer_model("llama")
    control = ["<pad>", "<eos>", "<bos>", "<unk>"] if architecture.startswith("gemma") else ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<think>"]
    kinds = [UNKNOWN if token == "<unk>" else CONTROL for token in control]
    out.add_token_list(tokens)
    out.add_token_types([*kinds, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED])
    out.add_token_scores([*[0.0] * (len(control) + 256), *(-float(rank) for rank in range(len(PIECES))), -1000.0])
    out.add_unk_token_id(control.index("<unk>"))
    out.add_bos_token_id(tokens.index("<bos>" if "<bos>" in control else "<s>"))
    out.add_eos_token_id(tokens.index("<eos>" if "<eos>" in control else "</s>"))
    if add_space_prefix is not None:
        out.add_add_space_prefix(add_space_prefix)
    close(out)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KVARTO_CACHE", str(path))
    return path


def by_transformers(path):
    return AutoTokenizer.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path))


PATHS = {
    "gpt-2": lambda folder: write_byte_level(folder / "gpt2.gguf", "gpt-2"),
    "llama-bpe": lambda folder: write_byte_level(folder / "llama3.gguf", "llama-bpe", add_bos=True),
    "tekken": lambda folder: write_byte_level(folder / "tekken.gguf", "tekken"),
    "deepseek-r1-qwen": lambda folder: write_byte_level(folder / "r1.gguf", "deepseek-r1-qwen"),
    "spm": lambda folder: write_sentencepiece(folder / "spm.gguf"),
    "phi3": lambda folder: write_sentencepiece(folder / "phi3.gguf", "phi3"),
    "gemma2": lambda folder: write_sentencepiece(folder / "gemma2.gguf", "gemma2"),
}


@pytest.fixture(scope="module", params=sorted(PATHS))
def pair(request, folder, tmp_path_factory):
    """Ours and transformers' reading of one file."""
    path = PATHS[request.param](folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARTO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tokenizer.load(path), by_transformers(path)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_are_those_of_transformers(pair, text, special):
    ours, theirs = pair
    ids = ours.encode(text, special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


@settings(max_examples=100)
@given(text=st.text(st.sampled_from("aeHel wor1234,.'\n\té中👋▁<s>")))
def test_ids_of_any_text_are_those_of_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


def test_special_ids_are_those_of_transformers(pair):
    ours, theirs = pair
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == theirs.vocab_size


def test_directory_that_transformers_wrote_reads_the_same(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    from_folder = Tokenizer.load(str(tmp_path))
    for text in TEXTS:
        assert from_folder.encode(text) == ours.encode(text)
        assert from_folder.decode(ours.encode(text), False) == ours.decode(ours.encode(text), False)


def by_published_pre_tokenizer(path, pre_tokenizer):
    """Where transformers' conversion takes GPT-2's pre-tokenizer, the one in the model's own `tokenizer.json`."""
    theirs = by_transformers(path)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return theirs


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_digits_before_words(folder, text):
    path = write_byte_level(folder / "smollm.gguf", "smollm")
    theirs = by_published_pre_tokenizer(path, pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    assert Tokenizer.load(path).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_is_what_its_own_tokenizer_class_makes_of_it(folder, text):
    path = write_byte_level(folder / "qwen2.gguf", "qwen2")
    vocab = {token: index for index, token in enumerate(BYTE_TOKENS)}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES], unk_token=None,
                            bos_token="<s>", eos_token="</s>", pad_token=None)
    theirs.add_tokens(["<think>", "</think>"])
    assert Tokenizer.load(path).encode(text) == theirs.encode(text)


def test_file_that_wants_no_space_prefix_gets_none(folder):
    tokenizer = Tokenizer.load(write_sentencepiece(folder / "bare.gguf", add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    assert tokenizer.encode("hello", False)[0] != tokenizer.encode(" hello", False)[0]


def test_chat_template_comes_from_the_file(folder):
    tokenizer = Tokenizer.load(write_byte_level(folder / "chat.gguf", "gpt-2"))
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert not Tokenizer.load(write_sentencepiece(folder / "base.gguf")).has_chat_template


@pytest.mark.parametrize(("options", "message"), [
    ({"pre": "unheard-of"}, "tokenizer.ggml.pre is 'unheard-of'; known are .*smollm"),
    ({"pre": None}, "has no tokenizer.ggml.pre"),
    ({"pre": "gpt-2", "model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
    ({"pre": "gpt-2", "types": [1, 1]}, "but 2 types"),
    ({"pre": "gpt-2", "merges": ["ab"]}, "not a pair"),
    ({"pre": "gpt-2", "merges": ["not there"]}, "cannot be built"),
    ({"pre": "gpt-2", "eos": 10**6}, "eos_token_id is 1000000"),
])
def test_unusable_metadata_is_named(tmp_path, options, message):
    pre = options.pop("pre")
    path = write_byte_level(tmp_path / "bad.gguf", pre, **options)
    with pytest.raises(ModelLoadError, match=message) as info:
        Tokenizer.load(path)
    assert path in str(info.value)


def test_file_without_a_tokenizer_is_named(tmp_path):
    close(writer(tmp_path / "none.gguf"))
    with pytest.raises(ModelLoadError, match="carries no tokenizer"):
        Tokenizer.load(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 0, 5), b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    b"GGUF" + struct.pack(">IQQ", 3, 0, 0), b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
    b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61),
    b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4)])
def test_damaged_file_is_a_model_load_error(tmp_path, content):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"damaged\.gguf"):
        read_metadata(str(path))


def test_missing_file_is_a_model_load_error(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot be read"):
        Tokenizer.load(str(tmp_path / "missing.gguf"))


def test_every_kind_of_value_is_read(tmp_path):
    out = writer(tmp_path / "kinds.gguf")
    out.add_uint8("a.u8", 200)
    out.add_int8("a.i8", -5)
    out.add_uint64("a.u64", 2**63)
    out.add_float64("a.f64", 0.1)
    out.add_bool("a.bool", True)
    out.add_string("a.str", "füße")
    out.add_array("a.ints", [1, 2, 3])
    out.add_array("a.strs", ["x", ""])
    close(out)
    metadata = read_metadata(str(tmp_path / "kinds.gguf"))
    assert {key: metadata[key] for key in metadata if key.startswith("a.")} == {
        "a.u8": 200, "a.i8": -5, "a.u64": 2**63, "a.f64": 0.1, "a.bool": True, "a.str": "füße", "a.ints": [1, 2, 3],
        "a.strs": ["x", ""]}


class TestCache:
    @pytest.fixture
    def path(self, tmp_path):
        return write_byte_level(tmp_path / "cached.gguf", "gpt-2")

    @pytest.fixture
    def builds(self, monkeypatch):
        """The paths that were built, not read from the cache."""
        built = []
        build = tokenizer_cache.cached

        def spy(path, reader):
            return build(path, lambda which: (built.append(which), reader(which))[1])

        monkeypatch.setattr("kvarto.cluster.text.tokenizer.cached", spy)
        return built

    def test_second_load_reads_the_cache(self, path, builds):
        first, second = Tokenizer.load(path), Tokenizer.load(path)
        assert len(builds) == 1
        assert first.encode("Hello 中文") == second.encode("Hello 中文")

    def test_changed_file_is_built_again(self, path, builds):
        Tokenizer.load(path)
        os.utime(path, ns=(1, 1))
        Tokenizer.load(path)
        assert len(builds) == 2

    @pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda _: b"",
                                        lambda content: content[:100] + b"x" + content[101:]])
    def test_damaged_entry_is_built_again_and_mended(self, path, builds, cache, damage, caplog):
        Tokenizer.load(path)
        [entry] = (cache / "tokenizers").iterdir()
        entry.write_bytes(damage(entry.read_bytes()))
        with caplog.at_level(logging.WARNING):
            Tokenizer.load(path)
        assert "damaged" in caplog.text
        Tokenizer.load(path)
        assert len(builds) == 2

    def test_entry_of_another_version_is_built_again(self, path, builds, monkeypatch):
        Tokenizer.load(path)
        monkeypatch.setattr(tokenizer_cache, "_VERSION", tokenizer_cache._VERSION + 1)
        Tokenizer.load(path)
        assert len(builds) == 2

    def test_cache_that_cannot_be_written_only_costs_time(self, path, monkeypatch, tmp_path, caplog):
        (tmp_path / "file").touch()
        monkeypatch.setenv("KVARTO_CACHE", str(tmp_path / "file"))
        with caplog.at_level(logging.WARNING):
            assert Tokenizer.load(path).encode("hi")
        assert "not cached" in caplog.text
