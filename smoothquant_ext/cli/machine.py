"""The commands about this machine: info, prove."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SmoothQuantError
from .console import err, out

if TYPE_CHECKING:
    from ..ops.cuda.records import Verdict


def info() -> None:
    """Prints the kernel of every op on this machine, and why faster kernels are not used.

    Example: [bold]smoothquant info[/bold]
    """
    from .. import ops
    from ..ops.cuda import status
    from ..reporting.tables import info_table, proof_table

    try:
        rows = ops.info()
    except RuntimeError as error:  # SMOOTHQUANT_CPU_ISA names an instruction set that this processor lacks
        raise SmoothQuantError(str(error).splitlines()[0]) from error
    out.print(info_table(rows))
    for record in filter(None, status.read().records.values()):
        out.print(proof_table(record))


def prove(
    again: Annotated[bool, typer.Option("--again", help="Prove kernels that were proven here before, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Proves the CUDA kernels on this machine's GPUs, times them, and keeps the result.

    Example: [bold]smoothquant prove[/bold]

    Every family of kernels computes a small set of cases in a process of its own, compared with plain torch. A family
    that is wrong, hangs or crashes is not used: torch's own products take its place. The first use of a GPU does the
    same by itself. Exit status 1: a family failed.
    """
    from ..ops.cuda import machine, proof, settle
    from ..ops.cuda.records import to_json
    from ..reporting.tables import proof_table, timing_table

    facts = machine.gather(settle.library_error())
    if why := machine.why_no_gpu(facts) or machine.why_no_kernels(facts):
        raise SmoothQuantError(f"there are no CUDA kernels to prove here: {why}")

    def report(family: str, verdict: Verdict) -> None:
        err.print(f"{family}: {verdict.kind}", style="" if verdict.is_right else "red", highlight=False)

    records = [
        proof.proven(gpu, facts.gpus.index(gpu), facts.archs, err.print, report, again)
        for gpu in dict.fromkeys(facts.gpus)
    ]
    if as_json:
        sys.stdout.write(json.dumps([to_json(record) for record in records], indent=2) + "\n")
    else:
        for record in records:
            out.print(proof_table(record), timing_table(record))
    if settle.refused(tuple(records)):
        raise typer.Exit(1)
