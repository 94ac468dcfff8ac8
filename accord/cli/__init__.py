"""The command `accord`: one command a stage, and `demo`. Each becomes `python -m ray_jobs.STAGE`.

Replacing the process keeps this one light (no Ray, no torch), and leaves one copy of each stage's options.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

import accord
from accord.children import become
from accord.cli import doctor as doctor_command
from accord.cli import feedback, generation, operate, rating, tokens
from accord.cli.common import PASS_ON, errors_shown
from accord.errors import ConfigError

DEMO_RECIPE = Path("recipes") / "sandbox" / "demo.yaml"
_EACH = "{count: %d, colour: %d, background: %d, combination: %d}"
# Twenty prompts of three images: some minutes for a person.
PERSON = (
    "panel=null",
    "feedback.serve=true",
    "feedback.judgements_per_image=1",
    "collect.labelled.prompts=" + _EACH % (5, 5, 5, 5),
    "collect.labelled.images_per_prompt=" + _EACH % (3, 3, 3, 3),
)

_EPILOG = "Each stage takes --recipe FILE, --set SECTION.KEY=VALUE, --run-dir and --address: see its --help."

app = typer.Typer(
    help=accord.__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=_EPILOG,
)
app.add_typer(operate.app)
app.add_typer(tokens.app, name="token", rich_help_panel="Serving")
app.add_typer(feedback.app, name="feedback", rich_help_panel="People's judgements")


def run_job(module: str, arguments: Sequence[str]) -> NoReturn:
    """Becomes `python -m ray_jobs.MODULE`: Ctrl-C, exit status and terminal are the job's own."""
    become(f"ray_jobs.{module}", arguments)


def demo_recipe() -> Path:
    """The demo's recipe, which lies beside the package in a checkout.

    Raises:
        ConfigError: when Accord was installed without its checkout.
    """
    path = Path(accord.__file__).resolve().parent.parent / DEMO_RECIPE
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}: the recipes are not part of the installed package. Run the demo from a "
            "checkout of Accord, or name a recipe of your own: accord loop --recipe FILE"
        )
    return path


def _version(value: bool) -> None:
    if value:
        typer.echo(f"accord {accord.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Aligns text-to-image diffusion models with human feedback."""


@app.command(context_settings=PASS_ON, rich_help_panel="Start here")
def demo(context: typer.Context) -> None:
    """The paper's whole loop on the world of shapes, in minutes: images, votes, reward, tuning, report.

    At its end it serves the models that it made, and asks them over gRPC; with --skip-serving it does not.
    With --rater NAME you are the rater: it opens the rating page, and goes on when you have judged 60 images.
    """
    with errors_shown():
        recipe, (changes, given) = demo_recipe(), _for_a_person(context.args)
    arguments = [argument for argument in given if argument != "--skip-serving"]
    job = "demo" if arguments == given else "loop"
    run_job(job, ["--recipe", str(recipe), *changes, *arguments])


def _for_a_person(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What `--rater NAME` changes in the demo's recipe, as options, and the arguments without it."""
    changes, rest, given = [], [], iter(arguments)
    for argument in given:
        if argument.partition("=")[0] != "--rater":
            rest.append(argument)
            continue
        name = argument.partition("=")[2] or next(given, "")
        if not name or name.startswith("-"):
            raise ConfigError("--rater needs the name under which you judge, such as: accord demo --rater me")
        for change in (*PERSON, f"feedback.rater={name}", f"run_dir=runs/demo-{name}"):
            changes += ["--set", change]
    return changes, rest


@app.command(context_settings=PASS_ON, rich_help_panel="Start here")
def loop(context: typer.Context) -> None:
    """All stages of one recipe, in order; what is done already is kept."""
    run_job("loop", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Stages")
def collect(context: typer.Context) -> None:
    """Generate the images that are to be judged, and those that the reward will score."""
    run_job("collect", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Stages")
def judge(context: typer.Context) -> None:
    """Have the panel judge the images, and take a snapshot of all judgements."""
    run_job("judge", context.args)


@app.command("learn-reward", context_settings=PASS_ON, rich_help_panel="Stages")
def learn_reward(context: typer.Context) -> None:
    """Learn the reward model from a snapshot (the paper's stage 2)."""
    run_job("learn_reward", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Stages")
def finetune(context: typer.Context) -> None:
    """Fine-tune the diffusion model by reward-weighted likelihood (the paper's stage 3)."""
    run_job("finetune", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Stages")
def evaluate(context: typer.Context) -> None:
    """Compare base, control and aligned model over guidance scales, splits and categories."""
    run_job("evaluate", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Stages")
def report(context: typer.Context) -> None:
    """Write report.html and summary.json of a run."""
    run_job("report", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Start here")
def study(context: typer.Context) -> None:
    """Compare ways of training over several seeds, with intervals."""
    run_job("study", context.args)


@app.command(context_settings=PASS_ON, rich_help_panel="Serving")
def serve(context: typer.Context) -> None:
    """Serve scored generations over gRPC on this machine, until Ctrl-C."""
    become("services.local", context.args)


class _ScoreCommand(TyperCommand):
    """`accord score --recipe ...` is the stage of a run; without a recipe, a gateway is asked."""

    # Untyped: typer's own contexts are click's in some of its versions, and its own in others.
    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if any(argument.split("=")[0] == "--recipe" for argument in args):
            run_job("score", args)
        return super().make_context(info_name, args, parent, **extra)


app.command(rich_help_panel="Serving")(generation.generate)
app.command(rich_help_panel="Serving", cls=_ScoreCommand)(generation.score)
app.command(rich_help_panel="Serving")(generation.replay)
app.command(rich_help_panel="Serving")(rating.rate)
app.command(rich_help_panel="Start here")(doctor_command.doctor)


@app.command("pretrain-shapes", context_settings=PASS_ON, rich_help_panel="Making the sandbox")
def pretrain_shapes(context: typer.Context) -> None:
    """Make the weights of the world of shapes from nothing."""
    run_job("pretrain_shapes", context.args)
