"""The command line: one verb for each job, each of which can write a run folder."""

from typing import Annotated

import typer

from ntkdp._results.provenance import VERSION
from ntkdp.cli import (
    _advise,
    _compare,
    _compilation_cache,
    _demo,
    _explore,
    _plan,
    _predict,
    _privacy,
    _sweep,
    _verify,
)

app = typer.Typer(
    name="ntkdp",
    help="Predict how a neural network trains under differential privacy, and check it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"ntkdp {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    compilation_cache: Annotated[
        bool,
        typer.Option(
            envvar="NTKDP_COMPILATION_CACHE",
            help="Keep compiled programs in the user's cache folder, so that the next command "
            "starts sooner.",
        ),
    ] = True,
) -> None:
    del version
    if compilation_cache:
        _compilation_cache.begin()


app.command("demo")(_demo.demo)
app.command("predict", epilog=_predict.epilog())(_predict.predict)
app.command("advise", epilog=_advise.epilog())(_advise.advise)
app.command("compare", epilog=_compare.epilog())(_compare.compare)
app.command("sweep", epilog=_sweep.epilog())(_sweep.sweep)
app.command("explore", epilog=_explore.epilog())(_explore.explore)
app.command("plan", epilog=_plan.epilog())(_plan.plan)
app.command("privacy")(_privacy.privacy)
app.command("verify")(_verify.verify)
