"""``python -m normfused``: what is built, what runs, and why, as JSON."""

import json

from .backends import info

print(json.dumps(info(), indent=2))
