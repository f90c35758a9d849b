"""How setuptools finds `jaxgen.convert`, when it builds a wheel from a source tree.

`package-dir` in pyproject.toml says the same, but with it `pip install -e` becomes a finder that Python asks last: in
the folder that holds a clone named jaxgen, the clone would be imported, as a package without names. Without it, an
editable install is a line in a .pth file, which Python asks before.
"""

from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Takes the package `jaxgen.convert` from the folder `convert`."""

    def get_package_dir(self, package: str) -> str:
        """Where a package's files are, relative to the project."""
        return super().get_package_dir(package.removeprefix("jaxgen.") if "convert" in package.split(".") else package)

    def get_source_files(self) -> list[str]:
        """What a source distribution needs: these two files too."""
        return [
            *super().get_source_files(),
            *(str(Path("jaxgen", "convert", name)) for name in ("__init__.py", "wheel.py")),
        ]
