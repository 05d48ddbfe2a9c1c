import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from kvarto.cluster.text.detokenizer import IncrementalDetokenizer
from kvarto.cluster.text.spec import TokenizerSpec
from kvarto.cluster.text.tokenizer import Tokenizer
from kvarto.protos.errors import ModelLoadError

CORPUS = ["Hello world, hello there!", "  two  spaces\n\tand tabs", "naïve café 中文字 日本語",
          "👋🏽 emoji 👩‍👩‍👧 family", "def f(x):\n    return x"]
REPLACEMENT = "\ufffd"


def build(backend, named=None):
    return Tokenizer(TokenizerSpec(backend_json=backend.to_str(), named_tokens=named or {}), "test")


def byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return build(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def sentencepiece(decoder):
    words = ["▁Hello", "▁world", "Hello", "▁", "▁▁", "▁中", "é", "!", "a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[],
                                 byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return build(backend, {"bos_token": "<s>", "eos_token": "</s>"})


LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                           decoders.Strip(content=" ", left=1)])
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])

BYTE_LEVEL = byte_level()
SENTENCEPIECE = {"llama": sentencepiece(LLAMA), "gemma": sentencepiece(GEMMA), "metaspace": sentencepiece(METASPACE)}
BYTE_0 = 3
WORD_0 = BYTE_0 + 256


def stream(tokenizer, prompt, chunks, skip):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def split(draw, ids):
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@st.composite
def byte_level_chunks(draw):
    # Beyond the vocabulary too: models that pad theirs can sample such an id.
    return split(draw, draw(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40)))


@settings(max_examples=300)
@given(byte_level_chunks(), st.booleans())
def test_concatenated_deltas_are_the_whole_decoded_for_any_tokens(chunks, skip):
    ids = [token_id for chunk in chunks for token_id in chunk]
    assert "".join(stream(BYTE_LEVEL, [], chunks, skip)) == BYTE_LEVEL.decode(ids, skip)


@given(st.text(), st.text())
def test_prompt_does_not_show_in_the_output(prompt, output):
    ids = BYTE_LEVEL.encode(output)
    assert "".join(stream(BYTE_LEVEL, BYTE_LEVEL.encode(prompt), [[i] for i in ids], True)) == output


@given(st.text(alphabet="👋🏽中é a", min_size=1))
def test_no_delta_but_the_last_holds_a_replacement_character_for_valid_text(text):
    deltas = stream(BYTE_LEVEL, [], [[i] for i in BYTE_LEVEL.encode(text)], True)
    assert REPLACEMENT not in "".join(deltas)
    assert deltas[-1] == ""


def test_incomplete_character_is_held_back_and_flushed_as_a_replacement():
    ids = BYTE_LEVEL.encode("𝄞")
    assert len(ids) == 4
    assert stream(BYTE_LEVEL, [], [[i] for i in ids], True) == ["", "", "", "𝄞", ""]
    assert stream(BYTE_LEVEL, [], [[i] for i in ids[:3]], True) == ["", "", "", REPLACEMENT]


def test_special_tokens_show_only_when_asked_for():
    ids = [BYTE_LEVEL.bos_token_id, *BYTE_LEVEL.encode("hi<think>"), BYTE_LEVEL.eos_token_ids[0]]
    assert "".join(stream(BYTE_LEVEL, [], [ids], True)) == "hi<think>"
    assert "".join(stream(BYTE_LEVEL, [], [ids], False)) == "<s>hi<think></s>"


@st.composite
def sentencepiece_ids(draw):
    """Words, special tokens, characters in byte tokens, and characters cut short with a word behind them."""
    word = st.integers(WORD_0, WORD_0 + 8)
    character = st.sampled_from("é中👋 a").map(lambda char: [BYTE_0 + byte for byte in char.encode()])
    cut = st.tuples(character, word).map(lambda pair: [*pair[0][:-1], pair[1]])
    pieces = draw(st.lists(st.one_of(word.map(lambda i: [i]), st.integers(0, 2).map(lambda i: [i]), character, cut),
                           max_size=12))
    # `decode` replaces whole runs of bytes that are not valid, so a run must not hold a good and a cut character; a
    # special token that is skipped does not end one.
    ids, in_run = [], False
    for piece in pieces:
        if in_run and BYTE_0 <= piece[0] < WORD_0:
            ids.append(WORD_0)
        ids += piece
        in_run = piece[-1] < WORD_0 and (in_run or piece[-1] >= BYTE_0)
    return ids


@settings(max_examples=300)
@pytest.mark.parametrize("kind", sorted(SENTENCEPIECE))
@given(ids=sentencepiece_ids(), skip=st.booleans(), data=st.data())
def test_sentencepiece_deltas_are_the_whole_decoded(kind, ids, skip, data):
    tokenizer = SENTENCEPIECE[kind]
    cut = data.draw(st.integers(0, len(ids)))
    while cut and ids[cut - 1] < WORD_0:  # the prompt ends with a word, so that no character is cut in two
        cut -= 1
    prompt, output = ids[:cut], ids[cut:]
    deltas = stream(tokenizer, prompt, split(data.draw, output), skip)
    assert tokenizer.decode(prompt, skip) + "".join(deltas) == tokenizer.decode(ids, skip)


def test_first_word_keeps_its_space_only_after_text():
    tokenizer = SENTENCEPIECE["llama"]
    hello, world = WORD_0, WORD_0 + 1
    assert stream(tokenizer, [tokenizer.bos_token_id], [[hello], [world]], True)[:2] == ["Hello", " world"]
    assert stream(tokenizer, [tokenizer.bos_token_id, hello], [[world]], True)[0] == " world"


def test_valid_characters_in_a_run_of_bytes_stay_when_the_run_turns_out_invalid():
    ids = [BYTE_0 + byte for byte in "中".encode() + b"\xff"]
    assert "".join(stream(SENTENCEPIECE["gemma"], [], [[i] for i in ids], True)) == "中" + REPLACEMENT


@pytest.mark.parametrize("text", ["hello", " 中", "👋"])
def test_token_bytes_join_to_the_text(text):
    assert b"".join(map(BYTE_LEVEL.token_bytes, BYTE_LEVEL.encode(text))).decode() == text


def test_token_text_of_half_a_character_is_a_replacement():
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode("𝄞")[0]) == REPLACEMENT
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.encode("𝄞")[0]) == "𝄞".encode()[:1]


def test_sentencepiece_token_text_shows_its_space():
    assert SENTENCEPIECE["llama"].token_text(WORD_0 + 1) == " world"


def test_id_without_a_token_has_no_text():
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.vocab_size) == ""


def test_decoder_that_cannot_stream_is_refused_at_load():
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match="WordPiece"):
        build(backend)


def test_tokenizer_without_a_decoder_is_refused_at_load():
    with pytest.raises(ModelLoadError, match="none"):
        build(Backend(models.BPE(vocab={"a": 0}, merges=[])))


def test_damaged_backend_is_a_model_load_error():
    with pytest.raises(ModelLoadError, match="test: the tokenizer cannot be built"):
        Tokenizer(TokenizerSpec(backend_json=json.dumps({"model": 1})), "test")
