"""Typed errors, all below `GemmaMtpError`.

Each message is one sentence: what was wrong, what was expected, what to do. The CLI prints it and exits with 2.
"""


class GemmaMtpError(Exception):
    """Base of every error this package raises for bad input. What can not be printed in its message, such as a line
    break in a tensor's name, is escaped: files have any names, and a message is one line."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(GemmaMtpError):
    """A config.json that is malformed or describes a model we cannot run."""


class CheckpointError(GemmaMtpError):
    """A checkpoint directory that is missing, truncated, or does not match its config."""


class QuantisationError(GemmaMtpError):
    """A weight type or part that is not known, or weights quantised in a way we can not read."""


class DeviceError(GemmaMtpError):
    """A device, or what is installed for it, that a backend can not run on."""


class PairError(GemmaMtpError):
    """A drafter that does not fit its target."""


class TokenizerError(GemmaMtpError):
    """A tokenizer or chat template that is missing or unusable."""


class PromptError(GemmaMtpError):
    """A prompt that cannot be decoded: empty, too long, or with ids out of range."""


class SamplingError(GemmaMtpError):
    """A sampling parameter out of its range."""


class EngineError(GemmaMtpError):
    """A request that failed while it ran, or came to an engine that is stopping."""


class QueueFullError(GemmaMtpError):
    """A request that came when as many were waiting as may; `retry_after` seconds are likely to help."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OptionError(GemmaMtpError):
    """Options of the command line that are of no use together."""


class ServerError(GemmaMtpError):
    """A server that can not be started, reached or measured."""


class DataError(GemmaMtpError):
    """A data set that can not be read or used, by file and line."""


class TrainingError(GemmaMtpError):
    """Training data or settings that cannot work."""


def missing_extra(needed_by: str, package: str | None, extra: str) -> str:
    """Returns the message where what `needed_by` names needs a package that only an extra of ours installs."""
    return f"{needed_by} needs {package}, which is not installed; run: pip install 'gemma-mtp[{extra}]'."


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
