"""Write the versions of this environment to pyproject.toml, where uv obeys them in a clone."""

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
OLDEST_PYTHON = "3.11.0"


def main() -> None:
    """Rewrite the list of pins."""
    versions = {
        package.metadata["Name"].lower().replace("_", "-"): package.version
        for package in distributions()
        # A pin that the oldest Python of the project cannot have leaves nothing to resolve.
        if SpecifierSet(package.metadata["Requires-Python"] or "").contains(OLDEST_PYTHON)
    }
    versions.pop("ntkdp", None)
    pins = "".join(f'  "{name}=={version}",\n' for name, version in sorted(versions.items()))
    pinned = re.sub(
        r"constraint-dependencies = \[\n.*?\]\n",
        lambda _: f"constraint-dependencies = [\n{pins}]\n",
        PROJECT.read_text(),
        flags=re.S,
    )
    PROJECT.write_text(pinned)


if __name__ == "__main__":
    main()
