"""Write a training checkpoint as a released folder: FP8 projections, FP4 experts, one layer per shard, with an index.

python examples/train_nano/export.py --run /tmp/nano --folder v4sdk/nano
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from parameters import Parameters

from v4sdk.config import ModelConfig
from v4sdk.convert import write_checkpoint


def main() -> None:
    """Quantise and write; tokenizer and wording of the folder stay as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint.pt")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write, with config.json")
    args = parser.parse_args()
    state = torch.load(args.run / "checkpoint.pt", weights_only=True)
    config = ModelConfig.from_dict(state["config"])
    parameters = Parameters(config)
    parameters.load_state_dict(state["parameters"])
    tensors = {name: value.detach() for name, value in parameters.named().items()}
    total = write_checkpoint(args.folder, config, tensors, extra_config=state["config"])
    trained = {"steps": state["steps"], "tokens": state["tokens"], "minutes": round(state["seconds"] / 60, 1)}
    print(
        json.dumps({"parameters": sum(t.numel() for t in parameters.parameters()), "bytes": total, **trained})
    )


if __name__ == "__main__":
    main()
