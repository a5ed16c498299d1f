"""The names that a user meets first: `import scott`, and README's three lines."""
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import write_images

import scott
from scott.train import config

README = (Path(__file__).resolve().parent.parent/'README.md').read_text(encoding='utf-8')


def test_import_leaves_torch_alone():
    code = 'import sys, scott; print("torch" in sys.modules, scott.__version__)'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ['False', scott.__version__]


def test_every_name_is_there():
    for name in 'Encoder Predictor MIMJEPA blockwise uniform multiblock two_views load Config pretrain Run'.split():
        assert name in dir(scott) and callable(getattr(scott, name))
    assert not hasattr(scott, 'nothing')
    from scott.probe import CrossAttentive, MultiHeadAttentive, SimpleAttentive
    assert all(cls(8, 3)(torch.zeros(2, 4, 8)).shape == (2, 3)
               for cls in (SimpleAttentive, MultiHeadAttentive, CrossAttentive))


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    write_images(tmp_path/'photos', 24, size=130)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path/'cache'))
    toy = dict(config.PRESETS['small'], depth=1, predictor_depth=1, epochs=2, warmup_epochs=1, batch_size=8)
    monkeypatch.setitem(config.PRESETS, 'small', toy)
    names = {}
    exec(re.search(r'```python\n(.*?)```', README, re.S)[1], names)
    assert names['features'].shape == (24, 192) and names['features'].isfinite().all()
    run = scott.Run('runs/mine')
    assert run.step == names['run'].step == 6 and run.config.epochs == 2 and len(run.metrics) == 1
