"""What the HTTP and gRPC servers stand on: the requests of one process, as both of them see them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..protos.config import ServeConfig
from ..protos.request import EngineInfo
from ..protos.sampling import SamplingParams
from .outputs import StreamChunk


@dataclass(frozen=True, slots=True)
class Health:
    """Health by progress: never bad because of load alone."""

    live: bool
    """False when only a restart of this process can help."""
    ready: bool
    """True when a request that arrives now would be served."""
    reason: str = ""
    """Why it is not ready, for a person to read."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be called."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""

    def token_text(self, token_id: int) -> str:
        """Text of one token, for people to read: an incomplete character is shown by a replacement."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, possibly a part of a character."""

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True,
                            tools: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
        """Messages as one prompt text, special tokens included. A field that is None counts as absent; the content
        may be a list of text parts."""


class ChunkStream(Protocol):
    """The chunks of one request, ending after the last `finish_reason` of its completions."""

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        """Itself."""

    async def __anext__(self) -> StreamChunk:
        """The next chunk. Raises a `KvartoError` when the request failed."""

    async def aclose(self) -> None:
        """Cancel what still runs. Idempotent, and effective also before the first chunk was asked for."""


class Frontend(Protocol):
    """Serves the requests of one process."""

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself."""

    @property
    def config(self) -> ServeConfig:
        """The configuration it was started with."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def default_sampling(self) -> dict[str, Any]:
        """Sampling parameters of `generation_config.json`, for requests that leave them out."""

    def stream(self, prompt: str | list[int], params: SamplingParams, *, request_id: str, priority: int = 0,
               cache_salt: str = "") -> ChunkStream:
        """Check and submit one request. Raises a `KvartoError` at the call, before anything is taken. Prompts share
        cached blocks only with prompts of the same `cache_salt`."""

    async def status(self) -> dict[str, Any]:
        """The state of the whole application, for people and `kvarto status`."""

    async def blocks(self) -> dict[str, Any]:
        """The block map of every worker group, for people and `kvarto status`."""

    async def metrics(self) -> str:
        """Prometheus text."""

    async def drain(self) -> int:
        """Have the whole application take no more requests; how many it has left."""

    def health(self) -> Health:
        """Health now. Cheap: nothing is asked of another process."""
