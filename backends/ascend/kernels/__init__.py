"""The three kernels of our own, in the Triton language, for steps that no pack serves on every chip.

A run takes one of them, `mixes`, through the provider of `hc_pre`; `rope` and `swiglu` are proven and compiled, and no provider
calls them yet.

`rope`, `mixes` and `swiglu` hold device code and import Triton; `launch` has the functions that backends call, `tiles` their
sizes for each chip, and `lowering` takes every kernel through the vendor's compiler. They keep to what all chips compile: no
FP8 type, no atomic, no tensor core, arithmetic in float32, and tiles whose buffers fit into 192 KB (910B, 910C) or 248 KB (950).
"""
