"""Where the package's folders live; everything else about the build is in pyproject.toml.

``patches/`` and ``configs/`` stand at the top of the repository and ship inside the one import package, as
``alaya_hf.patches`` and ``alaya_hf.configs``. pyproject.toml can name such a mapping but cannot combine it with
automatic discovery of the other sub-packages, hence these lines.
"""

from setuptools import find_namespace_packages, find_packages, setup

OUTSIDE = {"alaya_hf.patches": "patches", "alaya_hf.configs": "configs"}

# Namespace discovery finds a folder whose __init__.py was forgotten, instead of leaving it out of the wheel.
packages = find_namespace_packages(include=["alaya_hf", "alaya_hf.*"], exclude=["*.__pycache__"])
packages += [*OUTSIDE, *(f"alaya_hf.patches.{sub}" for sub in find_packages("patches"))]

setup(packages=packages, package_dir=OUTSIDE)
