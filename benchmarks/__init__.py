"""Every op, the neck and the model against what they would be replaced by: `python -m benchmarks --help`.

One file per op defines its inputs, its providers and its cases' sizes come from `shapes.py`; `original.py` is
the baseline. `check.py` compares before `timing.py` and `memory.py` measure, `rows.py` is the format of the
results, `roofline.py` counts bytes and FLOPs. `runner.py` puts them together.
"""
