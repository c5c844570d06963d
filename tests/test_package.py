"""What the package shows the world, and what it keeps out of it."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import klmetric

ROOT = Path(__file__).parent.parent


def test_public_names():
    assert sorted(klmetric.__all__) == [
        *("Head", "KLDivergence", "KLDivergenceEstimate", "KLDivergenceSummary", "TopK", "__version__"),
        *("kl_divergence", "kl_divergence_bounds"),
    ]
    assert all(hasattr(klmetric, name) for name in klmetric.__all__)
    assert klmetric.__version__ == version("klmetric")
    assert f"## {klmetric.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_callback_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("klmetric.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    text = "klmetric.lightning needs Lightning. Install it with: pip install 'klmetric[lightning]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(text)):
        importlib.import_module("klmetric.lightning")


def test_typed():
    assert (Path(klmetric.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_what_is_imported_and_when():
    code = (
        "import sys, klmetric\n"
        "assert not {'torch', 'torchmetrics', 'numpy'} & set(sys.modules)\n"
        "modules = {'bounds', 'distributed', 'estimate', 'functional', 'metric', 'summary'}\n"
        "assert {*klmetric.__all__, *modules} <= set(dir(klmetric))\n"
        "assert klmetric.distributed.real_samples.__module__ == 'klmetric.distributed'\n"
        "import pickle\n"
        "from klmetric import *\n"
        "assert klmetric.KLDivergence is KLDivergence is vars(klmetric)['KLDivergence']\n"
        "assert type(pickle.loads(pickle.dumps(KLDivergence()))) is KLDivergence\n"
        "assert kl_divergence.__module__ == 'klmetric.functional'\n"
        "import torch\n"
        "KLDivergence().update(torch.ones(1, 2), torch.ones(1, 2))\n"
        "assert not {'lightning', 'pytorch_lightning', 'typer', 'rich', 'sklearn', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'klmetric' has no attribute 'KLDivergense'"):
        klmetric.KLDivergense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'kl_div' from 'klmetric'"):
        exec("from klmetric import kl_div")
