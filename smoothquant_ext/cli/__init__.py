"""The command line: arguments only. The commands import heavy modules themselves, so that ``--help`` is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from . import machine, make, measure, run
from .console import Commands, out, print_any_character

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    make.quantize,
    make.convert,
    measure.eval,
    measure.compare,
    run.generate,
    run.chat,
    run.serve,
    measure.inspect,
    measure.report,
    machine.info,
    machine.prove,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def smoothquant(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantizes models to 8 bits, weights and activations, and runs them on INT8 and FP8 kernels.

    First [bold]smoothquant quantize MODEL -o DIR[/bold], then [bold]smoothquant compare MODEL DIR[/bold] and
    [bold]smoothquant generate DIR "Once upon a time"[/bold].
    """
    if version:
        from importlib.metadata import version as installed_version

        out.print(f"smoothquant-ext {installed_version('smoothquant-ext')}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The console entry point."""
    print_any_character()
    app()
