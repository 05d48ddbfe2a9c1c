"""Tokenizers of directories in Hugging Face format, against transformers reading the same files."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvarto.cluster.model_hub import resolve_model
from kvarto.cluster.text.tokenizer import Tokenizer
from kvarto.protos.errors import InvalidRequestError, ModelLoadError

CORPUS = ["Hello world, hello there! It's 2024.", "  two  spaces\n\tand tabs", "naïve café 中文 👋🏽",
          "def f(x): return x"]
TEXTS = ["", " ", "Hello world", "  two  spaces ", "\n\n\t", "naïve 中文 👋🏽", "<s>Hello</s>", "a<mask> b", "x<tool>y",
         "def f(x):\n    return [x, 1234]\n", "<pad><eot>"]
MESSAGES = [{"role": "user", "content": "Hi 中"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def backend():
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<pad>", "<eot>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(saved):
    return Tokenizer.load(saved), AutoTokenizer.from_pretrained(saved)


@pytest.fixture
def folder(tmp_path):
    """A minimal model directory, whose files a test adds to."""
    backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_are_those_of_transformers(pair, text, special):
    ours, theirs = pair
    ids = ours.encode(text, special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


@given(st.text())
def test_any_text_survives(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_prompt_is_that_of_transformers(pair, prompt):
    ours, theirs = pair
    assert ours.apply_chat_template(MESSAGES, prompt) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=prompt)


def test_special_ids_are_those_of_transformers(pair):
    ours, theirs = pair
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)


def test_ends_are_those_of_the_generation_config_and_the_tokenizer(folder):
    write(folder, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": [3, 1]},
          config={"eos_token_id": 2})
    assert Tokenizer.load(str(folder)).eos_token_ids == (3, 1)


def test_ends_come_from_the_model_config_where_there_is_no_generation_config(folder):
    write(folder, tokenizer_config={"eos_token": {"content": "</s>"}}, config={"eos_token_id": 3})
    assert Tokenizer.load(str(folder)).eos_token_ids == (3, 1)


def test_tokens_that_only_the_config_calls_special_are_skipped(folder):
    write(folder, tokenizer_config={"additional_special_tokens": ["<tool>"]})
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "ab"


def test_special_tokens_map_is_read(folder):
    write(folder, special_tokens_map={"bos_token": {"content": "<s>"}, "eos_token": "<eot>"},
          tokenizer_config={"eos_token": "</s>", "bos_token": None})
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == (1,)


def test_truncation_and_padding_left_by_training_are_not_applied(tmp_path):
    trained = backend()
    trained.enable_truncation(4)
    trained.enable_padding(length=64, pad_id=2, pad_token="<pad>")
    trained.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(str(tmp_path)).encode("Hello " * 50) == backend().encode("Hello " * 50).ids


def test_template_file_wins_over_the_config(folder):
    write(folder, tokenizer_config={"chat_template": "config"})
    assert Tokenizer.load(str(folder)).apply_chat_template(MESSAGES) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(str(folder)).apply_chat_template(MESSAGES) == "file"


def test_named_templates_of_the_config_are_read(folder):
    write(folder, tokenizer_config={"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]})
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"type": "function"}]) == "tools"


def test_named_template_files_are_read(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.load(str(folder)).apply_chat_template(MESSAGES, tools=[{"type": "function"}]) == "tools"


def test_variables_reach_the_template(folder):
    (folder / "chat_template.jinja").write_text("{{ enable_thinking }}")
    assert Tokenizer.load(str(folder)).apply_chat_template(MESSAGES, enable_thinking=False) == "False"


def test_model_without_a_template_says_so(folder):
    tokenizer = Tokenizer.load(str(folder))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_directory_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ModelLoadError, match="save_pretrained"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"bos_token": 5}'), ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
    ("generation_config.json", '{"eos_token_id": "x"}')])
def test_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer" if name == "tokenizer.json" else name):
        Tokenizer.load(str(folder))


def test_named_token_outside_the_vocabulary_is_named(folder):
    write(folder, tokenizer_config={"eos_token": "<nowhere>"})
    with pytest.raises(ModelLoadError, match="eos_token is '<nowhere>'"):
        Tokenizer.load(str(folder))


def test_lone_surrogate_is_an_invalid_request(pair):
    with pytest.raises(InvalidRequestError, match="lone surrogate at character 2"):
        pair[0].encode("ab\ud800")


def test_threads_share_a_tokenizer(pair):
    text = "Hello world 中文 " * 200
    expected = pair[0].encode(text)
    with ThreadPoolExecutor(8) as pool:
        assert all(ids == expected for ids in pool.map(pair[0].encode, [text] * 64))


def test_other_threads_run_while_a_long_text_is_encoded(pair):
    longest, done = 0.0, threading.Event()

    def watch():
        nonlocal longest
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    pair[0].encode("Hello world, hello there! " * 40_000)
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    assert longest < took / 2


def run(script, saved):
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, "-c", script, saved], capture_output=True, text=True, check=True,
                          env=environment)


def test_fork_after_encoding_gives_no_warning(saved):
    script = ("import os, sys\n"
              "from kvarto.cluster.text.tokenizer import Tokenizer\n"
              "tokenizer = Tokenizer.load(sys.argv[1])\n"
              "tokenizer.encode('Hello world ' * 1000)\n"
              "child = os.fork()\n"
              "tokenizer.encode('Hello world')\n"
              "child or os._exit(0)\n"
              "assert os.waitpid(child, 0)[1] == 0\n")
    assert run(script, saved).stderr == ""


def test_torch_and_transformers_stay_out(saved):
    script = ("import sys\n"
              "from kvarto.cluster.text.tokenizer import Tokenizer\n"
              "import kvarto.cluster.text.detokenizer, kvarto.cluster.text.stop_strings, kvarto.cluster.model_hub\n"
              "Tokenizer.load(sys.argv[1])\n"
              "print([name for name in ('torch', 'transformers', 'ray', 'huggingface_hub') if name in sys.modules])\n")
    assert run(script, saved).stdout == "[]\n"


@pytest.mark.slow
def test_smollm2_file_is_read_as_transformers_reads_it():
    """Except where digits follow spaces: there transformers' conversion takes GPT-2's splitting, the model does not."""
    path = resolve_model("smollm2-135m")
    ours = Tokenizer.load(path)
    theirs = AutoTokenizer.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), False) == theirs.decode(theirs.encode(text))
    assert ours.encode("a  1") == [*ours.encode("a"), *ours.encode("  "), *ours.encode("1")]
    assert ours.apply_chat_template(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True)
