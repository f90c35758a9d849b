"""The notebooks are checked where the extra `notebooks` is installed; the light test environment does not have it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("jupytext") else ["test_notebooks.py"]
