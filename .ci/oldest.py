"""Prints the oldest version of each library that setup.cfg allows, as constraints for pip; tools (`dev`) are free."""

import configparser
import re
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
groups = {"core": setup["options"]["install_requires"], **setup["options.extras_require"]}
for requirement in "\n".join(groups[name] for name in groups if name != "dev").split("\n"):
    if found := re.match(r"([\w.-]+)(?:\[.*\])?[=>]=([\d.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
