"""For mkdocs: what lies outside docs/ is named, not linked, on the site; in the repository the links work."""

import re

# The pages that README and CONTRIBUTING, included here, call by their place in the repository.
_INSIDE = re.compile(r"\]\(docs/([^)]+)\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown, page, config, files):
    return _OUTSIDE.sub(r"\1 (`\2`)", _INSIDE.sub(r"](\1)", markdown))
