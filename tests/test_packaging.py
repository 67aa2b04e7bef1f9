"""A wheel holds everything that the checkout holds."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = SETTINGS["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Package name -> its folder, by the longest name in package-dir."""
    folders = {}
    for package in SETUPTOOLS["packages"]:
        top = max(
            (d for d in SETUPTOOLS["package-dir"] if (package + ".").startswith(d + ".")), key=len
        )
        inner = package[len(top) :].strip(".").split(".")
        folders[package] = ROOT.joinpath(SETUPTOOLS["package-dir"][top], *filter(None, inner))
    return folders


def test_every_folder_with_code_is_a_package():
    listed = set(package_folders().values())
    for top in set(SETUPTOOLS["package-dir"].values()):
        for path in (ROOT / top).rglob("*.py"):
            assert path.parent in listed, f"{path.parent} is not among the packages"


def test_every_other_file_is_package_data():
    folders = package_folders()
    patterns = [
        (folders[package], pattern)
        for package, listed in SETUPTOOLS["package-data"].items()
        for pattern in listed
    ]

    def shipped(path: Path) -> bool:
        return any(
            fnmatch.fnmatch(str(path.relative_to(folder)), pattern.removeprefix("**/"))
            for folder, pattern in patterns
            if path.is_relative_to(folder)
        )

    for top in set(SETUPTOOLS["package-dir"].values()):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                assert shipped(path), f"{path.relative_to(ROOT)} is in no wheel"
