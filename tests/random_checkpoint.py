"""A checkpoint of random weights, written by the example that users have for it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from v4sdk.config import ModelConfig
from v4sdk.config_file import config_dict

_EXAMPLE = Path(__file__).parent.parent / "examples" / "make_checkpoint.py"


def make(folder: Path, config: ModelConfig) -> Path:
    """Write one into `folder`/model."""
    sizes = folder / "sizes.json"
    sizes.write_text(json.dumps(config_dict(config)))
    before, sys.argv = sys.argv, [_EXAMPLE.name, str(folder / "model"), "--config", str(sizes)]
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(_EXAMPLE), run_name="__main__")
    finally:
        sys.argv = before
    return folder / "model"
