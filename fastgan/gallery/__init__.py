"""Pictures of a run: grids of sample images, one self-contained page per run, and one that compares runs.

The pages (template: `page.html`) ask nobody for anything: pictures are data URIs, curves are SVG drawn by a
script in them, and their content-security policy forbids every request. They open from disk.
"""

from fastgan.gallery.comparison import Run, write_comparison
from fastgan.gallery.grid import save_grid
from fastgan.gallery.page import write_page

__all__ = ["Run", "save_grid", "write_comparison", "write_page"]
