"""Typed errors. Every one says what was wrong and what to do, and carries the code that each edge translates.

HTTP answers in OpenAI's error format with `http_status`, gRPC with the status of the same name as `code`, the command
line prints the message and leaves with `exit_code`.
"""

from __future__ import annotations


class KvartoError(Exception):
    """Base of everything kvarto raises on purpose. `param` names the offending field, where there is one."""

    code = "INTERNAL"
    http_status = 500
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(KvartoError):
    """A request that can never be served as it stands. Nothing was taken for it."""

    code = "INVALID_ARGUMENT"
    http_status = 400


class UnprocessableError(InvalidRequestError):
    """A request whose body is well-formed JSON but not of the endpoint's schema."""

    http_status = 422


class PromptTooLongError(InvalidRequestError):
    """The prompt, or the worst case of its group, does not fit `max_model_len` or the block space."""


class ModelNotFoundError(KvartoError):
    """A request named a model that this server does not serve."""

    code = "NOT_FOUND"
    http_status = 404


class AuthenticationError(KvartoError):
    """The API key is missing or wrong."""

    code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDeniedError(KvartoError):
    """Whoever asked may not do this, whatever key they have."""

    code = "PERMISSION_DENIED"
    http_status = 403


class UnavailableError(KvartoError):
    """The worker group or the Head went away, or the server is draining. The same request may succeed later."""

    code = "UNAVAILABLE"
    http_status = 503


class ConfigError(KvartoError):
    """The configuration is not usable: an unknown key, a bad value, or two values that do not go together."""

    code = "FAILED_PRECONDITION"
    exit_code = 2


class ModelLoadError(ConfigError):
    """The model's files are missing, unsupported or damaged. Names the file and, where there is one, the tensor."""


class ResourcesError(ConfigError):
    """The Ray cluster, a port or the machine's memory does not have what was asked for."""


_BY_NAME = {cls.__name__: cls for cls in (
    KvartoError, InvalidRequestError, UnprocessableError, PromptTooLongError, ModelNotFoundError, AuthenticationError,
    PermissionDeniedError, UnavailableError, ConfigError, ModelLoadError, ResourcesError)}


def error_from_name(name: str, message: str, param: str | None = None) -> KvartoError:
    """The error of class `name`, as it was raised in another process. An unknown name becomes `KvartoError`."""
    return _BY_NAME.get(name, KvartoError)(message, param=param)
