"""Only what pyproject.toml cannot say: recipe folders at the top level are installed inside the
package, as `edgert.recipes.<folder>`, so that a wheel carries them. They hold no Python.

An editable install does not map folders without Python files; there the loader reads the folder
beside the package.
"""

from setuptools import find_packages, setup

RECIPE_FOLDERS = ("export", "engines")

setup(
    packages=[
        *find_packages(include=["edgert", "edgert.*"]),
        *(f"edgert.recipes.{folder}" for folder in RECIPE_FOLDERS),
    ],
    package_dir={f"edgert.recipes.{folder}": folder for folder in RECIPE_FOLDERS},
)
