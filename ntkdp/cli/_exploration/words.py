"""What the page says in words."""

from html import escape

from ntkdp.cli._exploration.explorer import STILL, USELESS, Answer, Band, Explorer
from ntkdp.cli._exploration.setting import INFINITE, Setting


def subject(setting: Setting) -> str:
    """What is trained, on what."""
    config = setting.config
    return f"Begins with {config.model.words} on {config.samples}; δ = {setting.delta:g}"


def limits(explorer: Explorer) -> list[str]:
    """Which prediction the page shows, and where it ends."""
    return [
        f"Each answer draws {explorer.n_draws} private runs, step by step, in the weights of a "
        "linear head whose kernel is that of the network at the start. Lines are means over the "
        "runs, and bands hold 90% of them.",
        "All places of the sliders draw the same random numbers, so that what changes is due to "
        "the slider.",
        "The kernel stays as it is at the start. Noise moves that of a network, and v(T) says how "
        f"far: up to {STILL:g} the loss was within 5% of runs; the closer to {USELESS:g}, the "
        "less is right, and beyond it nothing is. The kernel of a linear head never moves. Kernels "
        "between times take too long for a slider: ntkdp predict has them.",
        "A cell of the map is a single run, with the rule, the steps, the sampling rate and the "
        "budget of the sliders. The star is where they stand, and left of the dashed line v(T) is "
        f"below {STILL:g}.",
        "What looks at the data is not private, and no privacy is counted for it here.",
    ]


def waiting(width: str) -> str:
    """While a kernel is computed."""
    what = "infinite width" if width == INFINITE else f"width {escape(width)}"
    return f'<p class="busy" role="status">The kernel of {what} is computed once …</p>'


def failure(error: BaseException) -> str:
    """Why there is no answer."""
    return f'<p class="failed" role="alert">No prediction: {escape(str(error))}</p>'


def summary(answer: Answer) -> str:
    """The numbers at the end, and whether to believe them."""
    cells = [
        (label, _with_band(_last(answer.bands[name]), form))
        for name, label, form in (
            ("test_accuracy", "test accuracy", ".1%"),
            ("test_loss", "test loss", ".3f"),
            ("loss", "training loss", ".3f"),
        )
        if name in answer.bands
    ]
    if answer.reliability is not None:
        cells.append(("calibration error", _with_band(answer.reliability.error, ".3f")))
    cells.append(("samples clipped", f"{answer.bands['clip_fraction'].mean[-1]:.0%}"))
    cells.append(("noise multiplier σ", f"{answer.noise_multiplier:.3g}"))
    shown = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in cells)
    return f'<dl>{shown}</dl><p class="{_state(answer)[0]}">{_state(answer)[1]}</p>' + (
        f'<p class="seconds">answered in {answer.seconds:.2f} s</p>'
    )


def _state(answer: Answer) -> tuple[str, str]:
    """Whether the prediction may be trusted, as a class of the page and as a sentence."""
    reached = float(answer.weight_noise[-1])
    loss = answer.bands["loss"].mean
    if not loss[-1] <= loss[0]:
        return "failed", "The loss ends above its start: a step or the noise is too large."
    if reached == 0:
        return "good", "The kernel of a linear head never moves: the runs have the law of DP-SGD."
    said = f"v(T) = {reached:.2g}"
    if reached <= STILL:
        return "good", f"{said}: noise hardly moves the kernel, and the prediction may be trusted."
    if reached <= USELESS:
        return "doubtful", f"{said}: noise moves the kernel; the closer to one, the less is right."
    return "failed", f"{said}: noise rules the kernel; ask ntkdp predict instead."


def _last(band: Band) -> Band:
    return Band(*(part[-1] for part in band))


def _with_band(band: Band, form: str) -> str:
    mean, low, high = (f"{float(part):{form}}" for part in band)
    return f"{mean}<small>{low} to {high}</small>"
