"""The errors that Accord raises on purpose. A message says what was wrong, what was expected, what to do."""


class AccordError(Exception):
    """Base of all errors that a user can cause and mend. Anything else that escapes is a bug."""


class ConfigError(AccordError):
    """A recipe or a config does not say what it must say."""


class PromptError(AccordError):
    """A prompt outside the grammar, or a request that the grammar cannot fulfil."""


class ArtifactError(AccordError):
    """An artifact is missing, damaged, of another kind, or of a format that we refuse to open."""


class ImageError(AccordError):
    """Bytes that are no usable image."""


class EngineError(AccordError):
    """The denoising engine could not make an image: the sample, the model or the arithmetic failed."""


class EngineFull(EngineError):  # noqa: N818 - a state, named as callers think of it
    """The engine's queue has no room. Nothing was started: try again a little later."""


class EngineClosed(EngineError):  # noqa: N818 - a state, named as callers think of it
    """The engine is closed, or was closed before the image was done."""


class ModelNotLoaded(EngineError):  # noqa: N818 - a state, named as callers think of it
    """No model of that name is loaded (any more)."""


class FeedbackError(AccordError):
    """Judgements that cannot be stored, or from which nothing can be learned."""


class StorageError(AccordError):
    """The disk is full or a quota is reached. Nothing was changed."""


class TokenError(AccordError):
    """A token file that cannot be read or written, or a change to it that makes no sense."""
