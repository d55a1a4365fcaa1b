"""The command ``ntkdp explore``: a page with sliders over a prediction."""

import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from ntkdp import experiment
from ntkdp.cli._terminal import announce, explained, fields_help, progress

#: Fields of a file of features, which has no training.
_OF_FEATURES: dict[str, Any] = {
    "training": {"learning_rate": 1.0, "steps": 100},
    "clipping": [{"clip_norm": 1.0}],
}


def explore(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="TOML file as of ntkdp predict, or features in a .npz or .csv file for a "
            "linear head; without it, handwritten digits.",
            metavar="CONFIG.toml|FEATURES",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of the page, 0 for a free one.")
    ] = 5006,
    draws: Annotated[
        int, typer.Option(min=2, max=1000, help="Private runs that an answer draws.")
    ] = 24,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Move sliders over a prediction of private training, on a page of this machine alone.

    Sliders move the clipping norm, the learning rate, epsilon, the steps, the sampling rate, the
    rule and the width; the page shows loss and accuracy with bands, reliability, the spectrum, v(T)
    and a map, and copies the run as TOML. Nothing is trained, and nothing leaves the machine.
    """
    with explained():
        try:
            import bokeh  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "ntkdp explore needs bokeh: pip install 'ntkdp[explore]', or in a clone "
                "uv sync --extra explore"
            ) from error
        from ntkdp.cli._exploration.server import bound, serve
        from ntkdp.cli._exploration.setting import setting_of

        chosen = bound(port)
        setting = setting_of(_fields(source))
        with progress() as report:
            from ntkdp.cli._exploration.explorer import Explorer

            explorer = Explorer(setting, draws)
            report("kernel", 0.1)
            explorer.kernel(setting.start.width)
            report("first prediction", 0.6)
            explorer.first()

        def begin(address: str) -> None:
            announce(f"open {address} (Ctrl-C ends it)")
            sys.stdout.flush()
            if browser:
                webbrowser.open(address)

        serve(explorer, chosen, begin)


def _fields(source: Path | None) -> dict[str, Any]:
    """Fields of the configuration that is explored."""
    if source is None:
        from ntkdp.cli._exploration.setting import DIGITS

        return DIGITS
    if source.suffix.lower() == ".toml":
        return experiment.load_config(source).model_dump(exclude_unset=True)
    return {**experiment.fields_of_features(source), **_OF_FEATURES}


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(experiment.Config)
