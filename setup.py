"""Everything about this package is said in settings.ini; this file hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
about = config["DEFAULT"]


def listed(key: str) -> list[str]:
    return about.get(key, "").split()


# What may lie in the package beside its modules. A test builds the wheel and misses what is not listed here.
DATA = "html css js svg yaml toml json txt ipynb".split()

suffix = "_requirements"
extras = {key.removesuffix(suffix): listed(key) for key in about if key.endswith(suffix)}
extras["dev"] += extras["train"] + extras["notebook"] + extras["postgres"] + extras["drive"]

setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    keywords=listed("keywords"),
    author=about["author"],
    author_email=about["author_email"],
    url=about["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={about['min_python']}",
    install_requires=listed("requirements"),
    extras_require=extras,
    packages=find_packages(include=[about["lib_path"], f"{about['lib_path']}.*"]),
    package_data={about["lib_path"]: [f"**/*.{kind}" for kind in DATA]},
    zip_safe=False,
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points={
        "console_scripts": [line for line in about.get("console_scripts", "").splitlines() if line.strip()],
        "nbdev": [f"{about['lib_path']}={about['lib_path']}._modidx:d"],
    },
)
