"""The page of one browser tab: sliders, pictures, and what passes between them and the answers."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from bokeh.document import Document
from bokeh.layouts import column
from bokeh.models import (
    Button,
    CategoricalSlider,
    CustomJS,
    Div,
    InlineStyleSheet,
    PreText,
    RadioButtonGroup,
)

from ntkdp.cli._exploration import words
from ntkdp.cli._exploration.explorer import AXIS, PARTS, Answer, Explorer
from ntkdp.cli._exploration.pictures import Pictures
from ntkdp.cli._exploration.setting import Position

_TEMPLATE = Path(__file__).parent / "page.html"
#: What sliders are called, in the order of the page.
_TITLES = {
    "clip_norm": "Clipping norm R",
    "learning_rate": "Learning rate η",
    "epsilon": "Privacy budget ε",
    "steps": "Steps T",
    "sample_rate": "Sampling rate q",
    "width": "Width of the network",
}
_COPY = """
navigator.clipboard.writeText(toml.text).then(
  () => { status.text = "Copied." },
  () => { status.text = "The browser does not let the page copy: select the text below." },
)
"""

#: Of the summary, whose text the style of the page does not reach.
_STYLE = """
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: .5rem; }
dl { margin: 0; }
dt { color: #555; font-size: 13px; }
dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
small { display: block; color: #555; font-size: 13px; font-weight: 400; }
p { margin: .6rem 0 0; padding-left: .6rem; border-left: 4px solid #767676; font-size: 14px; }
p.good { border-color: #009e73; }
p.doubtful { border-color: #f0b400; }
p.failed { border-color: #c02a1d; }
p.seconds { border: none; padding: 0; color: #555; font-size: 13px; margin-top: .3rem; }
"""

Found = TypeVar("Found")


class Page:
    """Sliders and pictures in one tab.

    The latest place of the sliders is answered, one at a time: places that they passed meanwhile
    are left out. Parts of the map follow when the sliders rest, by a worker of their own, so that
    no answer waits for them.
    """

    def __init__(
        self, document: Document, explorer: Explorer, workers: Mapping[str, Executor]
    ) -> None:
        # Its properties take more than they give, which types cannot say.
        self._document: Any = document
        self._explorer, self._workers = explorer, workers
        setting = explorer.setting
        self._wanted = setting.start
        self._answered: Position | None = None
        self._busy: set[str] = set()
        self._is_closed = False
        self._parts: list[np.ndarray] = []
        self._no_map = [np.full((len(norms), len(AXIS)), np.nan) for norms in PARTS]
        has_accuracy = setting.config.loss in ("softmax_cross_entropy", "logistic")
        self._pictures = Pictures("test accuracy" if has_accuracy else "test loss", has_accuracy)
        self._sliders = {
            name: CategoricalSlider(
                title=title,
                categories=[_shown(choice) for choice in setting.choices[name]],
                value=_shown(getattr(setting.start, name)),
                sizing_mode="stretch_width",
                name=name,
            )
            for name, title in _TITLES.items()
            if len(setting.choices[name]) > 1
        }
        rules = setting.choices["rule"]
        self._rule = RadioButtonGroup(
            labels=list(rules), active=rules.index(setting.start.rule),
            sizing_mode="stretch_width", name="rule",
        )  # fmt: skip
        self._summary = Div(sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_STYLE)])
        self._toml = PreText(sizing_mode="stretch_width")
        self._lay_out(words.subject(setting))
        for name, slider in self._sliders.items():
            slider.on_change("value", partial(self._moved, name))
        self._rule.on_change("active", partial(self._moved, "rule"))
        document.on_session_destroyed(self._close)
        self._show(explorer.first())
        self._ask()

    def _lay_out(self, subject: str) -> None:
        document = self._document
        document.title = "ntkdp explore"
        document.template = _TEMPLATE.read_text(encoding="utf-8")
        document.template_variables["subject"] = subject
        document.template_variables["limits"] = words.limits(self._explorer)
        status = Div(text="", sizing_mode="stretch_width")
        button = Button(label="Copy as TOML", button_type="primary", sizing_mode="stretch_width")
        button.js_on_click(CustomJS(args={"toml": self._toml, "status": status}, code=_COPY))
        rule = Div(text="Clipping rule", margin=(5, 5, 0, 5))
        roots = {
            "controls": column(
                *self._sliders.values(), rule, self._rule, button, status,
                sizing_mode="stretch_width",
            ),
            "summary": self._summary,
            "toml": self._toml,
            **self._pictures.figures,
        }  # fmt: skip
        for name, root in roots.items():
            root.name = name
            document.add_root(root)

    def _moved(self, name: str, attr: str, old: object, new: Any) -> None:
        choices = self._explorer.setting.choices[name]
        chosen = choices[new if name == "rule" else [_shown(one) for one in choices].index(new)]
        self._wanted = self._wanted._replace(**{name: chosen})
        self._ask()

    def _ask(self) -> None:
        """Begin with an answer, or while the sliders rest with what follows from it."""
        wanted, explorer = self._wanted, self._explorer
        if wanted != self._answered:
            if not explorer.knows(wanted.width):
                self._summary.text = words.waiting(wanted.width)
            self._begin("answer", partial(explorer.answer, wanted), partial(self._end, wanted))
        elif len(self._parts) < len(PARTS):
            part = partial(explorer.part_of_map, wanted, len(self._parts))
            self._begin("ahead", part, partial(self._end_part, wanted))
        elif (work := explorer.work_ahead(wanted)) is not None:
            self._begin("ahead", work, lambda done: None)

    def _begin(
        self, kind: str, work: Callable[[], Found], end: Callable[["Future[Found]"], None]
    ) -> None:
        """Let a worker of this kind work, unless it does, and take what it has found."""
        if kind in self._busy or self._is_closed:
            return
        self._busy.add(kind)

        def take(done: "Future[Found]") -> None:
            self._busy.remove(kind)
            end(done)
            self._ask()

        def tell(done: "Future[Found]") -> None:
            if not self._is_closed:
                self._document.add_next_tick_callback(partial(take, done))

        self._workers[kind].submit(work).add_done_callback(tell)

    def _end(self, place: Position, done: "Future[Answer]") -> None:
        error = done.exception()
        if error is None:
            self._show(done.result())
        else:
            self._summary.text = words.failure(error)
            self._answered, self._parts = place, list(self._no_map)

    def _show(self, answer: Answer) -> None:
        before, self._answered = self._answered, answer.place
        self._pictures.show(answer)
        self._summary.text = words.summary(answer)
        self._toml.text = self._explorer.setting.as_toml(answer.place)
        if before is None or _of_map(before) != _of_map(answer.place):
            self._parts = []
            self._pictures.expect_map()

    def _end_part(self, place: Position, done: "Future[np.ndarray]") -> None:
        if self._answered is None or _of_map(self._answered) != _of_map(place):
            return
        error = done.exception()
        self._parts.append(self._no_map[0] if error is not None else done.result())
        if len(self._parts) == len(PARTS):
            self._pictures.show_map(np.concatenate(self._parts))

    def _close(self, context: object) -> None:
        self._is_closed = True


def _of_map(place: Position) -> Position:
    """What the map depends on, which has learning rates and clipping norms of its own."""
    return place._replace(learning_rate=0.0, clip_norm=0.0)


def _shown(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
