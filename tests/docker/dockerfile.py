"""A Dockerfile as a list of stages, and the build context as `.dockerignore` leaves it."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
NAMES = ("Dockerfile.cpu", "Dockerfile.cuda")


@dataclass
class Stage:
    """What stands from one FROM to the next: (instruction, value) pairs, line continuations joined."""

    base: str
    name: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for each, value in self.steps if each == instruction]


def stages(name: str) -> list[Stage]:
    """The stages of `docker/<name>`, with the ARGs before the first FROM put into the bases."""
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / "docker" / name).read_bytes()))
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    for step in parser.structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "COMMENT":
            continue
        if instruction == "FROM":
            base, *alias = value.split()
            found.append(Stage(expand(base, arguments), alias[1] if alias else None))
        elif found:
            found[-1].steps.append((instruction, value))
        else:
            assert instruction == "ARG", f"{instruction} before FROM"
            arguments |= pairs(value)
    return found


def pairs(value: str) -> dict[str, str]:
    """The names and values of an ENV, LABEL or ARG instruction."""
    return dict(part.partition("=")[::2] for part in shlex.split(value))


def expand(text: str, variables: dict[str, str]) -> str:
    """`text` with `$NAME` and `${NAME}` replaced, unknown names by nothing, as Docker does."""
    return re.sub(r"\$(?:{(\w+)}|(\w+))", lambda match: variables.get(match[1] or match[2], ""), text)


def exec_form(value: str) -> list[str]:
    """The words of an ENTRYPOINT or CMD; the shell form is refused: a shell would not hand signals on."""
    words = json.loads(value)
    assert isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words


def context() -> list[str]:
    """Files that git has or would take (so neither caches nor what is built) and `.dockerignore` lets in."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    return sorted(path for path in listed if not is_ignored(path) and (ROOT / path).is_file())


def is_ignored(path: str) -> bool:
    """By the last pattern of `.dockerignore` that matches the path or a folder that it is in."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if _regex(pattern.removeprefix("!")).match(path):
            ignored = not pattern.startswith("!")
    return ignored


def _regex(pattern: str) -> re.Pattern[str]:
    parts = {"**/": r"(?:.*/)?", "*": r"[^/]*"}
    translated = re.sub(r"\*\*/|\*|[^*]+", lambda match: parts.get(match[0]) or re.escape(match[0]), pattern)
    return re.compile(translated + r"(?:/.*)?$")


def sources(stage: Stage) -> list[tuple[list[str], str]]:
    """(sources, target) of every COPY that takes from the build context."""
    found = []
    for value in stage.values("COPY"):
        words = shlex.split(value)
        if not words[0].startswith("--from="):
            found.append((words[:-1], words[-1]))
    return found
