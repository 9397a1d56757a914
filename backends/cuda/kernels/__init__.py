"""Kernels in the Triton language, one room per family. A module here holds device code only; the wrappers beside this folder
choose tiles, make outputs and launch. Arithmetic is float32 unless a line says otherwise: the interpreter and the oldest
supported chip compute nothing narrower than that by themselves.
"""
