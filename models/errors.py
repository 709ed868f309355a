"""What can go wrong between a model's name and its loaded weights.

ModelError
 |- UnsupportedModel    the architecture or one of its features is not implemented here
 |- CheckpointError     the weight files do not match the configuration
 `- ModelNotAvailable   the model cannot be found or fetched
     `- PullError       the embedded model could not be downloaded or converted
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of the errors of this folder; each message can be shown to a user as it is."""


class UnsupportedModel(ModelError):
    """A feature of the model is not implemented."""

    def __init__(self, field: str, value: object, supported: str) -> None:
        super().__init__(f"unsupported model: {field} is {value!r}; supported: {supported}")
        self.field = field
        self.value = value


class CheckpointError(ModelError):
    """Weight files that are missing, damaged or of another shape than the configuration."""


class ModelNotAvailable(ModelError):
    """No such model here or on the hub, or the hub cannot be reached."""


class PullError(ModelNotAvailable):
    """The embedded model could not be downloaded or converted."""
