"""What the documentation shows is what happens: docstring examples and the README's Python, executed."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgen

README = Path(__file__).parent.parent / "README.md"
MODULES = [module.name for module in pkgutil.walk_packages(jaxgen.__path__, "jaxgen.") if "demo" not in module.name]


@pytest.fixture(scope="module")
def demo():
    """The demo model and its tokenizer."""
    from jaxgen.text.tokenizer import load_tokenizer

    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path()), load_tokenizer(jaxgen.demo.path())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, request: pytest.FixtureRequest):
    module = importlib.import_module(name)
    names = vars(module) | {"getfixture": request.getfixturevalue}
    for example in doctest.DocTestFinder().find(module, extraglobs=names):
        failures, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
        assert failures == 0, example.name


def test_the_two_commands_stand_in_the_readme():
    lines = README.read_text().splitlines()
    assert '    pip install -e . && jaxgen generate "A list of colors: red, blue"' in lines
    assert '    pip install -e ".[test]" && pytest' in lines


def test_the_readmes_python_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    ours = [block for block in blocks if "import jaxgen" in block]
    assert ours
    names: dict[str, object] = {}
    for block in ours:
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"^# -> (.*)$", block, re.M)
        assert printed == promised


def test_importing_jaxgen_imports_nothing_heavy():
    code = (
        "import sys, jaxgen; "
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy; import jaxgen.generation.generate, jaxgen.convert; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    for name in jaxgen.__all__:
        assert getattr(jaxgen, name) is not None
    assert set(jaxgen.__all__) <= set(dir(jaxgen))
    with pytest.raises(AttributeError, match="Generate"):
        _ = jaxgen.Generate  # pyright: ignore[reportAttributeAccessIssue]
