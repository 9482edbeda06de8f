"""Refusing a launch in one readable line: the mistake, its value and what to do."""

try:
    from torchx.specs.finder import ComponentValidationException
except ImportError:  # a TorchX that has renamed it: the command line then shows a traceback above the line
    ComponentValidationException = Exception


class LaunchRefusedError(ValueError, ComponentValidationException):  # pyrefly: ignore[invalid-inheritance]
    """A launch was refused; `torchx run` shows the message without a traceback, as it does for a wrong component."""
