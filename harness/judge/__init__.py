"""The frozen judge: the corpus and its splits, bits per byte, the probes, and the process that scores.

No candidate may change these files; their hash is part of every score's `judge_id`.
"""
