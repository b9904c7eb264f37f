"""Mistakes a user can mend: each is shown as one line, never as a traceback."""


class UserError(Exception):
    """A run that cannot go on; the message says why and what to do."""

    exit_code = 1


class ConfigError(UserError):
    """A setting that is not allowed; the message names the field, its value and what is allowed."""

    exit_code = 2


def one_line(error: Exception) -> str:
    """An error of a library as a part of a message."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"  # the cause may stand at the end
    return f"{type(error).__name__}: {text}"


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises `ConfigError` naming `field`, `value` and what is `allowed` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: {allowed}")
