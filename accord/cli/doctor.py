"""`accord doctor`: whether a recipe will fit this machine, before anything starts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from accord.cli.common import errors_shown, stderr
from accord.config import load_yaml
from accord.errors import ConfigError

TOO_LITTLE_STATUS = 1
_GIGABYTE = 1e9


def doctor(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE replaces a value of the recipe.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Instead of the recipe's.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="sd15 or sdxl: reckon with it where the recipe's model is not here.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GB of host memory; without it, what is free.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GB of one GPU; without it, what this machine's have free.")
    ] = None,
    teraflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that the device sustains; without it, a short probe tells.")
    ] = None,
    serve_config: Annotated[
        Path | None, typer.Option(help="The file that `accord serve` is started with, for its engine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers, in bytes and seconds.")] = False,
) -> None:
    """Say whether a recipe will fit: memory by component, disk, time, and what is missing.

    Starts and changes nothing, and loads no weights. Leaves with status 1 when something does not fit or is
    missing.
    """
    with errors_shown():
        from accord.recipe import load_recipe

        read = load_recipe(recipe, changes or [])
        if not as_json:
            stderr().print("Reckoning with networks that hold no data ...")
        import diffusers  # noqa: F401 - before the memory of this process is taken as that of any
        import open_clip  # noqa: F401

        from accord.diffusion.architectures import ARCHITECTURES
        from accord.doctor.examine import Assumptions, examine
        from accord.doctor.report import show

        if architecture is not None and architecture not in ARCHITECTURES:
            raise ConfigError(f"--architecture is one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        assumed = Assumptions(
            architecture=architecture,
            memory_bytes=_bytes(memory),
            gpu_memory_bytes=_bytes(gpu_memory),
            teraflops=teraflops,
            **_engine(serve_config),
        )
        report = examine(read, run_dir or read.run_dir, assumed)
    if as_json:
        typer.echo(json.dumps(report.as_data(), indent=2))
    else:
        show(report, Console(highlight=False))
    if not report.fits:
        raise typer.Exit(TOO_LITTLE_STATUS)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * _GIGABYTE)


def _engine(path: Path | None) -> dict[str, Any]:
    """The engine's settings in a serve config; this package knows no more of that file."""
    if path is None:
        return {}
    from accord.config import validate
    from accord.diffusion.settings import EngineConfig
    from accord.doctor.settings import ServeFile

    engine = load_yaml(ServeFile, path).generation.engine
    return {
        "engine": validate(EngineConfig, engine.options, f"{path}: generation.engine.options"),
        "engine_dtype": engine.dtype,
        "engine_device": "cuda" if engine.device.startswith("cuda") else "cpu",
    }
