"""Calibration mixes: data only, read by `klquant.calibrate`.

`*.yaml` name public datasets. `tiny.jsonl` is text written for this project: prose, chats, Chinese, code and worked
mathematics in turn, so that the first few thousand tokens hold all of them.
"""
