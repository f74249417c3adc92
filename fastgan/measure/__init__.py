"""What a system is measured by: `MEASURES`, the tools that they need (`prepare`), and `measure`.

Each image is translated alone, in float32, and compared in 0..1 of its value range. A measure that exists for
several directions has the domain it is about behind its name (`fid_B`).
"""

from fastgan.measure.evaluation import Evaluation, measure
from fastgan.measure.pairs import Pairs, inception
from fastgan.measure.system import Found, System
from fastgan.measure.tools import Tools, prepare

__all__ = ["Evaluation", "Found", "Pairs", "System", "Tools", "inception", "measure", "prepare"]
