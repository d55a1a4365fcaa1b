"""Write the versions of this environment to constraints.txt and to pyproject.toml's [tool.uv].

The first serves pip (`pip install -c constraints.txt .`), the second `uv run`; neither holds an
address.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
OLDEST_PYTHON = "3.11.0"


def main() -> None:
    """Rewrite both files."""
    names = {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in distributions()
        # A pin that the oldest Python of the project cannot have leaves nothing to resolve.
        if SpecifierSet(d.metadata["Requires-Python"] or "").contains(OLDEST_PYTHON)
    }
    names.pop("ntkdp", None)
    pins = [f"{name}=={version}" for name, version in sorted(names.items())]
    header = "# Versions that the test suite was run with; written by `make pins`.\n"
    (ROOT / "constraints.txt").write_text(header + "\n".join(pins) + "\n")

    project = ROOT / "pyproject.toml"
    listed = "constraint-dependencies = [\n" + "".join(f'  "{pin}",\n' for pin in pins) + "]\n"
    text = re.sub(
        r"constraint-dependencies = \[\n.*?\]\n", lambda _: listed, project.read_text(), flags=re.S
    )
    project.write_text(text)


if __name__ == "__main__":
    main()
