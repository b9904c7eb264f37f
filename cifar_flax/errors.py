"""Errors that the user can fix; each is printed as one line, without a traceback."""

from collections.abc import Sequence

_REASONS = 3  # the most that `first_of` lists


class UserError(Exception):
    """Raised if a run cannot start or continue; the message states the reason and a remedy."""

    exit_code = 1


class ConfigError(UserError):
    """Raised if a setting is not allowed; the message names the field, its value and the allowed values."""

    exit_code = 2


class DivergedError(UserError):
    """Raised if training has diverged: the loss, the gradient or the weights are not finite."""


def one_line(error: Exception) -> str:
    """Return type and text of `error` on one line, shortened if it is long; of a `UserError`, the text alone."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"  # the cause is often at the end
    return f"{type(error).__name__}: {text}"


def reason(error: OSError) -> str:
    """Return the reason alone, without number and path, such as "permission denied"."""
    text = error.strerror or " ".join(str(error).split())
    return text[:1].lower() + text[1:]


def first_of(reasons: Sequence[str]) -> str:
    """Return the first of `reasons` and the number of the others."""
    shown, left = reasons[:_REASONS], len(reasons) - _REASONS
    return "; ".join(shown) + (f"; and {left} more" if left > 0 else "")


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` with the message `field=value: allowed` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: {allowed}")
