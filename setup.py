"""Only what pyproject.toml cannot say.

Recipe folders at the top level are installed inside the package, as `edgert.recipes.<folder>`, so
that a wheel carries them. They hold no Python. An editable install does not map them; there the
loader reads the folder beside the package.

The kernels are a plain shared library in the form of an extension module: setuptools then finds the
compiler, and `optional` installs edgert without them where there is none.
"""

from glob import glob

from setuptools import Extension, find_packages, setup

RECIPE_FOLDERS = ("export", "engines")
KERNELS = "edgert/kernels"
OPTIONS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
QUIET = ["-Wno-psabi", "-Wno-unused-function"]
QUIET += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12, of its own AVX-512 header

setup(
    packages=[
        *find_packages(include=["edgert", "edgert.*"]),
        *(f"edgert.recipes.{folder}" for folder in RECIPE_FOLDERS),
    ],
    package_dir={f"edgert.recipes.{folder}": folder for folder in RECIPE_FOLDERS},
    ext_modules=[
        Extension(
            "edgert.kernels._native",
            [
                f"{KERNELS}/{name}.cpp"
                for name in ("attention", "products", "rowwise", "registered")
            ],
            depends=glob(f"{KERNELS}/*.h"),
            extra_compile_args=[*OPTIONS, *QUIET],
            extra_link_args=["-s"],  # the same bytes wherever it is built
            language="c++",
            optional=True,
            py_limited_api=True,  # it uses none of Python's interface: one wheel for all versions
        )
    ],
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        # an editable install is a path: its default, a hook, is run at each start of Python
        "editable_wheel": {"mode": "compat"},
    },
)
