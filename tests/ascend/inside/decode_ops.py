"""What torch's ops a decode step calls on an emulated chip, as JSON: `decode_ops.py CONVERTED|-`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from v4sdk import SamplingParams, Session, decode

SAMPLED = SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9, seed=1)
# what a decomposition of torch's own reduces to ops that are looked at themselves
COMPOSITE = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)
# a constant brought to the device, or a value brought to the host
FROM_HOST, TO_HOST = "aten::lift_fresh", ("aten::_local_scalar_dense", "aten::item", "aten::nonzero")

seen: Counter[str] = Counter()


class Noting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


advance = decode.DecodeStep.advance


def noted(self: decode.DecodeStep) -> None:
    with Noting():
        advance(self)


decode.DecodeStep.advance = noted  # type: ignore[method-assign]
folder = None if sys.argv[1] == "-" else sys.argv[1]
with Session.load(folder, backend="ascend") as session:
    session.chat([{"role": "user", "content": "What is 3 + 4?"}], params=SAMPLED)
has = torch._C._dispatch_has_kernel_for_dispatch_key
ours = [name for name in seen if name.startswith("aten::")]
print(
    json.dumps(
        {
            "ops": len(ours),
            "calls": seen.total(),
            "on_host": [
                n for n in ours if not has(n, "PrivateUse1") and not any(has(n, key) for key in COMPOSITE)
            ],
            "from_host": seen[FROM_HOST],
            "to_host": {name: seen[name] for name in TO_HOST if seen[name]},
        }
    )
)
