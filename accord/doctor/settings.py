"""What the doctor reads of a serve config: its engine. The rest of the file is the services' own matter."""

from typing import Any, Literal

import pydantic

from accord.config import Config


class _Part(Config):
    model_config = pydantic.ConfigDict(extra="ignore")


class EngineFile(_Part):
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    options: dict[str, Any] = pydantic.Field(default_factory=dict)


class GenerationFile(_Part):
    engine: EngineFile = EngineFile()


class ServeFile(_Part):
    generation: GenerationFile = GenerationFile()
