"""The README's example runs as printed, and says what it claims."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def test_the_example_predicts_the_run(capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert re.fullmatch(r"\d+\.\d%\n", capsys.readouterr().out)
    assert names["comparison"].sup_relative_error < 0.05
    assert names["run"].loss[-1] < 0.7 * names["run"].loss[0]


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
