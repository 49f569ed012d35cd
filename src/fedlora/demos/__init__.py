"""What `fedlora quickstart` shows: federations on text of the packages that are installed, nothing downloaded."""

from fedlora.demos.code_bases import CODE
from fedlora.demos.docstrings import DOCSTRINGS

DEMOS = {"causal-lm": CODE, "text-classification": DOCSTRINGS}
"""By task."""
