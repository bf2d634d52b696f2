"""The configs of a wheel lie inside of the package, where no other project's `configs` is in their way.

Everything else is in setup.cfg. An editable installation reads them where they are, beside the package.
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class _WithConfigs(build_py):
    """Copies configs/*.py to warm_jax/configs/."""

    def run(self) -> None:
        """Builds as always, and copies."""
        super().run()
        for source in self._configs() if not self.editable_mode else ():
            target = pathlib.Path(self.build_lib, "warm_jax", source)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution has of these."""
        return [*super().get_source_files(), *map(str, self._configs())]

    @staticmethod
    def _configs() -> list[pathlib.Path]:
        return sorted(pathlib.Path("configs").glob("*.py"))


setup(cmdclass={"build_py": _WithConfigs})
