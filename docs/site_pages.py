"""MkDocs hooks that show pages outside docs/ on the site, at their places in the repository.

`experiments/**/README.md` and CONTRIBUTING.md stay where readers of the repository look for them.
On the site they have the same paths, and docs/ is its root. A relative link is resolved in the
repository, and written anew for the site.
"""

from __future__ import annotations

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATTERNS = (
  "CONTRIBUTING.md",
  "experiments/README.md",
  "experiments/*/README.md",
  "experiments/*/*/README.md",
)
# Endings of files that pages of experiments/ show or link to.
ASSETS = (".png", ".svg", ".csv", ".json")
# A link or a picture of Markdown. Links to other sites and to a heading of the same page are left
# alone.
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[ ]*$", re.MULTILINE | re.DOTALL)


def on_files(files, config):
  """Adds the pages outside docs/, and the figures and tables beside them."""
  from mkdocs.structure.files import File

  for page in (path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))):
    beside = [path for path in page.parent.iterdir() if path.suffix in ASSETS]
    for path in [page] + (beside if page.parent != ROOT else []):
      uri = path.relative_to(ROOT).as_posix()
      files.append(File.generated(config, uri, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Points relative links at the places that their targets have on the site."""
  source = pathlib.Path(page.file.abs_src_path)
  return outside_fences(markdown, lambda text: LINK.sub(lambda m: _moved(m, source, page), text))


def outside_fences(markdown: str, change) -> str:
  """Applies a function to all text that is not in a fenced block of code."""
  parts, last = [], 0
  for fence in FENCE.finditer(markdown):
    parts += [change(markdown[last : fence.start()]), fence[0]]
    last = fence.end()
  return "".join([*parts, change(markdown[last:])])


def _moved(match: re.Match, source: pathlib.Path, page) -> str:
  target = (source.parent / match[2]).resolve()
  if not target.is_relative_to(ROOT):
    return match[0]
  uri = target.relative_to(ROOT).as_posix().removeprefix("docs/")
  link = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
  return f"{match[1]}{link}{match[3]}"
